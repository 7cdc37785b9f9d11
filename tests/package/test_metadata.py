"""Version, dependencies and contents of what a build makes, with and without torch.

The hooks are those that pip, uv and other build front ends call.
"""

from __future__ import annotations

import re
import runpy
import sysconfig
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
import torch
from support.pages import PAGES
from support.paths import ROOT
from support.processes import python

import epsa_fused
from epsa_fused import _C
from epsa_fused._version import built_for, minor

# In a process, since setup.py is run in the hooks. The modules named are as if not installed.
HOOK = """
import os, sys
hook, folder, *absent = sys.argv[1:]
sys.modules.update(dict.fromkeys(absent))
os.chdir({root!r})
import setuptools.build_meta
print("MADE", getattr(setuptools.build_meta, hook)(folder))
"""
NOTHING = ("torch", "ninja", "pybind11")


def call(hook: str, folder: Path, *absent: str, check: bool = True) -> str:
    """The name of the file or folder that the hook makes; all output where it fails."""
    pytest.importorskip("setuptools")
    code = HOOK.format(root=str(ROOT))
    output = python("-c", code, hook, str(folder), *absent, check=check)
    made = re.search("^MADE (.+)$", output, re.MULTILINE)
    return made[1] if made else output


def requirements(metadata: Message) -> list[str]:
    return [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]


def metadata_of(hook: str, folder: Path, *absent: str) -> Message:
    made = folder / call(hook, folder, *absent)
    return Parser().parsestr((made / "METADATA").read_text())


@pytest.mark.parametrize("kind", ("wheel", "editable"))
def test_metadata_without_torch_gives_the_range(kind, tmp_path):
    metadata = metadata_of(f"prepare_metadata_for_build_{kind}", tmp_path, *NOTHING)
    assert metadata["Version"] == epsa_fused.__version__
    assert requirements(metadata) == ["torch>=2.11"]


def test_metadata_beside_a_torch_names_it(tmp_path):
    metadata = metadata_of("prepare_metadata_for_build_wheel", tmp_path)
    assert metadata["Version"] == epsa_fused.__version__
    assert requirements(metadata) == [f"torch=={minor(torch.__version__)}.*"]


def test_the_version_of_a_wheel_for_others_names_it_too(tmp_path, monkeypatch):
    monkeypatch.setenv("EPSA_LOCAL_VERSION", "1")
    metadata = metadata_of("prepare_metadata_for_build_wheel", tmp_path)
    cuda = torch.version.cuda if _C.build_info()["cuda"] else None
    assert metadata["Version"] == built_for(torch.__version__, cuda)
    assert requirements(metadata) == [f"torch=={minor(torch.__version__)}.*"]


def test_pip_takes_a_source_distribution_from_an_index(tmp_path):
    """It refuses one whose metadata has another version than its name."""
    pytest.importorskip("pip")
    name = call("build_sdist", tmp_path)
    options = ("--no-index", "--find-links", tmp_path, "--no-build-isolation", "--no-deps")
    output = python(
        *("-m", "pip", "download", *map(str, options), "--dest", str(tmp_path / "got")),
        f"epsa_fused=={epsa_fused.__version__}",
    )
    assert (tmp_path / "got" / name).exists(), output


# What pip's isolated builds see: packages of their own, here setuptools, and not the environment's.
ISOLATED = """
import os, sys, sysconfig
import setuptools.build_meta
sys.path.remove(sysconfig.get_path("platlib"))
try:
    import torch
except ModuleNotFoundError:
    os.chdir({root!r})
    print("MADE", setuptools.build_meta.prepare_metadata_for_build_wheel(sys.argv[1]))
"""


def test_an_isolated_build_of_pip_takes_the_torch_of_the_environment(tmp_path):
    if Path(torch.__file__).parents[1] != Path(sysconfig.get_path("platlib")):
        pytest.skip("torch is not in this environment's own folder")
    pytest.importorskip("setuptools")
    output = python("-c", ISOLATED.format(root=str(ROOT)), str(tmp_path))
    made = re.search("^MADE (.+)$", output, re.MULTILINE)[1]
    metadata = Parser().parsestr((tmp_path / made / "METADATA").read_text())
    assert requirements(metadata) == [f"torch=={minor(torch.__version__)}.*"]


def test_the_version_of_a_wheel_names_torch_and_cuda():
    version = epsa_fused.__version__
    assert built_for("2.13.0+cpu", None) == f"{version}+torch2.13cpu"
    assert built_for("2.14.1+cu130", "13.0") == f"{version}+torch2.14cu130"
    assert built_for("2.15.0a0+git1234", "12.6") == f"{version}+torch2.15cu126"


def test_a_source_distribution_without_torch(tmp_path):
    """It fits any torch, also where there is one, and holds every module and what a build reads."""
    for absent in (NOTHING, ()):
        name = call("build_sdist", tmp_path, *absent)
        assert name == f"epsa_fused-{epsa_fused.__version__}.tar.gz"
        with tarfile.open(tmp_path / name) as archive:
            info = archive.extractfile(f"{name.removesuffix('.tar.gz')}/PKG-INFO")
            metadata = Parser().parsestr(info.read().decode())
            files = {member.split("/", 1)[1] for member in archive.getnames() if "/" in member}
        assert requirements(metadata) == ["torch>=2.11"]
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / "epsa_fused").rglob("*.py")}
        assert {*modules, "setup.py", "pyproject.toml", "csrc/info.cpp"} <= files


@pytest.mark.parametrize("hook", ("build_wheel", "build_editable"))
@pytest.mark.parametrize(
    ("absent", "missing"),
    ((NOTHING, r"torch \(.*\), pybind11 \(.*\)"), (("pybind11",), r"pybind11 \(.*\)")),
)
def test_a_build_without_them_ends_in_one_line(hook, absent, missing, tmp_path):
    *_, last = call(hook, tmp_path, *absent, check=False).splitlines()
    assert last.startswith("epsa_fused is compiled against the torch that it will run with: first ")
    assert "`pip install --no-build-isolation .`" in last
    assert re.search(f"this build does not find {missing}$", last)
    assert not list(tmp_path.iterdir())


def test_every_page_has_the_version():
    """_version.py is the source; these two cannot read it."""
    version = epsa_fused.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    newest = re.search(r"^## (\d\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest and newest[1] == version


def test_every_page_has_the_oldest_torch_and_python():
    oldest = runpy.run_path(str(ROOT / "setup.py"))["OLDEST_TORCH"]
    project = (ROOT / "pyproject.toml").read_text()
    python_minor = re.search(r'^requires-python = ">=3[.](\d+)"$', project, re.MULTILINE)[1]
    install = PAGES["docs/install.md"]
    assert f'"torch>={oldest}"' in install and f"Python 3.{python_minor} or newer" in install
    assert f"Python 3.{python_minor} or newer" in PAGES["README.md"]
    assert f'torch: ["{oldest}", ' in (ROOT / ".github/workflows/wheels.yml").read_text()
    assert f'\nbuild = "cp3{python_minor}-* ' in project


def test_the_requirements_of_a_build_are_the_same_everywhere():
    setup = runpy.run_path(str(ROOT / "setup.py"))
    project = (ROOT / "pyproject.toml").read_text()
    listed = [re.search(rf"^{name} = \[(.*)\]", project, re.MULTILINE)[1].split(", ")
              for name in ("requires", "build")]  # fmt: skip
    assert listed[1] == [*listed[0], '"build"']
    assert f'"pybind11>={setup["NEEDED"]["pybind11"]}"' in listed[0]
    command = f'pip install "torch>={setup["OLDEST_TORCH"]}" ' + " ".join(
        name if ">" in name else name.strip('"') for name in listed[0]
    )
    assert f"\n{command}\n" in PAGES["docs/install.md"]
