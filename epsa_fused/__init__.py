"""Fused Pyramid Squeeze Attention (EPSANet, arXiv 2105.14447) for PyTorch."""

from importlib.metadata import version as _version

from . import (
    _decompositions,  # noqa: F401  registers
    _fake,  # noqa: F401  registers
    _flops,  # noqa: F401  registers
    convolution,
)
from .functional import psa_attention
from .fuse import FuseReport, fuse
from .models import (
    EPSABlock,
    EPSANet,
    epsanet50,
    epsanet50_large,
    epsanet101,
    epsanet101_large,
    register_timm,
)
from .modules import FusedPSAModule, FusedSplitPSA, prepack, unpack
from .reference import PSAModule, psa_attention_reference

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
