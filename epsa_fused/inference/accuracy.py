"""Whether an optimised model computes what the model given does, as far as its dtype can."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

# An optimised model may differ from float64 by so many times as much as the plain one in the same
# dtype does: sums have another order, and folded weights are rounded elsewhere.
_FACTOR = 3
# So many roundings of the largest output, where the plain model happens to be exact.
_ROUNDINGS = 8


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """`value`, a tree of arguments, with its floating-point tensors in `dtype`."""
    return tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, value
    )


def tensors_of(value: Any) -> list[Tensor]:
    return [v for v in tree_flatten(value)[0] if isinstance(v, Tensor)]


def check_results(
    model: nn.Module, args: tuple[Any, ...], dtype: torch.dtype, results: Any
) -> float:
    """Compare the results of an optimised model with those of `model` in float64.

    Args:
        model: the model given, in eval mode.
        args: of one call.
        dtype: of the optimised model.
        results: its outputs, floating-point ones in any dtype.

    Returns:
        The largest error, relative to the largest output.

    Raises:
        RuntimeError: the error is larger than `dtype` explains, or results are missing.
        ValueError: the outputs of `model` are not finite.
    """
    exact = _run(model, args, torch.float64)
    plain = _run(model, args, dtype)
    given = tensors_of(results)
    if [t.shape for t in given] != [t.shape for t in exact]:
        raise RuntimeError(
            f"optimize_for_inference: expected outputs {[list(t.shape) for t in exact]}, "
            f"the optimised model gave {[list(t.shape) for t in given]}"
        )
    worst = 0.0
    for mine, usual, right in zip(given, plain, exact, strict=True):
        if not right.is_floating_point() or right.numel() == 0:
            continue
        if not right.isfinite().all():
            raise ValueError(
                "optimize_for_inference: example: expected one with finite outputs of the model, "
                "got infinities or NaN"
            )
        size = right.abs().max().item()
        error = _distance(mine, right)
        allowed = _FACTOR * _distance(usual, right) + _ROUNDINGS * torch.finfo(dtype).eps * size
        if not error <= allowed:
            raise RuntimeError(
                f"optimize_for_inference: the optimised model's output differs by {error:.3g} from "
                f"the model's in float64, expected at most {allowed:.3g}, as {dtype} explains "
                f"(largest output {size:.3g})"
            )
        worst = max(worst, error / size if size else 0.0)
    return worst


def _run(model: nn.Module, args: tuple[Any, ...], dtype: torch.dtype) -> list[Tensor]:
    own = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        return tensors_of(own(*cast_floats(args, dtype)))


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b).abs().max().item()
