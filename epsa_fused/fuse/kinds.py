"""Which modules are of one kind: one trial tells of all of them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modules.adopted import PSALayers

# Every module has these attributes; the others are settings of its class.
_STATE = vars(nn.Module()).keys()


def key_of(module: nn.Module, layers: PSALayers) -> tuple[Any, ...]:
    """Classes, settings and shapes: modules with equal ones compute the same function."""
    settings = [
        (name, key, _value_key(value))
        for name, m in module.named_modules()
        for key, value in sorted(vars(m).items())
        if key not in _STATE
    ]
    shapes = [(name, p.shape, p.dtype) for name, p in module.named_parameters()]
    kept = [  # a trial has other values of floating point, and these as they are
        (name, repr(t) if t.numel() == 1 else id(t))
        for name, t in module.named_buffers()
        if not t.is_floating_point()
    ]
    return (layers, *(type(m) for m in module.modules()), *settings, *shapes, *kept)


def _value_key(value: Any) -> Any:
    """Equal for equal settings; an object may hide from its repr what it does."""
    if value is None or isinstance(value, bool | int | float | str):
        return type(value), value
    if isinstance(value, list | tuple):
        return type(value), *map(_value_key, value)
    if isinstance(value, dict):
        return tuple((_value_key(k), _value_key(v)) for k, v in value.items())
    return id(value)


def attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """What a forward may keep on its modules."""
    return {
        (name, key): _value_key(value)
        for name, m in module.named_modules()
        for key, value in vars(m).items()
        if key not in _STATE
    }
