"""All that a module holds, by value: what a call of it leaves behind shows in it."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Contents: TypeAlias = dict[str, Any]

# Its repr says all of a literal, also of a float that is no number.
_LITERALS = (bool, int, float, complex, str, bytes, type(None))
# Nothing is looked for in these: one is as it is for all that hold it.
_OPAQUE = (type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType)
_GONE = object()


def contents_of(module: nn.Module) -> Contents:
    """The values of its tensors, attributes and settings, and what objects in them hold.

    Keys are names as in `module.named_parameters()`, longer by what is inside. An object gives what
    it gives to pickle and to copy.deepcopy.
    """
    found: Contents = {}
    names: dict[int, str] = {}
    alive: list[Any] = []  # no id is given to two objects
    left: list[tuple[str, Any]] = [("", module)]
    while left:
        name, value = left.pop()
        if isinstance(value, _LITERALS):
            found[name] = type(value), repr(value)
        elif id(value) in names:
            found[name] = "the same as", names[id(value)]
        else:
            names[id(value)] = name
            alive.append(value)
            found[name], parts = _read(value)
            left += [(f"{name}.{key}" if name else key, part) for key, part in parts.items()]
    return found


def changed(before: Contents, after: Contents) -> Contents:
    """What is new, gone, or another value than before."""
    names = before.keys() | after.keys()
    return {
        name: after.get(name, _GONE)
        for name in sorted(names)
        if not _equal(before.get(name, _GONE), after.get(name, _GONE), 0.0)
    }


def equal(some: Contents, others: Contents, rounding: float) -> bool:
    """Whether both have the same names and values, but for the rounding of their largest entry."""
    return some.keys() == others.keys() and all(
        _equal(value, others[name], rounding) for name, value in some.items()
    )


def _equal(a: Any, b: Any, rounding: float) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return type(a) is type(b) and bool(a == b)
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if rounding and a.is_floating_point() and a.numel():
        return bool((a - b).abs().max() <= rounding * b.abs().max())
    return torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))  # NaNs are equal then


def _read(value: Any) -> tuple[Any, Mapping[str, Any]]:
    """What identifies it, and its parts."""
    own = type(value)
    if isinstance(value, nn.Module):
        held = (value._parameters, value._buffers, value._modules)
        attributes = {k: v for k, v in vars(value).items() if not any(v is d for d in held)}
        return own, {**_of_classes(own), **attributes, **held[0], **held[1], **held[2]}
    if isinstance(value, Tensor):
        marks = {k: v for k, v in vars(value).items() if not k.startswith("_dynamo")}
        return _tensor(value), marks
    if isinstance(value, _OPAQUE):
        return (own, id(value)), {}
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray) and value.dtype != object:
        return (own, value.dtype.str, value.shape, value.tobytes()), {}
    if isinstance(value, dict):
        keyed = {_key(k, i): v for i, (k, v) in enumerate(value.items())}
        return (own, tuple(keyed)), {**getattr(value, "__dict__", {}), **keyed}
    if isinstance(value, list | tuple):
        return (own, len(value)), {str(i): item for i, item in enumerate(value)}
    if isinstance(value, set | frozenset):
        return (own, frozenset(map(_atom, value))), {}
    return _object(value)


def _of_classes(own: type) -> dict[str, Any]:
    """What a forward may keep on the classes of a module."""
    return {
        f"{cls.__name__}.{name}": value
        for cls in own.__mro__
        if cls is not object and not cls.__module__.startswith("torch.")
        for name, value in vars(cls).items()
        if not name.startswith("__") and not callable(value) and not hasattr(value, "__get__")
    }


def _tensor(value: Tensor) -> Any:
    plain = value.layout is torch.strided and not value.is_nested and not value.is_quantized
    if type(value) not in (Tensor, nn.Parameter) or value.is_meta or not plain:
        return type(value), id(value)
    return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _object(value: Any) -> tuple[Any, Mapping[str, Any]]:
    own = type(value)
    of_torch = own.__module__.partition(".")[0] == "torch"
    if of_torch and own is not torch.Generator:  # a compiled function, say
        return (own, id(value)), {}
    try:
        reduced = value.__reduce_ex__(4)
    except Exception:  # a lock, say
        return (own, id(value)), getattr(value, "__dict__", {})
    if isinstance(reduced, str):  # a global's name
        return (own, reduced), {}
    make, args, state, items, pairs = (*reduced, None, None, None)[:5]
    parts: dict[str, Any] = {"()": (make, args)}
    for some in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        parts.update(some if isinstance(some, dict) else {"state": some})
    parts.update({"items": [*(items or ())], "pairs": [*(pairs or ())]})
    return own, {str(key): part for key, part in parts.items()}


def _key(key: Any, i: int) -> str:
    return str(key) if isinstance(key, _LITERALS) else f"key {i}"


def _atom(item: Any) -> Any:
    """An item of a set, whose order says nothing."""
    if isinstance(item, tuple):
        return tuple(map(_atom, item))
    return (type(item), repr(item)) if isinstance(item, _LITERALS) else id(item)
