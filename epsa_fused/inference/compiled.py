"""A module compiled with frozen weights: torch.compile makes constants of them, and packs them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .arguments import is_literal

# Compiled code is kept for so many kinds of arguments, the newest ones.
_KINDS = 64


class FrozenModule:
    """Calls a module compiled for each kind of its arguments. For calls without gradients.

    A kind is the shapes, strides and dtypes of the tensors, and the values of literals. Calls with
    arguments of other types share one compiled function, which keeps torch.compile's guards.

    Args:
        module: in eval mode.
        whole: whether it is one graph that depends on nothing but its arguments, as torch.fx
            traces one. Its compiled code checks nothing further then: with the guards of
            torch.compile a call of EPSANet-50 takes a millisecond longer.
    """

    def __init__(self, module: nn.Module, whole: bool) -> None:
        self._module = module
        self._whole = whole
        self._compiled: dict[Hashable, Callable[..., Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind = _kind_of((args, kwargs))
        whole = self._whole and kind is not None
        compiled = self._compiled.get(kind)
        if compiled is not None and whole:
            return compiled(*args, **kwargs)
        # With guards each call may compile again.
        import torch._inductor.config  # takes seconds, so importing the package does not do it

        with self._lock, torch._inductor.config.patch(freezing=True):
            compiled = self._compiled.get(kind) or self._compile(whole)
            try:
                result = compiled(*args, **kwargs)
            except Exception as error:
                compiler = os.environ.get("CXX") or "g++"
                if shutil.which(compiler) is None:
                    raise RuntimeError(
                        "optimize_for_inference: compile: expected a C++ compiler on PATH, got no "
                        f"{compiler}; compile=False needs none"
                    ) from error
                raise
            self._compiled[kind] = compiled
            while len(self._compiled) > _KINDS:
                del self._compiled[next(iter(self._compiled))]
        return result

    def _compile(self, whole: bool) -> Callable[..., Any]:
        # `options` come too late for freezing: the tracing reads the process's setting.
        options: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
        return torch.compile(
            _own_function(self._module),
            dynamic=False,
            fullgraph=whole,
            options=options if whole else None,
        )


def _own_function(module: nn.Module) -> Callable[..., Any]:
    """A function that calls the module, with a code object of its own.

    torch.compile keeps what it compiled by code object, and without guards the first would serve
    all calls.
    """
    names: dict[str, Any] = {"module": module}
    exec("def call(*args, **kwargs):\n    return module(*args, **kwargs)", names)
    return cast(Callable[..., Any], names["call"])


def _kind_of(arguments: Any) -> Hashable:
    """None where an argument is neither a tensor nor a literal."""
    leaves, tree = tree_flatten(arguments)
    if not all(isinstance(leaf, Tensor) or is_literal(leaf) for leaf in leaves):
        return None
    return (tree, *map(_kind_of_leaf, leaves))


def _kind_of_leaf(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        return type(value), value.shape, value.stride(), value.dtype
    return type(value), repr(value)
