"""The version, its only source. setup.py runs this file alone, without torch."""

from __future__ import annotations

__version__ = "0.2.0"


def minor(torch: str) -> str:
    """2.13 for 2.13.0+cpu: torch keeps its C++ interface stable within these."""
    return ".".join(torch.split(".")[:2])


def built_for(torch: str, cuda: str | None) -> str:
    """The version of a wheel: 0.2.0+torch2.13cpu, or 0.2.0+torch2.13cu130 with CUDA kernels."""
    backend = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    return f"{__version__}+torch{minor(torch)}{backend}"
