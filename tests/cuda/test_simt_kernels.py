"""The CUDA kernels' own source, run on the CPU by the emulator (tests/simt).

It runs under the operator's tests, over the case table with and without sanitizers, and with
planted bugs. `make test` runs a part of each; the rest is marked slow.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from simt import broken, build
from support.paths import ROOT
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


# ---- the convolutions ----

CHECK = """
import os, torch, epsa_fused
import torch.nn.functional as F
torch.ops.load_library(os.environ["LIBRARY"])
BOUNDS = {torch.bfloat16: 4e-3, torch.float16: 5e-4}  # an output is rounded once

def make(N, C, H, W, dtype, kernels, groups, layout):
    torch.manual_seed(1)
    x = torch.randn(N, C, H, W).to(dtype).contiguous(memory_format=layout)
    weights = [
        (torch.randn(C // 4, C // g, k, k) / (C // g * k * k) ** 0.5).to(dtype)
        for k, g in zip(kernels, groups)
    ]
    return x, weights

def check(N, C, H, W, dtype=torch.bfloat16, kernels=(3, 5, 7, 9), groups=(1, 4, 8, 16),
          layout=torch.channels_last, stride=1, change=lambda x: x, with_bias=True):
    x, weights = make(N, C, H, W, dtype, kernels, groups, layout)
    x = change(x)
    # weights as channels_last models hold them, too
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    weights[-1] = weights[-1].contiguous(memory_format=torch.channels_last)
    padding = [k // 2 for k in kernels]
    # So large that rounding before the bias is added would be seen. It lies between other elements.
    bias = 4 * torch.randn(len(groups) * (C // 4), 2).to(dtype)[:, 0] if with_bias else None
    feats, pooled = torch.ops.epsa_fused.spc_conv(
        x, weights, groups, stride, padding, [1] * len(groups), bias=bias
    )
    biases = bias.double().chunk(len(groups)) if with_bias else [None] * len(groups)
    for f, w, b, k, g, p in zip(feats, weights, biases, kernels, groups, pooled.unbind(1)):
        exact = F.conv2d(x.double(), w.double(), b, stride, k // 2, 1, g)
        assert f.dtype == dtype and f.is_contiguous(memory_format=layout)
        error = ((f.double() - exact).abs() / (exact.abs() + 1)).max().item()
        assert error < BOUNDS[dtype], (C, k, g, error)
        torch.testing.assert_close(p, f.float().mean((2, 3)))
"""


def conv_plans(library, code: str, **environment: str) -> list[str]:
    """Runs the code after the checks' definitions. The plans that the kernel took."""
    output = run_code(
        CHECK + code,
        LIBRARY=str(library),
        EPSA_SIMT_CONVOLUTIONS="1",
        EPSA_SIMT_TRACE="1",
        **environment,
    )
    return re.findall(r"plan: (tiles .*)", output)


def test_the_maps_of_convolutions(library):
    """Groups of 4 to 256 channels, a pixel, lines that fill no tile, both layouts."""
    small = """
check(2, 64, 10, 9)
check(1, 64, 9, 30, torch.float16)
check(3, 128, 7, 8)
check(2, 64, 1, 1, with_bias=False)
check(1, 64, 3, 70, torch.bfloat16, (9, 5), (16, 16))
check(1, 64, 9, 8, layout=torch.contiguous_format)
"""
    large = """
check(1, 256, 14, 14)
check(2, 512, 7, 7)
check(1, 1024, 4, 4)
check(1, 64, 6, 6, torch.bfloat16, (7, 9), (4, 4))
check(1, 64, 5, 6, torch.bfloat16, (5, 7), (1, 1))
check(1, 128, 5, 6, torch.float16, (5, 9, 9), (16, 2, 4))
"""
    for calls, kernel in ((small, "large 0"), (large, "large 1")):
        found = conv_plans(library, calls)
        assert len(found) == 6 and all(plan.endswith(kernel) for plan in found)


@pytest.mark.parametrize("count", ("1", "132"))
def test_convolutions_of_an_odd_number_of_groups(library, count):
    """No slab is cut, on a device that prefers large ones, too. The rest is PyTorch's."""
    code = """
check(1, 96, 5, 30, kernels=(5, 7, 9), groups=(6, 12, 24))
check(1, 48, 7, 8, kernels=(5, 7), groups=(3, 12))
check(1, 128, 6, 6, kernels=(5, 7), groups=(2, 32))
check(2, 24, 5, 6, kernels=(5, 7), groups=(6, 3))
check(2, 20, 5, 6, kernels=(5, 9), groups=(5, 5))
check(2, 36, 5, 6, kernels=(5, 9), groups=(9, 9))
"""
    found = conv_plans(library, code, EPSA_SIMT_MULTIPROCESSORS=count)
    slabs = [int(re.search(r"slabs of (\d+)", plan)[1]) for plan in found]
    assert len(slabs) == 3
    assert all(channels % slab == 0 for channels, slab in zip((96, 48, 128), slabs, strict=True))


def test_convolutions_of_views(library):
    """A sample of a batch, an odd address, and a slice of the channels."""
    code = """
last = torch.channels_last
def odd(x):
    memory = x.new_empty(x.numel() + 1)[1:].view(1, 8, 9, 64)
    return memory.permute(0, 3, 1, 2).copy_(x)
check(1, 64, 8, 9, change=lambda x: torch.cat([x, x])[1:], layout=torch.contiguous_format)
check(1, 64, 8, 9, change=odd)
check(1, 64, 8, 9, change=lambda x: torch.cat([x, x], 1).contiguous(memory_format=last)[:, :64])
"""
    assert len(conv_plans(library, code)) == 3


def test_convolutions_in_random_order(library):
    code = "check(1, 64, 8, 9); check(1, 256, 7, 7)"
    assert len(conv_plans(library, code, EPSA_SIMT_SEED="3")) == 2


def test_a_large_device_gets_small_tiles(library):
    few, many = (
        conv_plans(library, "check(1, 64, 14, 16)", EPSA_SIMT_MULTIPROCESSORS=count)[0]
        for count in ("1", "132")
    )
    blocks = [int(re.search(r"(\d+) blocks", plan)[1]) for plan in (few, many)]
    assert blocks[0] < blocks[1]


def test_pytorch_computes_the_other_branches(library):
    code = """
check(1, 64, 9, 8, stride=2)
check(1, 64, 9, 8, kernels=(3, 3), groups=(1, 4))
check(1, 96, 9, 8, kernels=(5, 7), groups=(4, 8))  # no powers of two
"""
    assert conv_plans(library, code) == []


def test_gradients_of_convolutions_and_the_module(library):
    """With gradients the operator runs the same kernels; PyTorch computes the gradients."""
    code = """
from epsa_fused import FusedPSAModule, PSAModule
torch.manual_seed(0)
fused = FusedPSAModule(64, 64).bfloat16().to(memory_format=torch.channels_last)
plain = PSAModule(64, 64).double()
plain.load_state_dict(fused.state_dict())
x = torch.randn(2, 64, 6, 7).bfloat16().contiguous(memory_format=torch.channels_last)
a, b = x.clone().requires_grad_(), x.double().requires_grad_()
out, exact = fused(a), plain(b)
assert out.is_contiguous(memory_format=torch.channels_last)
torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-2)
grad = torch.randn_like(exact)
out.backward(grad.bfloat16())
exact.backward(grad.bfloat16().double())
torch.testing.assert_close(a.grad.double(), b.grad, atol=3e-2, rtol=3e-2)
for p, q in zip(fused.parameters(), plain.parameters()):
    scale = q.grad.abs().max().item() + 1e-3
    assert (p.grad.double() - q.grad).abs().max().item() < 2e-2 * scale
with torch.no_grad():
    torch.testing.assert_close(fused(x), out.detach(), atol=0, rtol=0.01)
"""
    assert len(conv_plans(library, code)) == 2


def test_gradients_in_fewer_groups(library):
    """Groups that merge all, in part, by a divisor or not at all; views; each gradient alone."""
    code = """
def gradients(N, C, H, W, groups, kernels=(3, 5, 7, 9), layout=torch.channels_last, stride=1):
    x, weights = make(N, C, H, W, torch.bfloat16, kernels, groups, layout)
    weights[-1] = weights[-1].contiguous(memory_format=torch.channels_last)
    weights[0] = torch.stack([weights[0], weights[0]], 2)[:, :, 1]  # between other elements
    padding = [k // 2 for k in kernels]
    rest = groups, stride, padding, [1] * len(groups)
    exact_x = x.double().requires_grad_()
    exact_weights = [w.double().requires_grad_() for w in weights]
    feats = [
        F.conv2d(exact_x, w, None, stride, p, 1, g)
        for w, p, g in zip(exact_weights, padding, groups)
    ]
    grads = [torch.randn_like(f).bfloat16() for f in feats]
    torch.autograd.backward(feats, [g.double() for g in grads])
    exact = [exact_x.grad, *(w.grad for w in exact_weights)]
    for mask in ([True] * (1 + len(groups)), [True] + [False] * len(groups),
                 [False] + [True] * len(groups)):
        x_grad, w_grads = torch.ops.epsa_fused.spc_conv_backward(grads, x, weights, *rest, mask)
        for of, g, e, wanted in zip([x, *weights], [x_grad, *w_grads], exact, mask):
            assert g.dtype == torch.bfloat16
            if not wanted:
                assert g.numel() == 0
                continue
            assert g.shape == of.shape
            # x's are rounded in each branch and in each sum
            bound = 4e-3 * (4 if of is x else 1) * e.abs().max()
            assert (g - e).abs().max() < bound, (C, groups, mask, g.shape)

gradients(2, 64, 6, 7, (1, 4, 8, 16))
gradients(1, 96, 5, 6, (1, 6, 12, 24), layout=torch.contiguous_format)
gradients(1, 512, 3, 4, (1, 4, 8, 16), kernels=(1, 3, 3, 5))
gradients(1, 1024, 2, 2, (2, 4), kernels=(3, 3))
gradients(2, 64, 7, 6, (2, 4, 8, 16), stride=2)
gradients(1, 80, 4, 5, (5, 10, 20, 20), kernels=(3, 3, 3, 3))
"""
    assert conv_plans(library, code) == []


def test_an_epilogue_of_the_module(library):
    code = """
from epsa_fused import FusedPSAModule
fused = FusedPSAModule(64, 64).bfloat16().requires_grad_(False)
x = torch.randn(2, 64, 6, 7).bfloat16()
convs = [getattr(fused, f"conv_{i}") for i in (1, 2, 3, 4)]
scale, shift = torch.randn(2, 64)
call = torch.ops.epsa_fused.psa_forward.default
out = call(*fused._arguments(x, convs)[0], None, True, scale, shift, True)
exact = torch.relu(fused.double()(x.double()) * scale[:, None, None] + shift[:, None, None])
assert out.dtype == torch.bfloat16
torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-2)
"""
    assert len(conv_plans(library, code)) == 1


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
    "native": (NATIVE, f"--quick {FIXED} --mode pair --mode replay", 650),
    "asan": (FLOAT["asan"], f"--quick --dtype f32 {FIXED} --mode pair --mode replay", 230),
    "tsan": (FLOAT["tsan"], f"--quick --dtype f32 {FIXED} {FEW}", 40),
    "tsan-pair": (FLOAT["tsan"], "--quick --dtype f32 --mode pair --mode replay odd/", 8),
}
SLOW_TABLES = {
    "native-all": (NATIVE, f"{FIXED} --mode pair --mode replay", 1300),
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


OTHER_DEVICES = ("A100", "RTX4090", "RTX5090", "B200")  # simt/test_plans.cpp has their sizes


@pytest.mark.parametrize("program", [NATIVE], ids=["native"])
@pytest.mark.parametrize(
    "modes",
    [
        "--dtype f32 --mode auto --mode pair",
        pytest.param("--mode auto --mode plans --mode pair", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", OTHER_DEVICES)
def test_case_table_with_the_plans_of_another_device(built, modes, name, monkeypatch):
    monkeypatch.setenv("EPSA_SIMT_DEVICE", name)
    result = build.run(built, "--quick", *modes.split(), timeout=1800)
    count = re.fullmatch(r"(\d+) cases, 0 failed", result.stdout.splitlines()[-1])
    assert count and result.returncode == 0, result.stdout[-5000:]
    assert int(count[1]) >= 120


@pytest.mark.parametrize("program", [NATIVE], ids=["native"])
def test_an_unknown_device(built, monkeypatch):
    monkeypatch.setenv("EPSA_SIMT_DEVICE", "V100")
    assert "unknown device V100" in build.run(built, "--quick", "--mode", "auto", "odd/").stdout


@pytest.mark.parametrize("program", [FLOAT["asan"]], ids=["float"])
def test_a_dtype_without_kernels_is_refused(built):
    result = build.run(built, "--quick", "--mode", "streaming", "--dtype", "bf16", "odd/")
    reports = result.stdout.splitlines()[:-1]
    assert len(reports) == 4 and result.returncode == 1
    for report in reports:
        assert "FAILED: epsa_fused: no CUDA kernels for elements of type 2" in report


# ---- planted bugs ----


@pytest.mark.parametrize("bug", broken.BUGS, ids=lambda bug: bug.name)
def test_planted_bugs_fit_the_sources(bug):
    """Most bugs are built by `make test-all` alone. Those must not go stale before."""
    assert bug.planted(ROOT) != (ROOT / bug.file).read_text()


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
