"""Arguments and results of a model's call: trees with tensors in them."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from .._checks import given
from ..modules.layers import is_plain


def tensors_of(value: Any) -> list[Tensor]:
    return [v for v in tree_flatten(value)[0] if isinstance(v, Tensor)]


def cast_floats(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating-point tensors in `dtype`."""
    return tree_map(
        lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, value
    )


def in_layout(value: Any, memory_format: torch.memory_format) -> Any:
    """One argument, in a layout if it is an image."""
    is_image = isinstance(value, Tensor) and value.dim() == 4
    return value.contiguous(memory_format=memory_format) if is_image else value


def laid_out(value: Any, memory_format: torch.memory_format) -> Any:
    """`value` with its images in a layout."""
    return tree_map(lambda v: in_layout(v, memory_format), value)


def cloned(value: Any) -> Any:
    """`value` with copies of its tensors: a model may work in place on what it is given."""
    return tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, value)


def is_literal(value: object) -> bool:
    return type(value) in (type(None), bool, int, float, str)  # a subclass has a repr of its own


def kind_of(argument: object) -> Hashable:
    """What a traced model takes for granted of an argument: sizes may change, this may not."""
    if isinstance(argument, Tensor):
        subclass = None if is_plain(argument) else type(argument)
        dtype = None if argument.is_floating_point() else argument.dtype
        return subclass, dtype, argument.dim()
    # repr tells True from 1, and nan from nothing else
    return type(argument), repr(argument) if is_literal(argument) else None


class _Words(str):
    __repr__ = str.__str__  # in lists without quotation marks


def describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The kinds of a call's arguments, for messages."""
    args, kwargs = tree_map(lambda v: _Words(_describe(v)), (args, kwargs))
    return "(" + ", ".join([*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())]) + ")"


def _describe(argument: object) -> str:
    if not isinstance(argument, Tensor):
        return given(argument)
    dtype = "floating-point" if argument.is_floating_point() else str(argument.dtype)
    name = "tensor" if is_plain(argument) else type(argument).__name__
    return f"{dtype} {name} of {argument.dim()} dimensions"
