"""spc_conv by the name that it had first; new code takes it from epsa_fused.functional."""

from .functional import spc_conv

__all__ = ["spc_conv"]
