"""What setup.py decides by itself, without a build."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from support.paths import ROOT
from support.processes import python
from torch.utils import cpp_extension

SETUP = ROOT / "setup.py"


@pytest.fixture(scope="module")
def setup() -> dict:
    pytest.importorskip("setuptools")
    return runpy.run_path(str(SETUP))  # not as __main__: it builds nothing


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        # as CUDA 13.0 and 12.6 print them, and one that is older than 11
        ("75 80 86 89 90 100 110 103 120 121", "8.0;9.0;10.0;11.0;12.0+PTX"),
        ("50 60 70 75 80 86 89 90", "8.0;9.0+PTX"),
        ("50 60 70 75", ""),
        # no other's name that begins alike
        ("80 90a 100f 120a", "8.0+PTX"),
        ("", ""),
    ],
)
def test_only_architectures_that_nvcc_names_are_chosen(setup, listed, chosen):
    printed = "".join(f"compute_{number}\n" for number in listed.split())
    assert setup["architectures"](printed) == chosen


@pytest.mark.parametrize(
    ("release", "choice", "wanted"),
    [("13.0", "1", True), ("13.2", "auto", True), ("12.6", "auto", False), ("", "auto", False)],
)
def test_a_toolkit_of_another_cuda_than_torchs_is_left_alone(
    setup, tmp_path, monkeypatch, capsys, release, choice, wanted
):
    fake_nvcc(tmp_path, f"echo 'Cuda compilation tools, release {release}, V{release}.1'")
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("EPSA_CUDA", choice)
    assert setup["cuda_wanted"]() == wanted
    told = capsys.readouterr().err
    assert told == "" if wanted else f"is of CUDA {release or '(unknown)'}, and torch" in told
    if not wanted:
        monkeypatch.setenv("EPSA_CUDA", "1")
        with pytest.raises(SystemExit, match=r"EPSA_CUDA=1, but nvcc in CUDA_HOME=.* of CUDA 13$"):
            setup["cuda_wanted"]()


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        ("egg_info build_ext --inplace --build-temp build/temp", {"egg_info", "build_ext"}),
        ("build --build-base install bdist_wheel", {"build", "bdist_wheel"}),
        ("sdist --dist-dir build", {"sdist"}),  # a folder of that name
        ("dist_info --output-dir install", {"dist_info"}),
        ("bdist_wheel --no-such-option", set()),
        ("no_such_command", set()),
        ("--help", set()),
    ],
)
def test_the_commands_of_a_call(words, commands):
    output = in_a_process("print(sorted(setup['commands']()))", *words.split())
    assert output == f"{sorted(commands)}\n"


@pytest.mark.parametrize(
    ("name", "version", "missing"),
    [
        ("torch", "2.10.1+cpu", ["torch (2.10.1+cpu is too old)"]),
        ("torch", "2.9", ["torch (2.9 is too old)"]),
        ("torch", "2.11.0a0+git1234", []),
        ("torch", "3.0", []),
        ("pybind11", "2.12.1", ["pybind11 (2.12.1 is too old)"]),
    ],
)
def test_packages_that_are_too_old_are_missing(setup, monkeypatch, name, version, missing):
    pybind11 = pytest.importorskip("pybind11")
    monkeypatch.setattr({"torch": torch, "pybind11": pybind11}[name], "__version__", version)
    assert setup["missing_packages"]() == missing


@pytest.mark.parametrize(
    ("macros", "got"),
    [
        ("__GNUC__ 10", "GCC 10"),
        ("__GNUC__ 14\n#define __clang__ 1\n#define __clang_major__ 16", "clang"),
        ("__GNUC__ 13\n#define __NVCOMPILER 1", r"nvc\+\+"),
        (None, "what: no input files"),
        ("__GNUC__ 11", None),
    ],
)
def test_compilers_that_will_not_do(setup, tmp_path, monkeypatch, macros, got):
    compiler = tmp_path / "compiler"
    said = "echo what: no input files >&2" if macros is None else f"echo '#define {macros}'"
    compiler.write_text(f"#!/bin/sh\n[ $1 = -m64 ] || exit 1\n{said}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    if got is None:
        setup["check_compiler"]()
        return
    with pytest.raises(SystemExit, match=f"^epsa_fused is compiled by GCC 11 .* got {got}; "):
        setup["check_compiler"]()


@pytest.mark.parametrize("given", ("", "  "))
def test_a_blank_choice_of_compiler_is_none(setup, monkeypatch, given):
    monkeypatch.setenv("CXX", given)
    setup["check_compiler"]()


def test_a_choice_of_compiler_that_no_shell_reads(setup, monkeypatch):
    monkeypatch.setenv("CXX", "g++ 'x")
    with pytest.raises(SystemExit, match=r"CXX: expected a command, got .*: No closing quotation"):
        setup["check_compiler"]()


def test_a_build_without_a_compiler_ends_in_one_line():
    code = "import setuptools; setup['builder']()(setuptools.Distribution()).build_extensions()"
    output = in_a_process(code, CXX="no-such-compiler -O2")
    assert re.search(r"^epsa.* expected one as .* PATH, got no no-such-compiler; .*$", output, re.M)
    assert "Traceback" not in output


def in_a_process(code: str, *arguments: str, **environment: str) -> str:
    """What code about `setup` prints. Other tests' tools import distutils in their own ways."""
    begin = f"import runpy, sys; sys.argv[0] = 'setup.py'; setup = runpy.run_path({str(SETUP)!r})"
    return python("-c", f"{begin}\n{code}", *arguments, check=False, **environment)


def fake_nvcc(home: Path, script: str) -> None:
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\n{script}\n")
    nvcc.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo compute_75", "compiles for none of 8.0, .* It named: compute_75"),
        ("echo broken >&2; exit 3", r"nvcc.* exit status 3\.\nbroken"),
    ],
)
def test_a_toolkit_without_any_of_them_is_an_error(setup, tmp_path, monkeypatch, script, message):
    fake_nvcc(tmp_path, script)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match=message):
        setup["default_architectures"]()
