"""Fused Pyramid Squeeze Attention (EPSANet, arXiv 2105.14447) for PyTorch."""

# The underscored modules register kernels, formulas and decompositions when they are imported.
from . import _decompositions, _fake, _flops, convolution  # noqa: F401
from ._version import __version__
from ._winograd import set_winograd, winograd_allowed
from .backbone import BackboneReport, load_backbone
from .functional import psa_attention
from .fuse import FuseReport, fuse, unfuse
from .inference import (
    ExportableModel,
    InferenceModel,
    InferenceReport,
    optimize_for_export,
    optimize_for_inference,
)
from .models import epsanet, register_timm
from .models.epsanet import *  # noqa: F403  its __all__ holds every published model
from .modules import FusedPSAModule, FusedSplitPSA, SplitPSA, prepack, unpack, why_not_fused
from .record import record_attention
from .reference import PSAModule, psa_attention_reference
from .trained import Trained, load_trained

__all__ = [
    "BackboneReport",
    "ExportableModel",
    "FuseReport",
    "FusedPSAModule",
    "FusedSplitPSA",
    "InferenceModel",
    "InferenceReport",
    "PSAModule",
    "SplitPSA",
    "Trained",
    "__version__",
    "convolution",
    "fuse",
    "load_backbone",
    "load_trained",
    "optimize_for_export",
    "optimize_for_inference",
    "prepack",
    "psa_attention",
    "psa_attention_reference",
    "record_attention",
    "register_timm",
    "set_winograd",
    "unfuse",
    "unpack",
    "why_not_fused",
    "winograd_allowed",
]
__all__ += epsanet.__all__
