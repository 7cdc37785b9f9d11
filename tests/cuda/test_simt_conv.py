"""The CUDA convolutions' own source, run on the CPU by the emulator (tests/simt)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from simt import build
from support.processes import run_code

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
          layout=torch.channels_last, stride=1, change=lambda x: x):
    x, weights = make(N, C, H, W, dtype, kernels, groups, layout)
    x = change(x)
    # weights as channels_last models hold them, too
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    weights[-1] = weights[-1].contiguous(memory_format=torch.channels_last)
    padding = [k // 2 for k in kernels]
    feats, pooled = torch.ops.epsa_fused.spc_conv(
        x, weights, groups, stride, padding, [1] * len(groups)
    )
    for f, w, k, g, p in zip(feats, weights, kernels, groups, pooled.unbind(1)):
        exact = F.conv2d(x.double(), w.double(), None, stride, k // 2, 1, g)
        assert f.dtype == dtype and f.is_contiguous(memory_format=layout)
        error = ((f.double() - exact).abs() / (exact.abs() + 1)).max().item()
        assert error < BOUNDS[dtype], (C, k, g, error)
        torch.testing.assert_close(p, f.float().mean((2, 3)))
"""


@pytest.fixture(scope="module")
def convolutions(workshop) -> Path:
    """The convolutions' operators, emulated, for torch.ops.load_library."""
    return workshop.path(build.Program("convolutions"))


def plans(convolutions, code: str, **environment: str) -> list[str]:
    """Runs the code after the checks' definitions. The plans that the kernel took."""
    output = run_code(CHECK + code, LIBRARY=str(convolutions), EPSA_SIMT_TRACE="1", **environment)
    return re.findall(r"plan: (.*)", output)


@pytest.mark.parametrize(
    ("call", "kernel"),
    (
        ("2, 64, 10, 9", "large 0"),  # groups of 16, 8 and 4 channels
        ("1, 64, 9, 30, torch.float16", "large 0"),
        ("3, 128, 7, 8", "large 0"),
        ("1, 256, 14, 14", "large 1"),
        ("2, 512, 7, 7", "large 1"),
        ("1, 1024, 4, 4", "large 1"),
        ("2, 64, 1, 1", "large 0"),
        ("1, 64, 3, 70, torch.bfloat16, (9, 5), (16, 16)", "large 0"),
        ("1, 64, 6, 6, torch.bfloat16, (7, 9), (4, 4)", "large 1"),
        ("1, 64, 5, 6, torch.bfloat16, (5, 7), (1, 1)", "large 1"),
        ("1, 128, 5, 6, torch.bfloat16, (5, 9, 9), (16, 2, 4)", "large 1"),
        ("1, 64, 9, 8, layout=torch.contiguous_format", "large 0"),
    ),
)
def test_the_maps(convolutions, call, kernel):
    (plan,) = plans(convolutions, f"check({call})")
    assert plan.endswith(kernel)


@pytest.mark.parametrize(
    "change",
    (
        "lambda x: torch.cat([x, x])[:2].contiguous()[1:]",
        "lambda x: x.new_empty(x.numel() + 1)[1:].view(1, 8, 9, 64).permute(0, 3, 1, 2).copy_(x)",
        "lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, :64]",
    ),
)
def test_images_that_are_views(convolutions, change):
    code = f"check(1, 64, 8, 9, change={change}, layout=torch.channels_last)"
    if "[1:]" in change and "view" not in change:
        code = code.replace("torch.channels_last)", "torch.contiguous_format)")
    assert len(plans(convolutions, code)) == 1


def test_threads_and_blocks_in_random_order(convolutions):
    code = "check(1, 64, 8, 9); check(1, 256, 7, 7)"
    assert len(plans(convolutions, code, EPSA_SIMT_SEED="3")) == 2


def test_a_large_device_gets_small_tiles(convolutions):
    few, many = (
        plans(convolutions, "check(2, 64, 16, 28)", EPSA_SIMT_MULTIPROCESSORS=count)[0]
        for count in ("1", "132")
    )
    blocks = [int(re.search(r"(\d+) blocks", plan)[1]) for plan in (few, many)]
    assert blocks[0] < blocks[1]


@pytest.mark.parametrize(
    "call",
    (
        "1, 64, 9, 8, stride=2",
        "1, 64, 9, 8, kernels=(3, 3), groups=(1, 4)",
        "1, 96, 9, 8, kernels=(5, 7), groups=(4, 8)",  # no powers of two
    ),
)
def test_pytorch_computes_the_other_branches(convolutions, call):
    assert plans(convolutions, f"check({call})") == []


def test_gradients_and_the_module(convolutions):
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
    assert len(plans(convolutions, code)) == 2
