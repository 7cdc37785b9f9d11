"""The fused modules, and what packs their weights ahead."""

from .fused import FusedPSAModule
from .prepack import prepack, unpack
from .split import FusedSplitPSA

__all__ = ["FusedPSAModule", "FusedSplitPSA", "prepack", "unpack"]
