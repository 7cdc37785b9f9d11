"""Tensors whose offsets of samples, slots or pixels do not fit into 32 bits."""

import os
from pathlib import Path

import pytest
import torch
from support.cases import PLAIN_LAYOUTS, Inputs, name_of
from support.maths import gradients
from support.tolerance import assert_close

from epsa_fused import psa_attention_reference

OP = torch.ops.epsa_fused.psa_attention.default
BACKWARD = torch.ops.epsa_fused.psa_attention_backward.default

# All branches are one map, so `out` is eight times as large as the input: one sample has more than
# 2^31 elements. SE weights of their own tell the branches apart.
BATCH, BRANCHES, CHANNELS, SIZE, HIDDEN = 2, 8, 32, 2900, 2
BRANCHES_WITH_GRADIENT = (0, 7)
MAP_BYTES = 2 * BATCH * CHANNELS * SIZE**2
# features, output, gradients, and this file's own tensors
NEEDED = (1 + BRANCHES + len(BRANCHES_WITH_GRADIENT)) * MAP_BYTES + 2**30


def available_memory() -> int:
    """In bytes; where Linux does not say, what is installed."""
    path = Path("/proc/meminfo")
    if path.exists():
        lines = dict(line.split(":") for line in path.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fill(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every plane a pattern times a power of two of its own: exact, so that all sums follow from
    the pattern's. Returns the pattern and the factors [N, planes]."""
    pattern = (torch.randn(maps.shape[2:]) + 0.5).bfloat16()
    factors = 2.0 ** torch.randint(-2, 3, maps.shape[:2])
    torch.mul(pattern, factors[:, :, None, None].bfloat16(), out=maps)
    return pattern.double(), factors.double()


@pytest.mark.slow
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS, ids=name_of)
def test_more_than_2_to_the_31_elements(layout):
    """Small results are compared whole. Maps are compared by the first and last plane of each
    branch and sample."""
    free = available_memory()
    if free < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free memory, there are {free / 2**30:.0f}")
    x = torch.empty(
        (BATCH, CHANNELS, SIZE, SIZE), dtype=torch.bfloat16, memory_format=layout.out_format
    )
    pattern, factors = fill(x)
    feats = [x] * BRANCHES
    weights = [
        torch.randn(BRANCHES, HIDDEN, CHANNELS) * CHANNELS**-0.5,
        torch.randn(BRANCHES, HIDDEN) + 0.5,
        torch.randn(BRANCHES, CHANNELS, HIDDEN),
        torch.randn(BRANCHES, CHANNELS),
    ]
    # the attention depends on the maps' means alone, so maps of one pixel do
    means = (factors * pattern.mean())[:, :, None, None]
    small = Inputs([means.clone() for _ in feats], weights).double().leaves()
    _, expected = psa_attention_reference(*small.args, return_attention=True)

    out, pooled, attention = OP(feats, *weights, False)
    assert out[0].numel() > 2**31
    assert_close(attention, expected.detach(), torch.float32)
    a = expected.detach()
    positions = [
        (n, s, c) for n in range(BATCH) for s in range(BRANCHES) for c in (0, CHANNELS - 1)
    ]
    for n, s, c in positions:
        product = pattern * (factors[n, c] * a[n, s, c])
        assert_close(out[n, s * CHANNELS + c], product, torch.float32, name=f"out {n, s, c}")

    grad_pattern, grad_factors = fill(out)  # as grad_out
    grad_factors = grad_factors.view(BATCH, BRANCHES, CHANNELS)
    terms, both = pattern * grad_pattern, grad_factors * factors[:, None]
    sizes = gradients(small.double(), None, both * terms.abs().sum(), absolute=True)
    names = small.names()
    grads = torch.autograd.grad(expected, small.tensors(), both * terms.sum())

    mask = [s in BRANCHES_WITH_GRADIENT for s in range(BRANCHES)] + [True] * 4
    grad_feats, *grad_weights = BACKWARD(out, None, feats, *weights, pooled, attention, False, mask)
    for name, actual, grad in zip(names[BRANCHES:], grad_weights, grads[BRANCHES:], strict=True):
        size = sizes[f"grad of {name}"]
        assert_close(actual, grad, torch.float32, magnitude=size, name=name)
    for n, s, c in positions:
        if s in BRANCHES_WITH_GRADIENT:
            grad = grad_pattern * (grad_factors[n, s, c] * a[n, s, c])
            grad += grads[s][n, c] / SIZE**2  # through the mean
            assert_close(grad_feats[s][n, c], grad, torch.float32, name=f"gradient {n, s, c}")
