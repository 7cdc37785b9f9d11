"""The one rule by which a result is judged against the reference in float64.

The kernels read their inputs exactly, compute in the accumulation type (float64 for float64
features, else float32) and round each result once, to its own dtype. So no entry of a result may
be further from the truth than

    u(dtype) * max |expected|          that last rounding, and
    FACTOR * eps(acc) * magnitude      what the accumulation type's roundings add up to,

The magnitude is max |expected|. A gradient's terms cancel, so its magnitude is its size if they did
not (maths.py). Half-precision features get no allowance beyond the one rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from support.cases import Case, Inputs
from support.maths import gradients
from torch import Tensor

from epsa_fused import psa_attention, psa_attention_reference

# The worst seen is 2.1, 6.5 where W1 p is a sum of 4100 products in four lanes, and 8.6 where an
# emulated block of 64 threads adds 196 equal pixels one by one.
FACTOR = 12


def accumulation_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(dtype: torch.dtype, largest: float) -> float:
    """The error of rounding values up to `largest` to `dtype`, subnormal ones too."""
    info = torch.finfo(dtype)
    return info.eps / 2 * max(largest, info.smallest_normal)


def largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def assert_close(
    actual: Tensor,
    expected: Tensor,
    acc: torch.dtype,
    *,
    magnitude: Tensor | None = None,
    name: str = "result",
) -> None:
    """`actual` is `expected` (in float64), by the rule above."""
    assert expected.dtype == torch.float64
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    size = max(largest(expected), 0.0 if magnitude is None else largest(magnitude))
    limit = rounding(actual.dtype, largest(expected)) + FACTOR * torch.finfo(acc).eps * size
    error = largest(actual.detach().cpu().double() - expected.cpu())
    assert error <= limit, f"{name} ({actual.dtype}): error {error:.3g}, at most {limit:.3g}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest expected entry."""
    assert actual.shape == expected.shape
    difference = largest(actual.detach().double() - expected.detach().double())
    return difference / max(largest(expected.detach().double()), torch.finfo(torch.float64).tiny)


# Two networks in float64 that round differently, over up to 350 layers, differ by 2e-12 (the worst
# seen, gradients of EPSANet-50). One value rounded to float32 on its way would show as 6e-8.
NETWORK_LIMIT = 1e-10


def assert_near(actual: Tensor, expected: Tensor, limit: float = NETWORK_LIMIT) -> None:
    """For whole networks, which the rule above does not cover."""
    error = relative_error(actual, expected)
    assert error <= limit, f"relative error {error:.2g}, at most {limit:.2g}"


def assert_no_worse(actual: Tensor, eager: Tensor, exact: Tensor, *, terms: int = 1) -> None:
    """`actual` is at most twice as far from float64's result as PyTorch's own result is.

    `terms` is the length of the longest sum behind an entry: PyTorch may be exact by chance, so
    the rounding of so many additions is allowed in any case.
    """
    floor = math.sqrt(terms) * torch.finfo(eager.dtype).eps / 2
    assert_near(actual, exact, 2 * relative_error(eager, exact) + floor)


def special_values(t: Tensor) -> Tensor:
    """1 for NaN, 2 and 3 for the infinities, 0 for numbers."""
    return t.isnan() + 2 * t.isposinf() + 3 * t.isneginf()


def make_cotangents(
    case: Case,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """grad_out and grad_attention."""
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_attention = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in (case.out_shape, case.attention_shape)
    )
    return (
        grad_out.to(device, dtype).contiguous(memory_format=memory_format),
        grad_attention.to(device, accumulation_type(dtype)),
    )


def run(
    function: Callable,
    inputs: Inputs,
    grad_out: Tensor | None = None,
    grad_attention: Tensor | None = None,
    *,
    branch_order: str = "reversed",
) -> dict[str, Tensor]:
    """out and attention of one call and, where cotangents are given, all gradients; by name."""
    inputs = inputs.leaves()
    out, attention = function(*inputs.args, branch_order=branch_order, return_attention=True)
    results = {"out": out.detach(), "attention": attention.detach()}
    pairs = [(out, grad_out), (attention, grad_attention)]
    pairs = [(output, grad) for output, grad in pairs if grad is not None]
    if pairs:
        outputs, cotangents = zip(*pairs, strict=True)
        grads = torch.autograd.grad(outputs, inputs.tensors(), cotangents)
        for name, grad in zip(inputs.names(), grads, strict=True):
            results[f"grad of {name}"] = grad
    return results


def check(
    inputs: Inputs,
    grad_out: Tensor | None = None,
    grad_attention: Tensor | None = None,
    *,
    branch_order: str = "reversed",
) -> dict[str, Tensor]:
    """Compare the fused op's results with the reference in float64; returns them, by name."""
    dtype = inputs.feats[0].dtype
    actual = run(psa_attention, inputs, grad_out, grad_attention, branch_order=branch_order)
    cotangents = [None if g is None else g.double() for g in (grad_out, grad_attention)]
    exact = inputs.double()
    expected = run(psa_attention_reference, exact, *cotangents, branch_order=branch_order)
    magnitudes = {}
    if cotangents != [None, None]:
        magnitudes = gradients(exact, *cotangents, branch_order=branch_order, absolute=True)
    assert actual.keys() == expected.keys()
    for name, result in actual.items():
        assert_close(
            result,
            expected[name],
            accumulation_type(dtype),
            magnitude=magnitudes.get(name),
            name=name,
        )
    return actual
