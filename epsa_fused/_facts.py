"""Facts about the build and the machine, by name: for the self-check, and for bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path

import torch

from . import _C, __version__
from ._checks import first_line

# The kernels are chosen by these, and by names that begin with avx or amx.
FLAGS = ("abm", "bmi1", "bmi2", "f16c", "fma", "movbe", "asimd", "asimdhp", "bf16", "sve")
VARIABLES = ("EPSA_", "OMP_", "GOMP_", "KMP_", "CUDA_", "TORCH_")


def short() -> dict[str, str]:
    info, others = _C.build_info(), _others()
    hint = "programs elsewhere may take it; `pip uninstall epsa_fused` removes what pip installed"
    return {
        "epsa_fused": f"{__version__} in {Path(__file__).parent}",
        **({"also found": f"{', '.join(others)}: {hint}"} if others else {}),
        "built with": f"torch {info['torch']}, compiler {info['compiler']}",
        "running with": f"torch {torch.__version__}, Python {sys.version.split()[0]}",
        "CPU kernels": f"{', '.join(info['cpu_isas'])}; this machine uses {_C.cpu_isa()}",
        "CPU threads": f"{torch.get_num_threads()} (OpenMP {info['openmp']})",
        "CUDA kernels": "built" if info["cuda"] else "not built",
        "CUDA devices": _devices(),
    }


def _others() -> list[str]:
    """The folders of other copies that Python's path names, such as a wheel's beside a clone."""
    found = (Path(folder, "epsa_fused").resolve() for folder in sys.path)
    here = Path(__file__).resolve().parent
    copies = {str(copy) for copy in found if copy != here and (copy / "__init__.py").exists()}
    return sorted(copies)


def _devices() -> str:
    try:
        names = [
            "{} (sm_{}{})".format(
                torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i)
            )
            for i in range(torch.cuda.device_count())
        ]
    except Exception as error:  # a driver that is too old, say; the report is for such cases
        return f"cannot be asked: {first_line(error)}"
    return ", ".join(names) or "none found"


def report() -> dict[str, str]:
    cpu = _cpu()
    flags = (cpu.get("flags") or cpu.get("Features") or "").split()
    variables = {k: v for k, v in os.environ.items() if k.startswith(VARIABLES)}
    return short() | {
        "installed as": ", ".join(_installed()) or "nothing that pip knows",
        "Python": f"{platform.python_implementation()} {sys.version} in {sys.prefix}",
        "system": f"{platform.platform()}, {' '.join(platform.libc_ver()).strip() or 'no glibc'}",
        "CPU": f"{cpu.get('model name', platform.machine())}, {os.cpu_count()} logical processors",
        "CPU flags": " ".join(f for f in flags if f in FLAGS or f.startswith(("avx", "amx"))),
        "CUDA of torch": torch.version.cuda or "none",
        "variables": " ".join(f"{k}={v}" for k, v in sorted(variables.items())) or "none",
    }


def _cpu() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _installed() -> list[str]:
    """Versions and places of every installation that this Python finds, the first one wins."""
    found = importlib.metadata.distributions(name="epsa_fused")
    # a folder may be on the path twice
    return list(dict.fromkeys(f"{one.version} in {one.locate_file('')}" for one in found))
