"""EPSANet, small networks for small images, and their use by timm and torchvision."""

from . import epsanet
from .epsanet import *  # noqa: F403  its __all__ holds every published model
from .registry import FIGURES, MODELS, Figures
from .small import SEBlock, SmallResNet, small_epsanet, small_senet
from .timm import register_timm

__all__ = [
    "FIGURES",
    "MODELS",
    "Figures",
    "SEBlock",
    "SmallResNet",
    "register_timm",
    "small_epsanet",
    "small_senet",
]
__all__ += epsanet.__all__
