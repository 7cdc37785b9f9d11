"""The fused modules, and the packing of their weights ahead of serving."""

from .adopted import AdoptedPSA, FusedAdoptedPSA
from .fused import FusedPSAModule
from .prepack import prepack, unpack
from .split import FusedSplitPSA, SplitPSA
from .why import why_not_fused

__all__ = [
    "AdoptedPSA",
    "FusedAdoptedPSA",
    "FusedPSAModule",
    "FusedSplitPSA",
    "SplitPSA",
    "prepack",
    "unpack",
    "why_not_fused",
]
