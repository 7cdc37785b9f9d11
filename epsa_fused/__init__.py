"""Fused Pyramid Squeeze Attention (EPSANet, arXiv 2105.14447) for PyTorch."""

from importlib.metadata import version as _version

from . import convolution
from .modules import FusedPSAModule
from .ops import psa_attention
from .reference import PSAModule, psa_attention_reference

__version__ = _version("epsa_fused")

__all__ = [
    "FusedPSAModule",
    "PSAModule",
    "convolution",
    "psa_attention",
    "psa_attention_reference",
]
