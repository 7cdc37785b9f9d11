"""One call of a module in a trial, and the comparison of two modules call by call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import first_line, text_of
from .find import MisfitError
from .inputs import Given
from .quiet import random_state, seed
from .twin import in_mode

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
_OVERWRITTEN = (
    "its branches write over what they are given, and it does not hand them its input itself, as "
    "the fused module would: make the first layer of each branch one that is not in place"
)


class Result(NamedTuple):
    """Of one call: the output, and the gradients of the input and of all parameters."""

    out: Tensor
    grads: dict[str, Tensor] | None  # by name; None without any, empty where autograd fails
    written: Tensor | None  # the input, where it was overwritten
    draws: bool  # random numbers


class FailedCallError(MisfitError):
    """A module cannot be called on some input."""


def result(module: nn.Module, x: Tensor, backward: bool = True, cotangent: float = 1.0) -> Result:
    leaf = x.clone().requires_grad_()
    given = leaf.clone()
    seed()
    before = random_state()
    out = module(given)
    draws = random_state() != before
    if not isinstance(out, Tensor):
        raise TypeError(f"its forward returns a {type(out).__name__}, expected a Tensor")
    if out.is_nested or out.device != x.device:
        kind = "a nested tensor" if out.is_nested else f"a map on {out.device}"
        raise TypeError(f"its forward returns {kind}, expected a map on the input's device")
    if not out.is_floating_point() or out.layout is not torch.strided:
        raise TypeError(f"its forward returns {out.dtype} as {out.layout}, expected a map")
    written = None if torch.equal(given, leaf) else given.detach()
    grads = None
    if backward and out.requires_grad:
        cotangents = cotangent * torch.arange(out.numel(), dtype=out.dtype).cos().view_as(out)
        named = {"": leaf, **dict(module.named_parameters())}
        try:
            found = torch.autograd.grad(
                out, list(named.values()), cotangents, materialize_grads=True
            )
        except RuntimeError:
            if written is None:
                raise
            found = ()  # it has overwritten what its gradient needs
        grads = dict(zip(named, found, strict=False))
    return Result(out.detach(), grads, written, draws)


def attempt(module: nn.Module, x: Tensor, backward: bool = True, cotangent: float = 1.0) -> Result:
    """The result of foreign code, whose owner is told what fails.

    Raises:
        FailedCallError: it raises an exception.
    """
    try:
        return result(module, x, backward, cotangent)
    except Exception as error:
        why = (
            f"a trial on {list(x.shape)} failed: {first_line(error)}; to fuse, its forward must "
            "take one map of any height, width and floating-point dtype"
        )
        checkpoints = "torch.utils.checkpoint" in text_of(error)
        raise FailedCallError(RECOMPUTES if checkpoints else why) from error


def compare(
    twin: nn.Module,
    fused: nn.Module,
    inputs: Sequence[Given],
    backward: bool = True,
    where: str | None = None,
    may_draw: bool = False,
    modes: Sequence[bool] = (False, True),
) -> bool:
    """Compare with the fused module of the same layers; whether only `twin` overwrites its input.

    Args:
        where: what a reason says of these inputs, in place of their shapes.
        may_draw: whether a module may draw random numbers, of which both get the same.
        modes: in training, in evaluation, or in both.

    Raises:
        FailedCallError: `twin` fails.
        MisfitError: they differ, the fused one fails, or `twin` draws random numbers.
    """
    overwrites = False
    for training in modes:
        for x, cotangent in inputs:
            expected = attempt(in_mode(twin, training), x, backward, cotangent)
            try:
                actual = result(fused.train(training), x, backward, cotangent)
            except Exception as error:
                failed = f"the fused module fails where it does not: {first_line(error)}"
                raise MisfitError(failed) from error
            if expected.draws and not may_draw:  # one seed shows one of the things that it does
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
            if actual.written is not None and (
                expected.written is None or not agree([actual.written], [expected.written], x.dtype)
            ):
                raise MisfitError(_OVERWRITTEN)
            overwrites |= expected.written is not None and actual.written is None
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
