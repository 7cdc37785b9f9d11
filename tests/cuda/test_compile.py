"""The CUDA kernels as nvcc compiles them, without a GPU.

No kernel spills or uses the stack; its registers stay within the plan's limit; its accesses have
128 bits. The code around the kernels compiles against the installed torch.
"""

from __future__ import annotations

import itertools
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
from support import cuda_toolkit
from support.paths import ROOT
from torch.utils import cpp_extension

CUDA = ROOT / "csrc" / "cuda"
NVCC = cuda_toolkit.find("nvcc")
needs_nvcc = pytest.mark.skipif(
    NVCC is None, reason="no nvcc in CUDA_HOME/bin, /usr/local/cuda/bin or PATH"
)

# The element types of the kernels that are compiled, by architecture. All of them take one core a
# minute per architecture. `make test` leaves out f16, whose kernels are those of bf16 with other
# conversions. On sm_80 it compiles bf16 alone: its vectors hold the most elements.
QUICK = {80: "simt::bf16", 90: "float, double, simt::bf16"}
ALL = dict.fromkeys((80, 90, 100, 110, 120), "float, double, simt::bf16, simt::f16")
BUILDS = [
    pytest.param(QUICK, id="quick"),
    pytest.param(ALL, id="all", marks=pytest.mark.slow),
]

# plan.h counts on 1024 threads of 64 registers on a multiprocessor, for double on half as many.
REGISTERS = {"f32": 64, "bf16": 64, "f16": 64, "f64": 128}
VECTORS = {"f32": (1, 4), "bf16": (1, 8), "f16": (1, 8), "f64": (1,)}
TYPES = {"f": "f32", "d": "f64", "13__nv_bfloat16": "bf16", "6__half": "f16"}


@dataclass(frozen=True)
class Kernel:
    name: str
    dtype: str
    vector: int
    channels_last: bool
    epilogue: bool = False

    @staticmethod
    def of(symbol: str) -> Kernel:
        """From the linker's name of name<T, V, kLast>(Params), forward also with kEpilogue."""
        match = re.fullmatch(
            r"_ZN4epsa4cuda\d+([a-z_]+)I(\w+?)Li(\d)ELb([01])E(?:Lb([01])E)?EEvNS0_6ParamsE", symbol
        )
        assert match, f"an unknown kernel: {symbol}"
        name, dtype, vector, last, epilogue = match.groups()
        return Kernel(name, TYPES[dtype], int(vector), last == "1", epilogue == "1")


def kernels_of(types: str) -> set[Kernel]:
    """The kernels of a list of element types in C++."""
    names = {"float": "f32", "double": "f64", "simt::bf16": "bf16", "simt::f16": "f16"}
    return {
        Kernel(f"{pass_}_{variant}", dtype, vector, last, epilogue)
        for (pass_, epilogue), variant, dtype, last in itertools.product(
            (("forward", False), ("forward", True), ("backward", False)),
            ("resident", "streaming"),
            [names[name] for name in types.split(", ")],
            (False, True),
        )
        for vector in VECTORS[dtype]
    }


@dataclass(frozen=True)
class Build:
    arch: int
    kernels: set[Kernel]  # that it must hold
    log: str  # of ptxas -v
    cubin: Path

    @cached_property
    def instructions(self) -> dict[Kernel, list[str]]:
        """Each kernel's instructions, without their predicates, and its labels."""
        tool = cuda_toolkit.find("nvdisasm")
        if tool is None:
            pytest.skip(
                "no nvdisasm in CUDA_HOME/bin, /usr/local/cuda/bin or PATH, nor from "
                "`pip install nvidia-cuda-nvdisasm`"
            )
        text = cuda_toolkit.run(tool, "--print-code", "--no-dataflow", self.cubin)
        sections = re.split(r"^\t\.section\t\.text\.(\w+),.*$", text, flags=re.MULTILINE)[1:]
        line = re.compile(r"^(\.L_.*):|\*/ +(?:@!?U?P\w+ +)?([A-Z].*?) *;", re.MULTILINE)
        return {
            Kernel.of(symbol): [label or text for label, text in line.findall(code)]
            for symbol, code in zip(sections[::2], sections[1::2], strict=True)
        }


def compiled(arch: int, types: str, folder: Path) -> Build:
    """The device's half of launch.cu, with setup.py's options."""
    cubin = folder / f"launch_{arch}.cubin"
    source = folder / f"launch_{arch}.cu"  # nvcc's -D takes no value with a comma
    source.write_text(f'#define EPSA_TYPES {types}\n#include "cuda/launch.cu"\n')
    log = cuda_toolkit.run(
        *(NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"),
        *(f"-arch=sm_{arch}", "-cubin", "-o", cubin, source),
    )
    return Build(arch, kernels_of(types), log, cubin)


@pytest.fixture(scope="module", params=BUILDS)
def builds(request, tmp_path_factory) -> list[Build]:
    known = cuda_toolkit.run(NVCC, "--list-gpu-arch").split()
    rows = {arch: types for arch, types in request.param.items() if f"compute_{arch}" in known}
    if unknown := request.param.keys() - rows.keys():
        warnings.warn(
            f"not compiled for {sorted(unknown)}, which {NVCC} does not know", stacklevel=1
        )
    assert rows, f"{NVCC} knows none of {sorted(unknown)}, but {known}"
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda row: compiled(*row, folder), rows.items()))


@needs_nvcc
def test_no_kernel_spills_or_has_more_registers_than_planned(builds):
    wrong = []
    for build in builds:
        found = re.findall(
            r"Compiling entry function '(\w+)' for 'sm_\d+'\n.*\n"
            r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
            r".*Used (\d+) registers",
            build.log,
        )
        kernels = {Kernel.of(symbol): rest for symbol, *rest in found}
        assert kernels.keys() == build.kernels
        for kernel, (*spills, registers) in kernels.items():
            if spills != ["0", "0", "0"] or int(registers) > REGISTERS[kernel.dtype]:
                stack, stores, loads = spills
                wrong.append(
                    f"sm_{build.arch} {kernel}: {stack} bytes of stack, {stores} + {loads} bytes "
                    f"spilled, {registers} registers"
                )
        assert "warning" not in build.log, build.log
    assert not wrong, "\n".join(wrong)


def loads_in_flight(code: list[str]) -> int:
    """The most loads of 128 bits from device memory in a row: no use, label or branch between."""
    most, awaited, flight = 0, set(), 0
    for text in code:
        name, _, operands = text.partition(" ")
        used = {int(r) for r in re.findall(r"\bR(\d+)\b", operands)}
        load = name.startswith("LDG.") and name.endswith(".128")
        target = int(re.match(r"R(\d+)", operands)[1]) if load else None
        addresses = used - {target} if load else used
        if name.startswith((".L", "BRA", "EXIT")) or addresses & awaited:
            awaited, flight = set(), 0
        if load:
            awaited |= set(range(target, target + 4))
            flight += 1
            most = max(most, flight)
    return most


CONVOLUTIONS = """
#include "cuda/conv.cuh"
namespace epsa::cuda {{
template __global__ void convolve_tile<simt::bf16, {large}>(const __grid_constant__ ConvParams);
template __global__ void pack_weights<simt::bf16>(const __grid_constant__ ConvParams);
}}
"""
CONV_BUILDS = [
    pytest.param(arch, large, marks=[] if (arch, large) == (90, "false") else pytest.mark.slow)
    for arch in (80, 90, 100, 110, 120)
    for large in ("false", "true")
]


@needs_nvcc
@pytest.mark.parametrize(("arch", "large"), CONV_BUILDS)
def test_the_convolutions_do_not_spill(arch, large, tmp_path):
    """The launch bounds give the small kernel 128 registers, so that two of its blocks fit."""
    source = tmp_path / "convolutions.cu"
    source.write_text(CONVOLUTIONS.format(large=large))
    log = cuda_toolkit.run(
        *(NVCC, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v"),
        *(f"-arch=sm_{arch}", "-cubin", "-o", tmp_path / "convolutions.cubin", source),
    )
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", log)
    assert frames == [("0", "0")] * 2
    most = 170 if large == "true" else 128
    assert all(int(registers) <= most for registers in re.findall(r"Used (\d+) registers", log))


@needs_nvcc
def test_aligned_kernels_access_128_bits(builds):
    """They read, copy to shared memory and write so. Unaligned kernels never access maps so. Each
    backward kernel reads the groups' sums by 128 bits; a resident one copies the vectors of a
    group's samples so."""
    for build in builds:
        assert build.instructions.keys() == build.kernels
        for kernel, code in build.instructions.items():
            names = {text.split()[0] for text in code}
            wide = {name.split(".")[0] for name in names if name.endswith(".128")}
            expected = {"LDG"} if "backward" in kernel.name else set()
            expected |= {"LDGSTS"} if kernel.name == "backward_resident" else set()
            if kernel.vector > 1:
                expected |= {"STG"}
                expected |= {"LDGSTS"} if "resident" in kernel.name else {"LDG"}
            assert wide & {"LDG", "STG", "LDGSTS"} == expected, f"sm_{build.arch} {kernel}"


@needs_nvcc
def test_the_sums_wait_for_several_loads_at_once(builds):
    """One load of 16 bytes in each of 1024 threads is too little to keep the memory busy."""
    for build in builds:
        for kernel, code in build.instructions.items():
            # A single turn of streaming has two loads: x and y, or the two of the scaling. From
            # sm_100 on, ptxas begins to add a little earlier.
            least = 3 if "streaming" in kernel.name and build.arch < 100 else 2
            if kernel.vector > 1 and kernel.name != "forward_resident":
                assert loads_in_flight(code) >= least, f"sm_{build.arch} {kernel}"


@needs_nvcc
def test_results_of_streaming_leave_the_cache_first(builds):
    """Its maps are read twice. Resident kernels read them once and write as usual."""
    for build in builds:
        for kernel, code in build.instructions.items():
            writes = {name for name in (text.split()[0] for text in code) if "STG" in name}
            wide = {name for name in writes if name.endswith(".128")}
            if kernel.vector > 1:
                first = {name for name in wide if ".EF." in name}
                expected = wide if "streaming" in kernel.name else set()
                assert wide and first == expected, f"sm_{build.arch} {kernel}: {wide}"


@needs_nvcc
def test_the_timing_of_the_plans_compiles(tmp_path):
    log = cuda_toolkit.run(
        *(NVCC, "-std=c++17", f"-I{ROOT / 'csrc'}", "-arch=sm_90", "-Xcompiler=-Wall", "-c"),
        *("-o", tmp_path / "program.o", ROOT / "benchmarks" / "plans.cu"),
    )
    assert "warning" not in log, log


def complaints_of_the_compiler(*arguments: str | Path) -> str:
    """What the host's compiler says of host code, against the toolkit's headers."""
    include = Path(NVCC).resolve().parent.parent / "include"
    return cuda_toolkit.run(
        *("c++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"),
        *(f"-I{ROOT / 'csrc'}", f"-isystem{include}", *arguments),
    )


@needs_nvcc
def test_the_case_program_compiles_for_a_gpu():
    simt = ROOT / "tests" / "simt"
    sources = (*(simt / "cases").glob("*.cpp"), simt / "test_plans.cpp")
    assert complaints_of_the_compiler(f"-I{simt}", *sources) == ""


@needs_nvcc
def test_the_glue_compiles_against_the_installed_torch():
    flags = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    # A torch for CPUs lacks the file that says how its CUDA half was built.
    flags += ["-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE"]
    assert complaints_of_the_compiler(*flags, CUDA / "attention.cpp") == ""
