"""Programs of tests/cpu_cases: the CPU kernels without torch, under the address and the
undefined-behaviour sanitizers, over a table of cases."""

import functools
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from simt import build
from support.isa import BFLOAT16_ALONE, runs_here
from support.paths import TESTS

from epsa_fused import _C

ISAS = _C.build_info()["cpu_isas"]
CPU = build.ROOT / "csrc" / "cpu"
CASES = TESTS / "cpu_cases"
FLAGS = ["-std=c++17", "-g1", "-Wall", "-Wextra", f"-I{build.ROOT / 'csrc'}", f"-I{CASES}"]
FLAGS += ["-Wno-psabi", "-Wno-maybe-uninitialized"]
WATCHED = build.SANITIZERS["asan"]
# the bytes of a register, and what makes the compiler use it
TARGETS = {
    "baseline": (16, []),
    "avx2": (32, ["-march=x86-64-v3"]),
    "avx512": (64, ["-march=x86-64-v4"]),
    "avx512_bf16": (64, ["-march=x86-64-v4", "-mavx512bf16"]),
}
# The sanitizers do not see what AMX's instructions read, so plain C++ stands for them.
TARGETS["amx_bf16"] = (
    64,
    [*TARGETS["avx512_bf16"][1], '-DEPSA_TILE_INSTRUCTIONS="emulated_tiles.inc"'],
)
# what the processor must have to run the program of an instruction set
NEEDED = {isa: isa for isa in TARGETS} | {"amx_bf16": "avx512_bf16"}


def isas_of(noun: str) -> list[str]:
    """The instruction sets that have kernels of their own."""
    return [isa for isa in ISAS if noun == "conv" or isa not in BFLOAT16_ALONE]


def clangs() -> list[str]:
    """The clang++ on PATH, newest first; skips the test where none is of version 16 or later."""
    names = [f"clang++-{version}" for version in range(30, 15, -1)]
    return list(filter(shutil.which, names)) or pytest.skip("no clang++-16 or newer on PATH")


def programs(noun: str, directory: Path, compiler: str = "g++") -> dict[str, Path]:
    """A program for each instruction set that runs here. noun: attention or conv."""
    if reason := build.missing("asan"):
        pytest.skip(reason)
    sources = [CPU / "isa.cpp", CPU / f"{noun}_plan.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        start = functools.partial(pool.submit, _object, compiler, directory)
        kernels = {}
        # these take the longest
        for isa in (isa for isa in isas_of(noun) if runs_here(NEEDED[isa])):
            size, march = TARGETS[isa]
            flags = [f"-DEPSA_CASES_{noun.upper()}", f"-DEPSA_VEC_BYTES={size}", *march]
            kernels[isa] = start(isa, CASES / "one_isa.cpp", [*WATCHED, *flags])
        # Only the kernels are watched: the table's own loops would take most of the time.
        shared = [start("table", CASES / f"{noun}_cases.cpp", ["-O2"])]
        shared += [start(source.stem, source, WATCHED) for source in sources]
    objects = [made.result() for made in shared]
    result = {}
    for isa, made in kernels.items():
        result[isa] = directory / f"{isa}_cases"
        _compile(compiler, *WATCHED, made.result(), *objects, "-o", result[isa])
    return result


def conversions(isa: str, directory: Path) -> Path:
    """The program that checks every conversion of 16-bit floats for an instruction set."""
    size, march = TARGETS[isa]
    program = directory / f"conversions_{isa}"
    flags = [*FLAGS, *march, "-O1", f"-DEPSA_VEC_BYTES={size}"]
    _compile("g++", *flags, CASES / "conversions.cpp", "-o", program)
    return program


def _object(compiler: str, directory: Path, name: str, source: Path, flags: list[str]) -> Path:
    out = directory / f"{name}.o"
    _compile(compiler, *FLAGS, *flags, "-c", source, "-o", out)
    return out


def _compile(compiler: str, *args: str | Path) -> None:
    result = subprocess.run([compiler, *map(str, args)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(result.stderr)


def run(programs: dict[str, Path], isa: str, monkeypatch) -> tuple[int, str]:
    """The cases that one program ran, all of them well, and the rest of its output."""
    if isa not in programs:
        pytest.skip(f"this machine's CPU has no {NEEDED[isa]}")
    monkeypatch.setenv("EPSA_CPU_ISA", isa)
    result = build.run(programs[isa], timeout=600)
    *rest, summary = result.stdout.splitlines() or [""]
    count = re.fullmatch(r"(\d+) cases, 0 failed", summary)
    assert count and result.returncode == 0, result.stdout[-5000:]
    return int(count[1]), "\n".join(rest)
