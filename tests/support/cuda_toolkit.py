"""NVIDIA's compiler and disassembler, where they are installed: no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


def _folders() -> Iterator[Path]:
    """Where the tools may be: the toolkit, then what PyPI's packages install."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home:
            yield Path(home) / "bin"
    for package, inside in (("nvidia", "cu13/bin"), ("triton", "backends/nvidia/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            yield Path(folder) / inside


def find(tool: str) -> str | None:
    search = os.pathsep.join(map(str, _folders()))
    return shutil.which(tool, path=search) or shutil.which(tool)


def run(*command: str | Path, timeout: int = 1800) -> str:
    """What a command prints (both streams); AssertionError where it fails."""
    result = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, f"exit code {result.returncode}:\n{result.stdout[-8000:]}"
    return result.stdout
