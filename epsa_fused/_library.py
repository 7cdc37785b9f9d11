"""The extension: importing this module loads its operators into torch.ops.epsa_fused."""

from __future__ import annotations

from pathlib import Path

import torch


def _load_library() -> None:
    """Load the operators.

    Raises:
        ImportError: the extension is not built, or for another torch; the message says what to do.
    """
    build = "build it with `pip install --no-build-isolation .`"
    try:
        from . import _C
    except ImportError as error:
        raise ImportError(f"epsa_fused's extension is not built: {build} ({error})") from error
    built_with, running = _C.build_info()["torch"], torch.__version__
    # torch keeps its C++ interface stable only within a minor version.
    if built_with.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"epsa_fused was built with torch {built_with}, but torch {running} is running: "
            + build
        )
    torch.ops.load_library(Path(__file__).parent / "_ops.so")


_load_library()

from . import _C  # noqa: E402  after the check of its version

MIN_BRANCHES, MAX_BRANCHES = _C.MIN_BRANCHES, _C.MAX_BRANCHES
COMPARED_WEIGHTS = _C.COMPARED_WEIGHTS  # csrc/cpu/conv_plan.h says what of
