"""EPSANet, small networks, and their use in timm and torchvision."""

from .epsanet import (
    EPSABlock,
    EPSANet,
    epsanet50,
    epsanet50_large,
    epsanet101,
    epsanet101_large,
)
from .registry import MODELS
from .timm import register_timm

__all__ = [
    "MODELS",
    "EPSABlock",
    "EPSANet",
    "epsanet50",
    "epsanet50_large",
    "epsanet101",
    "epsanet101_large",
    "register_timm",
]
