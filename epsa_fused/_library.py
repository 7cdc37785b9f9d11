"""The extension: importing this module loads its operators into torch.ops.epsa_fused."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from ._version import built_for, minor

FOLDER = Path(__file__).parent
BUILD = "build it in a clone with `pip install --no-build-isolation .`"


def _load_library() -> None:
    """Load the operators.

    Raises:
        ImportError: the extension is not built, or for another Python, torch or system; the message
            says what to do.
    """
    try:
        from . import _C
    except ImportError as error:
        found = ", ".join(path.name for path in FOLDER.glob("_C.*.so")) or "none"
        raise ImportError(
            f"epsa_fused's extension in {FOLDER}: expected one for Python "
            f"{platform.python_version()} on this system, got {found} ({error}). Install the wheel "
            f"for this Python, or {BUILD}"
        ) from error
    built_with, running = _C.build_info()["torch"], torch.__version__
    if minor(built_with) != minor(running):
        raise ImportError(
            f"epsa_fused in {FOLDER} was built for torch {minor(built_with)}, but torch {running} "
            f"is running: install the wheel {built_for(running, torch.version.cuda)}, or {BUILD}"
        )
    try:
        torch.ops.load_library(FOLDER / "_ops.so")
    except OSError as error:
        why = error.__cause__ or error  # what the linker says
        raise ImportError(
            f"epsa_fused's operators in {FOLDER}: this system cannot load _ops.so ({why}). "
            f"Install the wheel for torch {minor(running)} and this system, or {BUILD}"
        ) from error


_load_library()

from . import _C  # noqa: E402  after the check of its version

MIN_BRANCHES, MAX_BRANCHES = _C.MIN_BRANCHES, _C.MAX_BRANCHES
COMPARED_WEIGHTS = _C.COMPARED_WEIGHTS  # so many packed weights are compared in a call
HAS_CUDA: bool = _C.build_info()["cuda"]  # whether the operators have CUDA kernels
