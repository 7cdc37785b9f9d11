"""Whether an optimised model computes what the model given does, as far as its dtype can."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .._checks import first_line
from .arguments import cast_floats, cloned, tensors_of
from .model import InferenceReport

# An optimised model may differ from float64 by so many times as much as the plain one in the same
# dtype does: sums have another order, and folded weights are rounded elsewhere.
FACTOR = 3
# So many roundings of the largest output, where the plain model happens to be exact.
ROUNDINGS = 8
# The same where float64 cannot be had, and float32 stands for it.
ROUNDINGS_OF_FLOAT32 = 256


def check_results(
    model: nn.Module, args: tuple[Any, ...], results: Any, report: InferenceReport
) -> float:
    """Compare the results of an optimised model with those of `model` in float64.

    Args:
        model: the model given, in eval mode.
        args: of one call.
        results: the optimised model's outputs, floating-point ones in any dtype.
        report: of the optimised model. Its notes get a line if `model` does not run in float64;
            float32 stands for it then.

    Returns:
        The largest error, relative to the largest output.

    Raises:
        RuntimeError: the error is larger than `dtype` explains, or the outputs are of another kind.
        ValueError: `model` gives no tensors, or NaN, or other outputs in a second call.
    """
    name, dtype, roundings = report.function, report.dtype, ROUNDINGS
    try:
        exact = _run(model, args, torch.float64)
    except Exception as error:
        report.notes.append(
            f"compared with float32, since the model fails in float64 ({first_line(error)})"
        )
        exact, roundings = _run(model, args, torch.float32), ROUNDINGS_OF_FLOAT32
    plain, again = _run(model, args, dtype), _run(model, args, dtype)
    _check_kinds(name, exact, plain, again, results)
    worst = 0.0
    for mine, usual, right in zip(*map(tensors_of, (results, plain, exact)), strict=True):
        if not right.is_floating_point():
            if not torch.equal(mine, usual):
                raise RuntimeError(f"{name}: an output of {right.dtype} differs from the model's")
            continue
        difference = _error(mine, right)
        finite = right[right.isfinite()].abs().double()
        size = finite.max().item() if finite.numel() else 0.0
        allowed = FACTOR * _error(usual, right) + roundings * torch.finfo(dtype).eps * size
        if not difference <= allowed:
            raise RuntimeError(
                f"{name}: the optimised model's output differs by {difference:.3g} from the "
                f"model's in {right.dtype}, expected at most {allowed:.3g}, as {dtype} explains "
                f"(largest output {size:.3g})"
            )
        worst = max(worst, difference / size if size else 0.0)
    return worst


def _run(model: nn.Module, args: tuple[Any, ...], dtype: torch.dtype) -> Any:
    own = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        return own(*cast_floats(cloned(args), dtype))


def _check_kinds(name: str, exact: Any, plain: Any, again: Any, results: Any) -> None:
    if not tensors_of(exact):
        raise ValueError(
            f"{name}: expected a model that returns tensors, alone or in lists, tuples and dicts, "
            f"got {type(exact).__name__}"
        )
    if any(t.isnan().any() for t in tensors_of(exact)):
        raise ValueError(f"{name}: example: expected one without NaN in the outputs, got NaN")
    if not all(map(torch.equal, tensors_of(plain), tensors_of(again))):
        raise ValueError(f"{name}: expected a model that gives the same outputs in each call")
    given, expected = (
        (tree_flatten(tree)[1], [list(t.shape) for t in tensors_of(tree)])
        for tree in (results, exact)
    )
    if given != expected:
        raise RuntimeError(
            f"{name}: expected outputs {expected[1]} in {expected[0]}, the optimised model gave "
            f"{given[1]} in {given[0]}"
        )


def _error(a: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite where one of the two is and the other is another."""
    wide, right = a.double(), exact.double()
    difference = torch.where(wide == right, 0.0, (wide - right).abs())
    return difference.max().item() if difference.numel() else 0.0
