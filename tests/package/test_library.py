"""An extension that does not fit this Python or torch: one line says what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from support.processes import python

from epsa_fused import _C
from epsa_fused._version import built_for, minor

# The import of a copy, in a process whose torch has another version. An editable installation would
# supply what the copy lacks.
IMPORT = """
import sys, torch
torch.__version__, torch.version.cuda, folder = sys.argv[1], sys.argv[2] or None, sys.argv[3]
sys.path.insert(0, folder)
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in repr(finder)]
try:
    import epsa_fused
except ImportError as error:
    print(error)
else:
    print("imported from", epsa_fused.__file__)
"""
BUILD = "build it in a clone with `pip install --no-build-isolation .`"


@pytest.fixture
def package(tmp_path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    return shutil.copytree(ROOT / "epsa_fused", tmp_path / "epsa_fused", ignore=ignored)


def imported(package: Path, version: str = torch.__version__, cuda: str = "") -> str:
    return python("-c", IMPORT, version, cuda, str(package.parent)).strip()


@pytest.mark.parametrize(("version", "cuda"), (("9.1.2+cpu", ""), ("9.1.2+cu130", "13.0")))
def test_another_torch(version, cuda, package):
    assert imported(package, version, cuda) == (
        f"epsa_fused in {package} was built for torch {minor(_C.build_info()['torch'])}, but torch "
        f"{version} is running: install the wheel {built_for(version, cuda)}, or {BUILD}"
    )


def test_another_patch_of_the_same_torch(package):
    """Its C++ interface is the same."""
    other = f"{minor(torch.__version__)}.99"
    assert imported(package, other) == f"imported from {package / '__init__.py'}"


@pytest.mark.parametrize(
    ("rename", "found"),
    ((None, "none"), ("_C.cpython-39-x86_64-linux-gnu.so", "_C.cpython-39-x86_64-linux-gnu.so")),
    ids=("nothing", "another Python"),
)
def test_nothing_for_this_python(rename, found, package):
    for path in package.glob("_C.*.so"):
        path.rename(package / rename) if rename else path.unlink()
    message = imported(package)
    assert message.startswith(f"epsa_fused's extension in {package}: expected one for Python 3.")
    assert f", got {found} (" in message and message.endswith(BUILD)
    assert len(message.splitlines()) == 1


def test_operators_that_the_system_cannot_load(package):
    (package / "_ops.so").write_bytes(b"no library" * 100)
    message = imported(package)
    assert message.startswith(f"epsa_fused's operators in {package}: this system cannot load")
    assert "invalid ELF header" in message and message.endswith(BUILD)
    assert len(message.splitlines()) == 1


def test_a_file_that_the_system_cannot_load(package):
    """As with a C library that is too old: what the linker says is part of the line."""
    (library,) = package.glob("_C.*.so")
    library.write_bytes(b"no library")
    message = imported(package)
    assert f"got {library.name} (" in message and "file too short" in message
