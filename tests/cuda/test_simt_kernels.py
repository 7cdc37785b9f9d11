"""The CUDA kernels' own source, run on the CPU by the emulator: under the operator's tests, over
the table of tests/simt/case_program.cpp with and without sanitizers, and with planted bugs.

`make test` runs a part of each; the rest is marked slow.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from simt import broken, build
from support.processes import python, run_code
from torch.utils.cpp_extension import include_paths

LAUNCH = build.HERE / "emulated_launch.cpp"
PROGRAM = build.HERE / "case_program.cpp"
PLANS = [build.HERE / "test_plans.cpp", build.ROOT / broken.PLAN]


class Workshop:
    """Compiles what is asked for, each object once."""

    def __init__(self, directory: Path):
        self.directory = directory

    def objects(self, sources, sanitizer="", *, suffix="", flags=(), **options) -> list[Path]:
        """`suffix` tells apart objects of one source."""
        pairs = [(s, self.directory / f"{s.stem}{suffix}{sanitizer}.o") for s in sources]
        new = [pair for pair in pairs if not pair[1].exists()]
        build.compile_objects(new, sanitizer, flags=["-fPIC", *flags], **options)
        return [made for _, made in pairs]

    def library(self) -> Path:
        """The operators under the CPU key, for torch.ops.load_library."""
        flags = [f"-I{build.HERE / 'shims'}", *(f"-isystem{path}" for path in include_paths())]
        sources = [build.HERE / "emulated_op.cpp", LAUNCH, build.EMULATOR, *PLANS]
        sources.append(build.ROOT / "csrc" / "ops" / "attention_checks.cpp")
        parts = self.objects(sources, flags=flags)
        torch_libraries = Path(torch.__file__).parent / "lib"
        parts += [torch_libraries / name for name in ("libtorch_cpu.so", "libc10.so")]
        return build.link(parts, self.directory / "emulated.so", shared=True)

    def program(self, sanitizer: str, types: str = "") -> Path:
        """The case program with kernels of some types, or all. Only the kernels are watched."""
        out = self.directory / f"cases-{sanitizer}-{types}"
        if not out.exists():
            flags = [f"-DEPSA_TYPES={types}"] if types else []
            parts = self.objects([LAUNCH], sanitizer, suffix=types, flags=flags)
            parts += self.objects([build.EMULATOR], sanitizer)
            parts += self.objects([PROGRAM, *PLANS])
            build.link(parts, out, sanitizer)
        return out

    def broken_program(self, bug: broken.Bug, sanitizer: str) -> Path:
        """The case program for float alone, with the bug in a copy of the sources."""
        root = self.directory / f"{bug.name}{sanitizer}"
        for part in ("csrc", "tests/simt"):
            shutil.copytree(build.ROOT / part, root / part)
        bug.plant(root)
        changed = [root / LAUNCH.relative_to(build.ROOT), root / broken.PLAN]
        flags = ["-DEPSA_TYPES=float"]
        parts = self.objects(changed, sanitizer, suffix=bug.name, root=root, flags=flags)
        parts += self.objects([build.EMULATOR], sanitizer) + self.objects([PROGRAM, PLANS[0]])
        return build.link(parts, root / "cases", sanitizer)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory) -> Workshop:
    if reason := build.missing():
        pytest.skip(reason)
    return Workshop(tmp_path_factory.mktemp("simt"))


def need(sanitizer: str) -> None:
    if reason := build.missing(sanitizer):
        pytest.skip(reason)


# ---- the operator's tests, against the emulated kernels ----


@pytest.fixture(scope="module")
def library(workshop) -> Path:
    return workshop.library()


def run_tests(library: Path, arguments: list[str], plan: str, seed: int, resident: int) -> int:
    """Runs pytest against the emulated kernels; how many tests passed, and none did not."""
    output = python(
        *("-m", "pytest", "-p", "no:cacheprovider", *arguments),
        timeout=1800,
        CUDA_VISIBLE_DEVICES="",
        EPSA_TEST_EMULATED=str(library),
        EPSA_SIMT_MODE=plan,
        EPSA_SIMT_SEED=str(seed),
        EPSA_SIMT_RESIDENT=str(resident),
    )
    assert f"emulated CUDA kernels, plan {plan}" in output
    summary = output.splitlines()[-1]
    assert "skipped" not in summary
    return int(re.search(r"(\d+) passed", summary)[1])


FILES = [f"tests/attention/test_{name}.py" for name in ("forward", "backward", "autograd")]
QUICK = (
    "test_every_shape and (odd or branches_5) or test_every_layout and not_square"
    " or test_any_subset or test_output_mask or test_gradcheck and not every_kind"
)


# plan, seed of the order of blocks and threads (0: in order), the most resident blocks
@pytest.mark.parametrize(
    ("plan", "seed", "resident"), [("streaming", 1, 1), ("chunks", 0, 0), ("cluster4", 2, 0)]
)
def test_some_of_the_operators_tests_pass(library, plan, seed, resident):
    assert run_tests(library, [*FILES, "-k", QUICK], plan, seed, resident) > 150


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "seed", "resident"),
    [
        ("auto", 3, 0),
        ("resident", 4, 2),
        ("cluster2", 5, 3),
        ("cluster4", 6, 0),
        ("streaming", 7, 1),
        ("streaming", 8, 0),
        ("chunks", 9, 0),
    ],
)
def test_all_of_the_operators_tests_pass(library, plan, seed, resident):
    assert run_tests(library, FILES, plan, seed, resident) > 1300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "seed", "resident"), [("streaming", 10, 2), ("cluster2", 11, 0), ("chunks", 0, 1)]
)
def test_random_calls_pass(library, plan, seed, resident):
    # The other property is about threads of the CPU, of which the emulator has one.
    arguments = ["tests/attention/test_properties.py", "-k", "agrees_with_the_reference"]
    assert run_tests(library, arguments, plan, seed, resident) == 1


VECTORS = """
import os, torch, epsa_fused
torch.ops.load_library(os.environ["LIBRARY"])
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for layout in (torch.contiguous_format, torch.channels_last):
        for offset in (0, 1):
            feats = []
            for s in range(2):
                memory = torch.randn(2 * 8 * 4 * 4 + offset, dtype=dtype)[offset:]
                f = memory.view(2, 8, 4, 4)
                if layout == torch.channels_last:
                    f = memory.view(2, 4, 4, 8).permute(0, 3, 1, 2)
                feats.append(f.requires_grad_())
            fc1, fc2 = torch.randn(2, 8, dtype=dtype), torch.randn(8, 2, dtype=dtype)
            out = epsa_fused.psa_attention(feats, fc1, None, fc2, None)
            out.backward(torch.randn_like(out))
"""


def test_aligned_maps_are_read_by_16_bytes(library):
    """In both layouts and passes; maps from an odd element on, and float64, one by one."""
    output = run_code(VECTORS, LIBRARY=str(library), EPSA_SIMT_TRACE="1")
    vectors = [int(v) for v in re.findall(r"vectors of (\d+)", output)]
    expected = []
    for full in (4, 1, 8, 8):
        # forward and backward, of aligned maps and then of others
        expected += [full, full, 1, 1] * 2
    assert vectors == expected


# ---- the case table ----

FIXED = "--mode resident --mode cluster2 --mode cluster4 --mode streaming --mode chunks"
FEW = "odd/ some_frozen/"  # what the thread sanitizer has time for
HALF = "float,simt::bf16"
TWO = "--dtype f32 --dtype bf16"
# Sanitizer, types of the kernels, arguments, how many cases there are at least. `make test` looks
# at float alone with sanitizers, which take long to compile.
TABLES = {
    "native": ("", "", f"--quick {FIXED} --mode pair", 500),
    "asan": ("asan", "float", f"--quick --dtype f32 {FIXED} --mode pair", 200),
    "tsan": ("tsan", "float", f"--quick --dtype f32 {FIXED} {FEW}", 40),
    "tsan-pair": ("tsan", "float", "--quick --dtype f32 --mode pair odd/", 4),
}
SLOW_TABLES = {
    "native-all": ("", "", f"{FIXED} --mode pair", 1000),
    "native-plans": ("", "", "--quick --seed 100 --mode auto --mode plans", 200),
    "asan-all": ("asan", HALF, f"--quick --seed 200 {FIXED} --mode auto --mode pair {TWO}", 400),
    "tsan-all": ("tsan", HALF, f"--quick --seed 300 {FIXED} {TWO}", 300),
}


@pytest.mark.parametrize(
    ("sanitizer", "types", "arguments", "least"),
    [
        *(pytest.param(*row, id=name) for name, row in TABLES.items()),
        *(pytest.param(*row, id=name, marks=pytest.mark.slow) for name, row in SLOW_TABLES.items()),
    ],
)
def test_case_table(workshop, sanitizer, types, arguments, least):
    need(sanitizer)
    result = build.run(workshop.program(sanitizer, types), *arguments.split(), timeout=1800)
    count = re.fullmatch(r"(\d+) cases, 0 failed", result.stdout.splitlines()[-1])
    assert count and result.returncode == 0, result.stdout[-5000:]
    assert int(count[1]) >= least


# ---- planted bugs ----


@pytest.mark.parametrize(
    ("bug", "found_by"),
    [
        pytest.param(
            bug,
            found_by,
            id=f"{bug.name}-{found_by}",
            marks=() if bug.quick else pytest.mark.slow,
        )
        for bug, found_by in broken.builds()
    ],
)
def test_planted_bugs_are_found(workshop, bug, found_by):
    sanitizer = found_by if found_by in build.SANITIZERS else ""
    need(sanitizer)
    program = workshop.broken_program(bug, sanitizer)
    result = build.run(program, "--quick", "--dtype", "f32", *bug.cases.split())
    assert re.search(bug.found[found_by], result.stdout), result.stdout[-5000:]
    assert result.returncode != 0
