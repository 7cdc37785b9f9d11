"""The CUDA kernels' own source, run on the CPU by the emulator (tests/simt).

It runs under the operator's tests, over the case table with and without sanitizers, and with
planted bugs. `make test` runs a part of each; the rest is marked slow.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from simt import broken, build
from support.processes import python, run_code

# ---- the operator's tests, against the emulated kernels ----


@pytest.fixture(scope="module")
def library(workshop) -> Path:
    """The operators, emulated, for torch.ops.load_library."""
    return workshop.path(build.Program("library"))


def run_tests(library: Path, marker: str, *plans: str) -> int:
    """The attention's tests, with each of the plans (conftest.py). Returns how many passed: all."""
    output = python(
        *("-m", "pytest", "-p", "no:cacheprovider", "-m", marker),
        *("tests/attention", "tests/test_autograd.py"),
        timeout=1800,
        CUDA_VISIBLE_DEVICES="",
        EPSA_TEST_EMULATED=str(library),
        EPSA_TEST_PLANS=" ".join(plans),
    )
    assert f"emulated CUDA kernels, plans {' '.join(plans)}" in output
    summary = output.splitlines()[-1]
    assert "skipped" not in summary
    return int(re.search(r"(\d+) passed", summary)[1])


def test_some_of_the_operators_tests_pass(library):
    plans = ("streaming/1/1", "chunks/0/0", "cluster4/2/0")
    assert run_tests(library, "emulated_quick", *plans) > 500


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [
        *("auto/3/0", "resident/4/2", "cluster2/5/3", "cluster4/6/0"),
        *("streaming/7/1", "streaming/8/0", "chunks/9/0"),
    ],
)
def test_all_of_the_operators_tests_pass(library, plan):
    assert run_tests(library, "emulated", plan) > 1300


@pytest.mark.slow
def test_random_calls_pass(library):
    plans = ("streaming/10/2", "cluster2/11/0", "chunks/0/1")
    assert run_tests(library, "emulated and random", *plans) == len(plans)


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
    """In both layouts and passes. float64 and maps that begin at an odd element are read singly."""
    output = run_code(VECTORS, LIBRARY=str(library), EPSA_SIMT_TRACE="1")
    vectors = [int(v) for v in re.findall(r"vectors of (\d+)", output)]
    expected = []
    for full in (4, 1, 8, 8):
        # Forward and backward: two of aligned maps, two of others.
        expected += [full, full, 1, 1] * 2
    assert vectors == expected


# ---- the case table ----

FIXED = "--mode resident --mode cluster2 --mode cluster4 --mode streaming --mode chunks"
FEW = "odd/ some_frozen/"  # the thread sanitizer has no time for more
TWO = "--dtype f32 --dtype bf16"

NATIVE = build.Program("cases")
FLOAT = {sanitizer: build.Program("cases", sanitizer, "float") for sanitizer in ("asan", "tsan")}
HALF = {
    sanitizer: build.Program("cases", sanitizer, "float,simt::bf16")
    for sanitizer in ("asan", "tsan")
}
# Program, arguments, the least number of cases. Kernels with sanitizers take long to compile:
# `make test` has them for float alone.
TABLES = {
    "native": (NATIVE, f"--quick {FIXED} --mode pair", 500),
    "asan": (FLOAT["asan"], f"--quick --dtype f32 {FIXED} --mode pair", 200),
    "tsan": (FLOAT["tsan"], f"--quick --dtype f32 {FIXED} {FEW}", 40),
    "tsan-pair": (FLOAT["tsan"], "--quick --dtype f32 --mode pair odd/", 4),
}
SLOW_TABLES = {
    "native-all": (NATIVE, f"{FIXED} --mode pair", 1000),
    "native-plans": (NATIVE, "--quick --seed 100 --mode auto --mode plans", 200),
    "asan-all": (
        HALF["asan"],
        f"--quick --seed 200 {FIXED} --mode auto --mode pair {TWO}",
        400,
    ),
    "tsan-all": (HALF["tsan"], f"--quick --seed 300 {FIXED} {TWO}", 300),
}


@pytest.mark.parametrize(
    ("program", "arguments", "least"),
    [
        *(pytest.param(*row, id=name) for name, row in TABLES.items()),
        *(pytest.param(*row, id=name, marks=pytest.mark.slow) for name, row in SLOW_TABLES.items()),
    ],
)
def test_case_table(built, arguments, least):
    result = build.run(built, *arguments.split(), timeout=1800)
    count = re.fullmatch(r"(\d+) cases, 0 failed", result.stdout.splitlines()[-1])
    assert count and result.returncode == 0, result.stdout[-5000:]
    assert int(count[1]) >= least


@pytest.mark.parametrize("program", [FLOAT["asan"]], ids=["float"])
def test_a_dtype_without_kernels_is_refused(built):
    result = build.run(built, "--quick", "--mode", "streaming", "--dtype", "bf16", "odd/")
    reports = result.stdout.splitlines()[:-1]
    assert len(reports) == 4 and result.returncode == 1
    for report in reports:
        assert "FAILED: epsa_fused: no CUDA kernels for elements of type 2" in report


# ---- planted bugs ----


@pytest.mark.parametrize(
    ("program", "bug", "report"),
    [
        pytest.param(
            build.Program(
                "cases", found_by if found_by in build.SANITIZERS else "", "float", bug=bug.name
            ),
            bug,
            report,
            id=f"{bug.name}-{found_by}",
            marks=() if bug.quick else pytest.mark.slow,
        )
        for bug in broken.BUGS
        for found_by, report in bug.found.items()
    ],
)
def test_planted_bugs_are_found(built, bug, report):
    result = build.run(built, "--quick", "--dtype", "f32", *bug.cases.split())
    assert re.search(report, result.stdout), result.stdout[-5000:]
    assert result.returncode != 0
