"""One call of a module in a trial, and the comparison of two modules call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import first_line
from .find import MisfitError
from .quiet import random_state

# The largest relative difference between two formulations of the same function.
ROUNDING = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-5,
    torch.float16: 2**-8,
}
RECOMPUTES = (
    "it computes layers again in the backward pass, as torch.utils.checkpoint does, and the fused "
    "module would not; fuse it without that, and checkpoint what calls it"
)


class Result(NamedTuple):
    """Of one call: the output, and the gradients of the input and of all parameters."""

    out: Tensor
    grads: dict[str, Tensor] | None  # by name; None without any, empty where autograd fails
    overwrites_input: bool
    draws: bool  # random numbers


def result(module: nn.Module, x: Tensor, backward: bool = True) -> Result:
    leaf = x.clone().requires_grad_()
    given = leaf.clone()
    torch.default_generator.manual_seed(0)  # that of GPUs stays
    before = random_state()
    out = module(given)
    draws = random_state() != before
    if not isinstance(out, Tensor):
        raise TypeError(f"its forward returns a {type(out).__name__}, expected a Tensor")
    if not out.is_floating_point() or out.layout is not torch.strided:
        raise TypeError(f"its forward returns {out.dtype} as {out.layout}, expected a map")
    overwrites = not torch.equal(given, leaf)
    grads = None
    if backward and out.requires_grad:
        cotangent = torch.arange(out.numel(), dtype=out.dtype, device=out.device).cos().view_as(out)
        named = {"": leaf, **dict(module.named_parameters())}
        try:
            found = torch.autograd.grad(
                out, list(named.values()), cotangent, materialize_grads=True
            )
        except RuntimeError:
            if not overwrites:
                raise
            found = ()  # it has overwritten what its gradient needs
        grads = dict(zip(named, found, strict=False))
    return Result(out.detach(), grads, overwrites, draws)


def attempt(module: nn.Module, x: Tensor, backward: bool = True) -> Result:
    """The result of foreign code, whose owner is told what fails.

    Raises:
        MisfitError: it raises an exception.
    """
    try:
        return result(module, x, backward)
    except Exception as error:
        why = (
            f"a trial on {list(x.shape)} failed: {first_line(error)}; to fuse, its forward must "
            "take one map of any height, width and floating-point dtype"
        )
        checkpoints = "torch.utils.checkpoint" in str(error)
        raise MisfitError(RECOMPUTES if checkpoints else why) from error


def compare(
    twin: nn.Module,
    fused: nn.Module,
    inputs: Sequence[Tensor],
    backward: bool = True,
    where: str | None = None,
) -> bool:
    """Compare with the fused module of the same layers; whether the other one overwrites its input.

    Args:
        where: what a reason says of these inputs, in place of their shapes.

    Raises:
        MisfitError: they differ, or the other one fails or draws random numbers.
    """
    overwrites = False
    for training in (False, True):
        for x in inputs:
            expected = attempt(twin.train(training), x, backward)
            actual = attempt(fused.train(training), x, backward)
            if expected.draws:  # one seed shows one of the things that it does
                raise MisfitError(
                    f"its forward draws random numbers{' in training' if training else ''}, as a "
                    "dropout does; it may fuse without that, which may go before or behind it"
                )
            if actual.out.dtype != expected.out.dtype:
                raise MisfitError(
                    f"its forward returns {expected.out.dtype} for an input of {x.dtype}, where "
                    f"the fused module returns {actual.out.dtype}"
                )
            if not agree([actual.out], [expected.out], x.dtype):
                seen = "in training" if training else f"for an input {list(x.shape)}"
                if x.dtype != torch.float64:
                    seen += f" of {x.dtype}"
                raise MisfitError(f"its forward computes something else than PSA {where or seen}")
            if expected.grads != {} and not _same_grads(actual.grads, expected.grads):
                raise MisfitError("its gradients are not those of PSA: a tensor is detached, say")
            overwrites |= expected.overwrites_input
    return overwrites


def _same_grads(actual: dict[str, Tensor] | None, expected: dict[str, Tensor] | None) -> bool:
    if actual is None or expected is None:
        return actual is expected
    if actual.keys() != expected.keys():
        return False
    return agree([actual[name] for name in expected], list(expected.values()))


def agree(
    actual: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype = torch.float64
) -> bool:
    """Whether all differences are small beside the largest entry of all, as `dtype` rounds."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return False
    largest = max(t.abs().max() for t in expected)
    pairs = zip(actual, expected, strict=True)
    return all((a - b).abs().max() <= ROUNDING[dtype] * largest for a, b in pairs)
