"""A module compiled with frozen weights: torch.compile makes constants of them, and packs them."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from .arguments import is_literal

# Compiled code is kept for so many kinds of arguments, the newest ones.
_KINDS = 64


class FrozenModule:
    """Calls a module compiled for each kind of its arguments. For calls without gradients.

    A kind is the types, shapes, strides and dtypes of the tensors, their lazy signs, which of them
    are the same, where they lie in memory that they share, and the values of literals. Where
    arguments have other types, the compiled code keeps torch.compile's guards for them, and its
    limit of recompilations.

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
        leaves, tree = tree_flatten((args, kwargs))
        kind = (tree, _sharing(leaves), *map(_kind_of_leaf, leaves))
        whole = self._whole and all(isinstance(v, Tensor) or is_literal(v) for v in leaves)
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
    all calls. torch before 2.13 wraps a function without a source file in one that all share.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return module(*args, **kwargs)

    call.__code__ = call.__code__.replace()  # a copy
    return call


def _sharing(leaves: list[Any]) -> Hashable:
    """Which tensors are the same, and which share memory: compiled code takes both for granted."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) < 2:
        return ()
    same = [id(t) for t in tensors]
    memory = [t.untyped_storage()._cdata if t.layout == torch.strided else id(t) for t in tensors]
    if len(set(memory)) == len(tensors):
        return ()
    # by its place: code that changes an input in place takes the distance for granted
    places = [
        (memory.index(m), t.storage_offset() if memory.count(m) > 1 else 0)
        for m, t in zip(memory, tensors, strict=True)
    ]
    return tuple(same.index(i) for i in same), tuple(places)


def _kind_of_leaf(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        signs = value.is_neg(), value.is_conj()  # not yet computed
        return type(value), value.shape, value.stride(), value.dtype, *signs
    return type(value), repr(value) if is_literal(value) else None
