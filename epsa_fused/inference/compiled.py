"""A module compiled with frozen weights: torch.compile makes constants of them, and packs them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten


class FrozenModule:
    """Calls a module compiled for each kind of its arguments. For calls without gradients.

    A kind is the shapes, strides and dtypes of the tensors, and the values of everything else. The
    compiled code checks nothing further: with the guards of torch.compile a call of EPSANet-50
    takes a millisecond longer.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._compiled: dict[Any, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = _kind_of((args, kwargs))
        compiled = self._compiled.get(kind)
        if compiled is not None:
            return compiled(*args, **kwargs)
        compiled = torch.compile(
            _own_function(self._module),
            dynamic=False,
            options={"guard_filter_fn": torch.compiler.skip_all_guards_unsafe},
        )
        # `options` come too late for freezing: the tracing reads the process's setting.
        with torch._inductor.config.patch(freezing=True):
            result = compiled(*args, **kwargs)
        self._compiled[kind] = compiled
        return result


def _own_function(module: nn.Module) -> Callable[..., Any]:
    """A function that calls the module, with a code object of its own.

    torch.compile keeps what it compiled by code object, and without guards the first would serve
    all calls.
    """
    names: dict[str, Any] = {"module": module}
    exec("def call(*args, **kwargs):\n    return module(*args, **kwargs)", names)
    return cast(Callable[..., Any], names["call"])


def _kind_of(arguments: Any) -> tuple[Any, ...]:
    leaves, tree = tree_flatten(arguments)
    return (tree, *map(_kind_of_leaf, leaves))


def _kind_of_leaf(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    return type(value), repr(value)
