"""The CUDA kernels as nvcc compiles them, without a GPU: no spills, no stack, registers within what
the plan counts on, accesses of 128 bits; and the code around them against the installed torch."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
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

# Compiling for one architecture takes one core one to four minutes.
ARCHITECTURES = [
    pytest.param((80, 90), id="sm_80,sm_90"),
    pytest.param((100, 120), id="sm_100,sm_120", marks=pytest.mark.slow),
]

# plan.cpp counts on 1024 threads of 64 registers on a multiprocessor, or half of it in double
REGISTERS = {"f32": 64, "bf16": 64, "f16": 64, "f64": 128}
VECTORS = {"f32": (1, 4), "bf16": (1, 8), "f16": (1, 8), "f64": (1,)}
TYPES = {"f": "f32", "d": "f64", "13__nv_bfloat16": "bf16", "6__half": "f16"}


@dataclass(frozen=True)
class Kernel:
    name: str
    dtype: str
    vector: int
    channels_last: bool

    @staticmethod
    def of(symbol: str) -> Kernel:
        """From the linker's name of name<T, V, kLast>(Params)."""
        match = re.fullmatch(
            r"_ZN4epsa4cuda\d+([a-z_]+)I(\w+?)Li(\d)ELb([01])EEEvNS0_6ParamsE", symbol
        )
        assert match, f"an unknown kernel: {symbol}"
        name, dtype, vector, last = match.groups()
        return Kernel(name, TYPES[dtype], int(vector), last == "1")


KERNELS = {
    Kernel(f"{pass_}_{variant}", dtype, vector, last)
    for pass_, variant, dtype, last in itertools.product(
        ("forward", "backward"), ("resident", "streaming"), VECTORS, (False, True)
    )
    for vector in VECTORS[dtype]
}


@dataclass(frozen=True)
class Build:
    architectures: tuple[int, ...]
    log: str  # ptxas -v
    folder: Path  # holds a cubin for each architecture


@pytest.fixture(scope="module", params=ARCHITECTURES)
def build(request, tmp_path_factory) -> Build:
    """launch.cu, compiled as setup.py does."""
    architectures = request.param
    known = cuda_toolkit.run(NVCC, "--list-gpu-arch").split()
    for arch in architectures:
        if f"compute_{arch}" not in known:
            pytest.skip(f"{NVCC} does not know compute_{arch}")
    folder = tmp_path_factory.mktemp("cuda")
    log = cuda_toolkit.run(
        NVCC,
        *("-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-Xptxas", "-v", "-c", CUDA / "launch.cu"),
        *("-o", folder / "launch.o", "--keep", "--keep-dir", folder),
        *("--threads", len(architectures)),
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures),
    )
    return Build(architectures, log, folder)


@needs_nvcc
def test_no_kernel_spills_or_has_more_registers_than_planned(build):
    found = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'\n.*\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        build.log,
    )
    wrong = []
    for arch in build.architectures:
        kernels = {Kernel.of(symbol): rest for symbol, sm, *rest in found if int(sm) == arch}
        assert kernels.keys() == KERNELS
        for kernel, (stack, stores, loads, registers) in kernels.items():
            if (stack, stores, loads) != ("0", "0", "0") or int(registers) > REGISTERS[
                kernel.dtype
            ]:
                wrong.append(
                    f"sm_{arch} {kernel}: {stack} bytes of stack, {stores} + {loads} bytes "
                    f"spilled, {registers} registers"
                )
    assert not wrong, "\n".join(wrong)
    assert "warning" not in build.log, build.log


def instructions(cubin: Path) -> dict[Kernel, list[str]]:
    """Each kernel's instructions, without their predicates, and its labels."""
    tool = cuda_toolkit.find("nvdisasm")
    if tool is None:
        pytest.skip(
            "no nvdisasm in CUDA_HOME/bin, /usr/local/cuda/bin or PATH, nor from "
            "`pip install nvidia-cuda-nvdisasm`"
        )
    text = cuda_toolkit.run(tool, "--print-code", "--no-dataflow", cubin)
    sections = re.split(r"^\t\.section\t\.text\.(\w+),.*$", text, flags=re.MULTILINE)[1:]
    line = re.compile(r"^(\.L_.*):|\*/ +(?:@!?U?P\w+ +)?([A-Z].*?) *;", re.MULTILINE)
    return {
        Kernel.of(symbol): [label or text for label, text in line.findall(code)]
        for symbol, code in zip(sections[::2], sections[1::2], strict=True)
    }


def loads_in_flight(code: list[str]) -> int:
    """The most loads of 128 bits from device memory that are issued before the first of them is
    used, a label or a branch comes."""
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


@needs_nvcc
def test_aligned_kernels_access_128_bits(build):
    """Of device memory: read, copied to shared memory, written. Unaligned ones never do."""
    for arch in build.architectures:
        (cubin,) = build.folder.glob(f"*_{arch}.cubin")
        found = instructions(cubin)
        assert found.keys() == KERNELS
        for kernel, code in found.items():
            names = {text.split()[0] for text in code}
            wide = {name.split(".")[0] for name in names if name.endswith(".128")}
            expected = set()
            if kernel.vector > 1:
                resident, backward = "resident" in kernel.name, "backward" in kernel.name
                expected |= {"STG"}
                expected |= {"LDGSTS"} if resident else {"LDG"}
                expected |= {"LDG"} if backward else set()
            assert wide & {"LDG", "STG", "LDGSTS"} == expected, f"sm_{arch} {kernel}"


@needs_nvcc
def test_the_sums_wait_for_several_loads_at_once(build):
    """1024 threads with one load of 16 bytes each are less than a multiprocessor must have under
    way to use its share of the memory's speed."""
    for arch in build.architectures:
        (cubin,) = build.folder.glob(f"*_{arch}.cubin")
        for kernel, code in instructions(cubin).items():
            # One turn of streaming has two by itself: x and y, or those of the scaling. From
            # sm_100 on ptxas begins to add a little earlier.
            least = 3 if "streaming" in kernel.name and arch < 100 else 2
            if kernel.vector > 1 and kernel.name != "forward_resident":
                assert loads_in_flight(code) >= least, f"sm_{arch} {kernel}"


@needs_nvcc
@pytest.mark.parametrize(
    "program", ["benchmarks/plans.cu", "tests/simt/case_program.cpp", "tests/simt/test_plans.cpp"]
)
def test_the_programs_for_a_gpu_compile(program, tmp_path):
    """They need no torch, and a GPU only to run."""
    log = cuda_toolkit.run(
        *(NVCC, "-std=c++20", f"-I{ROOT / 'csrc'}", "-arch=sm_90", "-Xcompiler=-Wall", "-c"),
        *("-o", tmp_path / "program.o", CUDA.parent.parent / program),
    )
    assert "warning" not in log, log


@needs_nvcc
def test_the_glue_compiles_against_the_installed_torch():
    """By the host's compiler, which needs the toolkit's headers alone; a torch for CPUs lacks the
    file that says how its CUDA half was built."""
    include = Path(NVCC).resolve().parent.parent / "include"
    cuda_toolkit.run(
        *("c++", "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"),
        f"-I{ROOT / 'csrc'}",
        *(f"-isystem{path}" for path in (*cpp_extension.include_paths(), include)),
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
        CUDA / "attention.cpp",
    )
