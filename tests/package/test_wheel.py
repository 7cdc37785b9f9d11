"""The wheel that `make wheel` makes, installed in environments that know no checkout.

`make wheel-check` runs this file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support.optional import optional
from support.pages import block
from support.paths import ROOT, TESTS
from support.processes import python

from epsa_fused import _C
from epsa_fused._version import built_for, minor

pytestmark = pytest.mark.slow
TORCH = f"torch=={minor(torch.__version__)}.*"
WITH_CUDA = _C.build_info()["cuda"]
VERSION = built_for(torch.__version__, torch.version.cuda if WITH_CUDA else None)


@dataclass
class Environment:
    folder: Path  # of programs, with nothing else in it
    python: Path

    @property
    def site_packages(self) -> Path:
        (found,) = self.python.parents[1].glob("lib/python*/site-packages")
        return found

    def run(self, *command: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
        """With a PATH that has no compiler, and none of this machine's settings of pip."""
        path = str(self.python.parent)
        return subprocess.run(
            [Path(path, command[0]), *command[1:]],
            cwd=folder or self.folder,
            env={"PATH": path, "HOME": str(self.folder), "PIP_CONFIG_FILE": os.devnull},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def output(self, *command: str, folder: Path | None = None) -> str:
        result = self.run(*command, folder=folder)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def pip(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("python", "-m", "pip", *arguments)


def make_environment(folder: Path) -> Environment:
    venv.create(folder / "env", with_pip=True)
    (folder / "programs").mkdir()
    return Environment(folder / "programs", folder / "env" / "bin" / "python")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    optional("auditwheel")
    folder = tmp_path_factory.mktemp("wheel")
    python(str(ROOT / "scripts" / "wheel.py"), str(folder), timeout=1500)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Environment:
    """The wheel beside this Python's packages, such as torch, but without its checkout."""
    environment = make_environment(tmp_path_factory.mktemp("installed"))
    environment.pip(
        "uninstall", "--yes", "setuptools"
    )  # older than torch wants, before Python 3.12
    packages = [path for path in sys.path if Path(path).name == "site-packages"]
    (environment.site_packages / "packages.pth").write_text("\n".join(packages))
    result = environment.pip("install", "--no-index", str(wheel))
    assert result.returncode == 0, result.stdout
    return environment


# ---- the file ----


def test_its_name_and_contents(wheel):
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    system = r"manylinux_2_\d+_" + os.uname().machine
    assert re.fullmatch(rf"epsa_fused-{re.escape(VERSION)}-{tag}-{tag}-{system}\.whl", wheel.name)
    assert WITH_CUDA or wheel.stat().st_size <= 2e6
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(n).decode() for n in names if n.endswith("/METADATA"))
    assert f"\nRequires-Dist: {TORCH}\n" in metadata
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "epsa_fused").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == modules
    libraries = [n for n in names if ".so" in n]  # none of torch's
    assert sorted(Path(n).parent.name for n in libraries) == ["epsa_fused"] * 2


# ---- installed ----


def test_the_self_check(installed):
    output = installed.output("python", "-m", "epsa_fused", "--report")
    package = installed.site_packages / "epsa_fused"
    assert re.search(rf"^epsa_fused +\S+ in {re.escape(str(package))}$", output, re.MULTILINE)
    assert f" {VERSION} in {installed.site_packages}" in output
    assert "self-check on cpu" in output and "WRONG" not in output


def test_the_first_example_of_readme(installed, tmp_path):
    (tmp_path / "models").mkdir()
    published = (TESTS / "support" / "published.py").read_text()
    (tmp_path / "models" / "epsanet.py").write_text(published)
    code = block("python", "epsa_fused.fuse(epsanet50())").code + "print(list(logits.shape))\n"
    output = installed.output("python", "-c", code, folder=tmp_path)
    assert output.startswith("fuse: 16 replaced, 0 left alone\n")
    assert output.endswith("[2, 1000]\n")


@pytest.mark.parametrize("command", (["epsa-train"], ["python", "-m", "epsa_fused.train"]))
def test_a_training(command, installed, tmp_path):
    for package in ("tqdm", "sklearn"):
        optional(package)
    short = ["--out", "runs/digits", "--epochs", "1", "--batch", "512"]
    assert "done: 2 steps" in installed.output(*command, *short, folder=tmp_path)
    assert (tmp_path / "runs" / "digits" / "best.pt").exists()


def test_prepack_and_export(installed, tmp_path):
    code = """
import torch
from epsa_fused import epsanet50, prepack

model, x = epsanet50(10).eval(), torch.randn(2, 3, 64, 64)
with torch.no_grad():
    expected = model(x)
    torch.export.save(torch.export.export(model, (x,)), "network.pt2")
    loaded = torch.export.load("network.pt2").module()(x)
    packed = prepack(model, x)(x)
print(torch.equal(loaded, expected), torch.allclose(packed, expected, rtol=1e-3, atol=1e-3))
"""
    output = installed.output("python", "-c", code, folder=tmp_path)
    assert output.splitlines()[-1] == "True True"


def test_a_checkout_beside_it(installed):
    """The installed one wins, but in the checkout's folder; the first lines tell."""
    (installed.site_packages / "zz_checkout.pth").write_text(f"{ROOT}\n")
    for folder, root in ((installed.folder, installed.site_packages), (ROOT, ROOT)):
        output = installed.output("python", "-m", "epsa_fused", folder=folder)
        first, second, *_ = output.splitlines()
        assert first.endswith(f" in {root / 'epsa_fused'}")
        (other,) = {installed.site_packages, ROOT} - {root}
        assert re.fullmatch(rf"also found +{other / 'epsa_fused'}: .*`pip uninstall .*", second)


# ---- refused ----


@pytest.fixture(scope="module")
def other_torch(tmp_path_factory) -> Environment:
    """An environment whose torch is a newer one, as far as pip can see."""
    environment = make_environment(tmp_path_factory.mktemp("other"))
    metadata = environment.site_packages / "torch-9.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.1.0\n")
    (metadata / "RECORD").write_text("")
    return environment


def test_pip_refuses_it_beside_another_torch(wheel, other_torch):
    refused = other_torch.pip("install", "--no-index", str(wheel))
    assert refused.returncode != 0
    assert f"No matching distribution found for {TORCH}" in refused.stdout
    forced = other_torch.pip("install", "--no-index", "--no-deps", str(wheel))
    assert forced.returncode == 0, forced.stdout
    checked = other_torch.pip("check")
    assert checked.returncode != 0
    assert re.search(f"requirement {re.escape(TORCH)}, but you have torch 9.1.0", checked.stdout)


@pytest.mark.parametrize(
    ("part", "other"), (("cp3[0-9]+", "cp39"), (r"manylinux_2_\d+", "manylinux_2_99"))
)
def test_pip_refuses_it_for_another_python_or_an_older_glibc(
    part, other, wheel, other_torch, tmp_path
):
    """By the tags in its name."""
    link = tmp_path / re.sub(part, other, wheel.name)
    link.symlink_to(wheel)
    result = other_torch.pip("install", "--no-index", "--no-deps", str(link))
    assert result.returncode != 0
    assert "is not a supported wheel on this platform" in result.stdout
