"""A copy of the package's folder, without the metadata of an installation."""

from __future__ import annotations

import shutil

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


def test_a_vendored_copy_works_without_metadata(tmp_path):
    package = tmp_path / "epsa_fused"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "epsa_fused", package, ignore=ignored)
    file, version, shape = python("-c", CODE, str(tmp_path)).splitlines()
    assert file == str(package / "__init__.py")
    assert version == epsa_fused.__version__
    assert shape == "torch.Size([1, 64, 8, 8])"
