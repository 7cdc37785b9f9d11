"""The instruction sets of the CPU kernels, and which of them this machine runs."""

import functools
from pathlib import Path

from support.processes import python

from epsa_fused import _C


@functools.cache
def runs_here(isa: str) -> bool:
    """Whether the package agrees to use it; test_isa.py checks that it refuses rightly."""
    return isa_of_a_process(isa, check=False) == isa


def isa_of_a_process(wanted: str, check: bool = True) -> str:
    """Loads _C alone: the package would import torch, which takes seconds."""
    code = f"import sys; sys.path[:0] = [{str(Path(_C.__file__).parent)!r}]; import _C; "
    return python("-c", code + "print(_C.cpu_isa())", check=check, EPSA_CPU_ISA=wanted).strip()


def cpu_flags() -> set[str]:
    """What Linux says that the CPU can do; empty where it says nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


# x86-64-v3 and v4, by Linux's names (abm: lzcnt)
NEEDS = {"baseline": set(), "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}}
NEEDS["avx512"] = NEEDS["avx2"] | {f"avx512{part}" for part in ("f", "bw", "dq", "vl", "cd")}
NEEDS["avx512_bf16"] = NEEDS["avx512"] | {"avx512_bf16"}
NEEDS["amx_bf16"] = NEEDS["avx512_bf16"] | {"amx_bf16", "amx_tile"}
BFLOAT16_ALONE = ("avx512_bf16", "amx_bf16")  # the other dtypes run the kernels of avx512


def is_intel() -> bool:
    return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
