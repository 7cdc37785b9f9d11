"""The former place of FusedSplitPSA, which pickles of it name."""

from .modules import FusedSplitPSA

__all__ = ["FusedSplitPSA"]
