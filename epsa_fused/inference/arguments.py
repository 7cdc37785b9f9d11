"""Arguments and results of a model's call: trees with tensors in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


def tensors_of(value: Any) -> list[Tensor]:
    return [v for v in tree_flatten(value)[0] if isinstance(v, Tensor)]


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`."""
    return tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, value
    )


def laid_out(value: Any, memory_format: torch.memory_format) -> Any:
    """`value` with its images in a layout."""

    def in_layout(v: Any) -> Any:
        is_image = isinstance(v, Tensor) and v.dim() == 4
        return v.contiguous(memory_format=memory_format) if is_image else v

    return tree_map(in_layout, value)


def cloned(value: Any) -> Any:
    """`value` with copies of its tensors: a model may work in place on what it is given."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def kind_of(value: Any) -> Any:
    """What a traced model takes for granted of an argument: sizes may change, this may not."""
    leaves, tree = tree_flatten(value)
    return tree, [_kind_of_leaf(leaf) for leaf in leaves]


def _kind_of_leaf(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return f"{type(leaf).__name__} {leaf!r}"
    dtype = "floating-point" if leaf.is_floating_point() else str(leaf.dtype)
    return f"{dtype} tensor of {leaf.dim()} dimensions"


def describe(value: Any) -> str:
    """The kinds of arguments, for messages."""
    return "(" + ", ".join(kind_of(value)[1]) + ")"
