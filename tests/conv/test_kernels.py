"""The CPU kernels' own source without torch, under the address and the undefined-behaviour
sanitizers: over the table of tests/cpu_cases, for each instruction set that this machine runs."""

import re
from pathlib import Path

import pytest
from simt import build
from support.isa import runs_here
from support.paths import TESTS

from epsa_fused import _C

PROGRAM = TESTS / "cpu_cases" / "conv_cases.cpp"
KERNELS = [
    build.ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("kernels/conv", "conv_plan", "isa")
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    if reason := build.missing("asan"):
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("cpu")
    flags = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
    kernels = [(source, directory / f"{source.stem}.o") for source in KERNELS]
    build.compile_objects(kernels, "asan", flags=flags)
    # only the kernels are watched
    table = [(PROGRAM, directory / "conv_cases.o")]
    build.compile_objects(table, flags=["-O2"])
    return build.link([made for _, made in kernels + table], directory / "cases", "asan")


@pytest.mark.parametrize("isa", _C.build_info()["cpu_isas"])
def test_case_table_of_the_convolutions(program, isa, monkeypatch):
    if not runs_here(isa):
        pytest.skip(f"this machine's CPU has no {isa}")
    monkeypatch.setenv("EPSA_CPU_ISA", isa)
    result = build.run(program, timeout=600)
    *_, left, summary = result.stdout.splitlines()
    count = re.fullmatch(r"(\d+) cases, 0 failed", summary)
    assert count and result.returncode == 0, result.stdout[-5000:]
    assert re.match(rf"{isa}: \d+ left to the library", left)
    assert int(count[1]) > 1000
