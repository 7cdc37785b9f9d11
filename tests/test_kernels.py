"""The CPU kernels under sanitizers, for each instruction set of this machine and for ARM."""

import itertools
import re
import shutil
import subprocess

import pytest
from simt import build
from support import cpu_cases
from support.isa import runs_here
from support.paths import ROOT

# what a program says before its summary, and a number that its cases exceed
EXPECTED = {
    "attention": ("", 10000),
    "conv": (r"{isa}: \d+ left to (the library|other kernels)", 1000),
}


# an instruction set without kernels of its own runs those of another one
TABLES = [(noun, isa) for noun in EXPECTED for isa in cpu_cases.isas_of(noun)]


@pytest.fixture(scope="module")
def noun(request) -> str:
    return request.param


@pytest.fixture(scope="module", params=["gcc", pytest.param("clang", marks=pytest.mark.slow)])
def programs(request, noun, tmp_path_factory):
    compiler = cpu_cases.clangs()[0] if request.param == "clang" else "g++"
    return cpu_cases.programs(noun, tmp_path_factory.mktemp(noun), compiler)


@pytest.mark.parametrize(("noun", "isa"), TABLES, indirect=["noun"], scope="module")
def test_case_table(programs, noun, isa, monkeypatch):
    words, least = EXPECTED[noun]
    count, rest = cpu_cases.run(programs, isa, monkeypatch)
    assert re.fullmatch(words.format(isa=isa), rest)
    assert count > least


@pytest.mark.parametrize("isa", ("baseline", "avx2", "avx512"))
def test_every_conversion_of_16_bit_floats(isa, tmp_path):
    """All values of both types, and the floats around the middle of every two neighbours."""
    if build.missing():
        pytest.skip(build.missing())
    if not runs_here(isa):
        pytest.skip(f"this machine's CPU has no {isa}")
    output = build.run(cpu_cases.conversions(isa, tmp_path)).stdout
    assert re.fullmatch(r"646150 cases, 0 failed\n", output), output


@pytest.mark.slow
def test_every_clang_compiles_the_kernels_with_optimisation():
    """The case tables are built without it, and clang 16 crashed in its optimiser."""
    sources = sorted((ROOT / "csrc" / "cpu" / "kernels").glob("*.cpp"))
    assert len(sources) == 3
    flags = ["-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    for compiler, source in itertools.product(cpu_cases.clangs(), sources):
        command = [compiler, *flags, f"-I{ROOT / 'csrc'}", "-c", source, "-o", "/dev/null"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{compiler} {source.name}: {done.stderr[-2000:]}"


@pytest.mark.slow
def test_the_case_tables_for_64_bit_arm_in_an_emulator():
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on PATH")
    output = subprocess.run(
        ["make", "aarch64-check"], cwd=ROOT, capture_output=True, text=True, timeout=1800
    ).stdout
    counts = [int(n) for n in re.findall(r"^(\d+) cases, 0 failed$", output, flags=re.MULTILINE)]
    assert len(counts) == 3 and counts[0] > 10000 and counts[1] > 1000, output[-3000:]
    assert counts[2] == 646150
