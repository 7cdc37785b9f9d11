"""The fused modules, and the packing of their weights ahead of serving."""

from .fused import FusedPSAModule
from .prepack import prepack, unpack
from .split import FusedSplitPSA

__all__ = ["FusedPSAModule", "FusedSplitPSA", "prepack", "unpack"]
