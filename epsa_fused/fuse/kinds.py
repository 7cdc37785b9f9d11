"""Which modules are of one kind: one trial tells of all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..modules.adopted import PSALayers
from ..modules.layers import STATE


def key_of(module: nn.Module, layers: PSALayers) -> tuple[Any, ...]:
    """Classes, settings and shapes: modules with equal ones compute the same function."""
    settings = [
        (name, key, _value_key(value))
        for name, m in module.named_modules()
        for key, value in sorted(vars(m).items())
        if key not in STATE
    ]
    shapes = [
        (name, None if nn.parameter.is_lazy(p) else p.shape, p.dtype)
        for name, p in module.named_parameters()
    ]
    kept = [  # a trial has other values of floating point, and these as they are
        (name, repr(t) if t.numel() == 1 else id(t))
        for name, t in module.named_buffers()
        if not nn.parameter.is_lazy(t) and not t.is_floating_point()
    ]
    return (layers, *_tree(module), *settings, *shapes, *kept)


def _tree(module: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """The names, classes and first names of all modules in it: a forward may look at names."""
    first: dict[int, str] = {}
    for name, m in module.named_modules(remove_duplicate=False):
        yield name, type(m), first.setdefault(id(m), name)
        yield from ((f"{name}.{key}", None, "") for key, c in m._modules.items() if c is None)


def _value_key(value: Any, holders: tuple[int, ...] = ()) -> Any:
    """Equal for equal settings; an object may hide from its repr what it does.

    Args:
        holders: the lists and dicts that hold it. One may hold itself.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if id(value) in holders:
        return id(value)
    holders += (id(value),)
    if isinstance(value, list | tuple):
        return type(value), *(_value_key(item, holders) for item in value)
    if isinstance(value, dict):
        items = value.items()
        return tuple((_value_key(k, holders), _value_key(v, holders)) for k, v in items)
    return id(value)
