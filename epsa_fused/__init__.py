"""Fused Pyramid Squeeze Attention (EPSANet, arXiv 2105.14447) for PyTorch."""

from importlib.metadata import version as _version

from . import (
    convolution,
    decomposition,  # noqa: F401  registers
)
from .fuse import FuseReport, fuse
from .models import (
    EPSABlock,
    EPSANet,
    epsanet50,
    epsanet50_large,
    epsanet101,
    epsanet101_large,
)
from .modules import FusedPSAModule
from .ops import psa_attention
from .reference import PSAModule, psa_attention_reference
from .serving import prepack, unpack
from .split_psa import FusedSplitPSA
from .timm_models import register_timm

__version__ = _version("epsa_fused")

__all__ = [
    "EPSABlock",
    "EPSANet",
    "FuseReport",
    "FusedPSAModule",
    "FusedSplitPSA",
    "PSAModule",
    "convolution",
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
    "fuse",
    "prepack",
    "psa_attention",
    "psa_attention_reference",
    "register_timm",
    "unpack",
]
