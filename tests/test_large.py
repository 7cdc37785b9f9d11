"""Maps whose offsets do not fit into 32 bits, as elements or as bytes."""

import os
from pathlib import Path

import pytest
import torch
from cases import PLAIN_LAYOUTS, Inputs, name_of
from maths import gradients
from tolerance import assert_close

from epsa_fused import psa_attention_reference

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default

BATCH, BRANCHES, CHANNELS, SIZE = 2, 2, 64, 2900
PLANES = BRANCHES * CHANNELS
ELEMENTS = BATCH * PLANES * SIZE**2
NEEDED = 3 * 2 * ELEMENTS + 2**30  # features, output, gradients, and this file's own


def available_memory() -> int:
    """In bytes; where Linux does not say, what is installed."""
    path = Path("/proc/meminfo")
    if path.exists():
        lines = dict(line.split(":") for line in path.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def scaled_planes(memory_format: torch.memory_format) -> tuple[torch.Tensor, ...]:
    """One pattern times a power of two in each plane: exact, so that every plane's sums follow
    from the pattern's. Returns the maps, the pattern and the factors [N, S*C]."""
    pattern = (torch.randn(SIZE, SIZE) + 0.5).bfloat16()
    factors = 2.0 ** torch.randint(-2, 3, (BATCH, PLANES))
    shape = (BATCH, PLANES, SIZE, SIZE)
    maps = torch.empty(shape, dtype=torch.bfloat16, memory_format=memory_format)
    torch.mul(pattern, factors[:, :, None, None].bfloat16(), out=maps)
    return maps, pattern.double(), factors.double()


def by_branch(t: torch.Tensor) -> list[torch.Tensor]:
    """[N, S*C] -> S x [N, C, 1, 1], as maps of one pixel."""
    return [part[:, :, None, None] for part in t.chunk(BRANCHES, dim=1)]


@pytest.mark.slow
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_more_than_2_to_the_31_elements(layout):
    """Branches are chunks of one tensor. What is small is compared whole, the maps in slices:
    the first and the last plane of each branch in each sample."""
    free = available_memory()
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    assert ELEMENTS > 2**31

    x, pattern, factors = scaled_planes(layout.out_format)
    feats = x.chunk(BRANCHES, dim=1)
    c, r = CHANNELS, 4
    weights = [
        torch.randn(r, c) * c**-0.5,
        torch.randn(r) * 0.5 + 0.5,
        torch.randn(c, r),
        torch.randn(c) * 0.5,
    ]
    exact = Inputs(by_branch(factors * pattern.mean()), weights).double().leaves()
    _, expected = psa_attention_reference(*exact.args, return_attention=True)

    out, pooled, attention = OP(feats, *weights, False)
    assert_close(attention, expected.detach(), torch.float32)
    planes = [0, c - 1, c, 2 * c - 1]
    a = expected.detach().flatten(1)
    for n in range(BATCH):
        for plane in planes:
            product = pattern * factors[n, plane] * a[n, plane]
            assert_close(out[n, plane], product, torch.float32, name=f"out[{n}, {plane}]")
    del out

    grad_out, grad_pattern, grad_factors = scaled_planes(layout.out_format)
    terms = pattern * grad_pattern
    grad_a = (factors * grad_factors * terms.sum()).view(BATCH, BRANCHES, c)
    sizes = (factors * grad_factors * terms.abs().sum()).view(BATCH, BRANCHES, c)
    magnitudes = gradients(exact.double(), None, sizes, absolute=True)
    names = exact.names()
    grads = torch.autograd.grad(expected, exact.tensors(), grad_a)
    through_pooled = torch.cat(grads[:BRANCHES], 1) / SIZE**2

    grad_feats, *grad_weights = BACKWARD(
        grad_out, None, feats, *weights, pooled, attention, False, [True] * (BRANCHES + 4)
    )
    for name, actual, grad in zip(names[BRANCHES:], grad_weights, grads[BRANCHES:], strict=True):
        magnitude = magnitudes[f"grad of {name}"]
        assert_close(actual, grad, torch.float32, magnitude=magnitude, name=name)
    for n in range(BATCH):
        for plane in planes:
            actual = grad_feats[plane // c][n, plane % c]
            grad = grad_pattern * grad_factors[n, plane] * a[n, plane]
            grad += through_pooled[n, plane]
            assert_close(actual, grad, torch.float32, name=f"grad of map {n}, {plane}")
