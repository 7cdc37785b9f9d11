"""A copy of the package's folder: without an installation's metadata, and left as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.optional import optional
from support.paths import ROOT
from support.processes import python

import epsa_fused

CODE = """
import importlib.metadata
import sys

def refuse(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.Distribution.from_name = refuse
sys.path.insert(0, sys.argv[1])
import torch
import epsa_fused

print(epsa_fused.__file__)
print(epsa_fused.__version__)
print(epsa_fused.FusedPSAModule(64, 64)(torch.randn(1, 64, 8, 8)).shape)
"""


# What writes files where it is told to, or might: imports, the self-check, a training and its
# network's use, packed and prepared.
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import epsa_fused, epsa_fused.__main__, epsa_fused.predict, epsa_fused.train.__main__

assert epsa_fused.__main__.main(["--report"]) == 0
short = ["--out", "run", "--epochs", "1", "--batch", "512"]
assert epsa_fused.train.__main__.main(short) == 0
assert epsa_fused.train.__main__.main([*short, "--evaluate"]) == 0
trained, x = epsa_fused.load_trained("run"), torch.randn(2, 1, 8, 8)
with torch.no_grad():
    epsa_fused.optimize_for_inference(trained.model, x, compile=False)
    epsa_fused.prepack(trained.model, x)
print(epsa_fused.__file__)
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "packages" / "epsa_fused"
    shutil.copytree(ROOT / "epsa_fused", folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_vendored_copy_works_without_metadata(package):
    file, version, shape = python("-c", CODE, str(package.parent)).splitlines()
    assert file == str(package / "__init__.py")
    assert version == epsa_fused.__version__
    assert shape == "torch.Size([1, 64, 8, 8])"


def state(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Of a folder and all in it. Every write changes a time, also that of a file that is gone."""
    paths = [folder, *folder.rglob("*")]
    return {p: (s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p in paths for s in [p.stat()]}


def test_nothing_is_written_beside_it(package, tmp_path, monkeypatch):
    """So it may be read-only. Python leaves its own caches out here."""
    for name in ("tqdm", "sklearn"):
        optional(name)
    monkeypatch.chdir(tmp_path)
    before = state(package.parent)
    output = python("-c", USE, str(package.parent), PYTHONDONTWRITEBYTECODE="1")
    assert output.splitlines()[-1] == str(package / "__init__.py")
    assert (tmp_path / "run" / "best.pt").exists()
    assert state(package.parent) == before
