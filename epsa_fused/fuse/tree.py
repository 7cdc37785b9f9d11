"""The module tree that fuse() and unfuse() change: a second tree of the same tensors, and the
replacement of modules in a tree."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from torch import nn

from .held import Held, put_in_place

_Model = TypeVar("_Model", bound=nn.Module)


def same_tensors_in_another_tree(model: _Model, caller: str) -> _Model:
    """A copy of `model` with the same parameters and buffers.

    Args:
        model: any module.
        caller: the public function's name, for messages.

    Raises:
        RuntimeError: for DistributedDataParallel, and if it cannot be copied.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                f"{caller}: {name or 'the model'} is a DistributedDataParallel, whose reducer "
                f"cannot be shared with a second model; use {caller}(model, inplace=True), or "
                f"{caller} the model before it is wrapped"
            )
    tensors = [*model.parameters(), *model.buffers()]
    try:
        return copied(model, {id(t): t for t in tensors})
    except Exception as error:
        raise RuntimeError(
            f"{caller}: {type(model).__name__} cannot be copied, use {caller}(model, "
            "inplace=True). Where it keeps a pruned or normalised weight or a result of its own, "
            f"autograd has a part in that: {error}"
        ) from error


def copied(module: _Model, memo: dict[int, Any]) -> _Model:
    """copy.deepcopy, for a copy that may be changed.

    Raises:
        TypeError: the copy shares a module with the original. Other errors are deepcopy's.
    """
    twin = copy.deepcopy(module, memo)
    own = set(module.modules())
    for m in twin.modules():
        if m in own:
            raise TypeError(f"the copy of a {type(m).__name__} is the same object")
    return twin


def replace(
    model: _Model, new: Mapping[nn.Module, nn.Module], caller: str, inplace: bool
) -> _Model:
    """Put new[module] into each place of each of its keys, and return the model.

    Places are those in the tree, and those in plain lists, dicts and attributes.

    Raises:
        ValueError: `inplace`, and the model itself is to be replaced.
    """
    if inplace and model in new:
        raise ValueError(
            f"{caller}: the model is itself a PSA module, which has no place to put another into; "
            f"use the result of {caller}(model)"
        )
    held = Held(model, closed=new)
    done: dict[int, Any] = {}
    for module in held.modules:
        for name, child in module._modules.items():
            if child is not None and child in new:
                module._modules[name] = new[child]
        for name, value in held.attributes(module).items():
            other = put_in_place(value, new, done)
            if other is not value:
                vars(module)[name] = other
    return cast(_Model, new.get(model, model))


def why_not_compiled(model: nn.Module, before: Mapping[str, nn.Module]) -> str | None:
    """What the caller is told of modules whose compile() was called before, or None.

    Args:
        model: now.
        before: its modules before, by name. Copies, and what replaces modules, are not compiled.
    """
    now = dict(model.named_modules())
    lost = [
        name or type(model).__name__
        for name, module in before.items()
        if _is_compiled(module) and name in now and not _is_compiled(now[name])
    ]
    if not lost:
        return None
    return (
        f"compile() was called on {', '.join(lost)}, and the result is not compiled: call it again"
    )


def _is_compiled(module: nn.Module) -> bool:
    return vars(module).get("_compiled_call_impl") is not None
