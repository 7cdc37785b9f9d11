"""A clone and an installed copy, such as a wheel, in one environment."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from support.paths import ROOT
from support.processes import python

from epsa_fused import _facts

HERE = ROOT / "epsa_fused"
UNINSTALL = "`pip uninstall epsa_fused`"


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder of a copy that Python finds everywhere but in the clone."""
    copy = tmp_path / "epsa_fused"
    return shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns("__pycache__", "*.so"))


def test_the_self_check_names_the_other_copy(installed, monkeypatch):
    others = [folder for folder in sys.path if not Path(folder, "epsa_fused").exists()]
    monkeypatch.setattr(sys, "path", [str(ROOT), *others, str(ROOT)])
    assert "also found" not in _facts.short()
    monkeypatch.syspath_prepend(installed.parent)
    facts = _facts.short()
    assert list(facts)[:2] == ["epsa_fused", "also found"]
    assert facts["epsa_fused"].endswith(f" in {HERE}")
    assert facts["also found"].startswith(f"{installed}: ") and UNINSTALL in facts["also found"]


def test_the_tests_refuse_two_copies(installed, monkeypatch):
    """Else some of them would test one, and some the other."""
    monkeypatch.chdir(ROOT)
    collect = ("-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", __file__)
    said = python(*collect, check=False, PYTHONPATH=str(installed.parent))
    (line,) = said.strip().splitlines()
    assert line.startswith(f"ERROR: the tests import {HERE / '__init__.py'}, but ")
    assert f"programs elsewhere {installed / '__init__.py'}: " in line and UNINSTALL in line


@pytest.mark.parametrize("of_the_clone", (True, False))
def test_a_benchmark_of_the_other_copy_has_no_commit(of_the_clone, installed, monkeypatch):
    if of_the_clone and not (ROOT / ".git").exists():
        pytest.skip("the checkout knows no commit")
    monkeypatch.chdir(installed.parent.parent)
    path = [ROOT if of_the_clone else installed.parent, ROOT / "benchmarks"]
    code = "import provenance; print(provenance.commit())"
    commit = python("-c", code, PYTHONPATH=os.pathsep.join(map(str, path))).strip()
    assert (commit != "unknown") == of_the_clone
