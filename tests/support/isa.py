"""The instruction sets of the CPU kernels, and which of them this machine runs."""

import functools
from pathlib import Path

from support.processes import python


@functools.cache
def runs_here(isa: str) -> bool:
    """Whether the package agrees to use it; the test below says that it refuses rightly."""
    output = python(
        "-c", "from epsa_fused import _C; print(_C.cpu_isa())", check=False, EPSA_CPU_ISA=isa
    )
    return output.strip() == isa


def cpu_flags() -> set[str]:
    """What Linux says that the CPU can do; empty where it says nothing."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split()}


# x86-64-v3 and v4, by Linux's names (abm: lzcnt)
NEEDS = {"baseline": set(), "avx2": {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm", "movbe"}}
NEEDS["avx512"] = NEEDS["avx2"] | {f"avx512{part}" for part in ("f", "bw", "dq", "vl", "cd")}
