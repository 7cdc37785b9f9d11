"""Programs of tests/cpu_cases: the CPU kernels without torch, under the address and the
undefined-behaviour sanitizers, over a table of cases."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from simt import build
from support.isa import runs_here
from support.paths import TESTS

from epsa_fused import _C

ISAS = _C.build_info()["cpu_isas"]
CPU = build.ROOT / "csrc" / "cpu"
CASES = TESTS / "cpu_cases"
FLAGS = ["-Wno-psabi", "-Wno-maybe-uninitialized"]
# the bytes of a register, and what makes the compiler use it
TARGETS = {
    "baseline": (16, []),
    "avx2": (32, ["-march=x86-64-v3"]),
    "avx512": (64, ["-march=x86-64-v4"]),
}


def programs(noun: str, directory: Path) -> dict[str, Path]:
    """A program for each instruction set that runs here. noun: attention or conv."""
    if reason := build.missing("asan"):
        pytest.skip(reason)
    shared = [(CPU / f"{name}.cpp", directory / f"{name}.o") for name in ("isa", f"{noun}_plan")]
    table = (CASES / f"{noun}_cases.cpp", directory / "table.o")
    kernels = {isa: directory / f"{isa}.o" for isa in ISAS if runs_here(isa)}
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(build.compile_objects, shared, "asan", flags=FLAGS)]
        # Only the kernels are watched: the table's own loops would take most of the time.
        jobs.append(pool.submit(build.compile_objects, [table], flags=["-O2"]))
        for isa, made in kernels.items():
            size, march = TARGETS[isa]
            flags = [f"-DEPSA_CASES_{noun.upper()}", f"-DEPSA_VEC_BYTES={size}", *march, *FLAGS]
            pair = (CASES / "one_isa.cpp", made)
            jobs.append(pool.submit(build.compile_objects, [pair], "asan", flags=flags))
        for job in jobs:
            job.result()
    objects = [table[1], *(made for _, made in shared)]
    return {
        isa: build.link([made, *objects], directory / f"{isa}_cases", "asan")
        for isa, made in kernels.items()
    }


def run(programs: dict[str, Path], isa: str, monkeypatch) -> tuple[int, str]:
    """The cases that one program ran, all of them well, and the rest of its output."""
    if isa not in programs:
        pytest.skip(f"this machine's CPU has no {isa}")
    monkeypatch.setenv("EPSA_CPU_ISA", isa)
    result = build.run(programs[isa], timeout=600)
    *rest, summary = result.stdout.splitlines() or [""]
    count = re.fullmatch(r"(\d+) cases, 0 failed", summary)
    assert count and result.returncode == 0, result.stdout[-5000:]
    return int(count[1]), "\n".join(rest)
