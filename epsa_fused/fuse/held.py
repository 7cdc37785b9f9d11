"""What a model holds outside of PyTorch's tree of modules, by which it may call a module, too."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Mapping
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from ..modules.layers import STATE

# What put_in_place changes. A class of a user's own may do anything when it is read or changed.
_DICTS = (dict, OrderedDict, defaultdict)
_CONTAINERS = (*_DICTS, list, set, deque, tuple, frozenset)
_LITERALS = (int, float, str, bool, bytes, complex, type(None))
# Containers in containers beyond that are not changed.
_DEEPEST = 50
_COMPILED = "torch.compile wraps it, and keeps its call; fuse it before it is compiled"


class Held:
    """The modules that a model reaches, also by plain lists, dicts and attributes.

    Args:
        model: any module.
        closed: modules whose attributes do not count, nor those of what they hold.

    Attributes:
        modules: all of them, with those of the tree.
        why_stays: for each name of a module that is held where nothing can be put in its place, the
            reason. A copy of the model may hold the same module there, not a copy of it.
    """

    def __init__(self, model: nn.Module, closed: Iterable[nn.Module]) -> None:
        self.modules: list[nn.Module] = []
        self.why_stays: dict[str, str] = {}
        self._stays: dict[nn.Module, str] = {}
        self._names = {m: name for name, m in model.named_modules()}
        self._closed = {m for module in closed for m in module.modules()}
        self._seen: set[tuple[int, bool]] = set()
        self._found: list[tuple[Any, str, bool, int]] = [(model, "", False, 0)]
        while self._found:
            self._look(*self._found.pop())
        for name, module in model.named_modules(remove_duplicate=False):
            if module in self._stays:
                self.why_stays[name] = self._stays[module]

    def _look(self, value: Any, why: str, fixed: bool, depth: int) -> None:
        """Look at what is held, and note what it holds.

        Args:
            value: anything.
            why: the reason to leave it where it is fixed.
            fixed: whether nothing can be put in its place.
            depth: of containers in containers.
        """
        if (id(value), fixed) in self._seen:
            return
        self._seen.add((id(value), fixed))
        if not is_module(value):
            changeable, others = _contents(value)
            fixed_too = fixed or depth >= _DEEPEST
            self._found += [(v, why, fixed_too, depth + 1) for v in changeable]
            self._found += [(v, why, True, depth + 1) for v in others]
        elif fixed and value in self._names:
            self._stays.setdefault(value, why)  # what it holds is in the tree
        else:
            if not fixed:
                self.modules.append(value)
                self._look_at_attributes(value)
            self._found += [(child, why, fixed, 0) for _, child in value._modules.items()]

    def _look_at_attributes(self, module: nn.Module) -> None:
        if _is_wrapper(module):
            self._found.append((module._modules["_orig_mod"], _COMPILED, True, 0))
        holder = self._names.get(module) or type(module).__name__
        for key, value in self.attributes(module).items():
            why = f"{holder} holds it in {key} too, where nothing can be put in its place"
            self._found.append((value, why, False, 0))

    def attributes(self, module: nn.Module) -> dict[str, Any]:
        """Those of its class that count. Hooks may hold modules that they watch, and do not."""
        if module in self._closed or _is_wrapper(module):
            return {}
        return {key: value for key, value in vars(module).items() if key not in STATE}


def _is_wrapper(module: nn.Module) -> bool:
    """Whether it is what torch.compile makes of a module; to import its class takes a second."""
    return type(module).__name__ == "OptimizedModule"


def is_module(value: Any) -> bool:
    """Not by isinstance, which asks the object: a proxy answers for another one, or fails."""
    return issubclass(type(value), nn.Module)


def _contents(value: Any) -> tuple[Iterable[Any], Iterable[Any]]:
    """What a value holds and :func:`put_in_place` replaces; and what else it holds."""
    kind = type(value)
    if kind in _CONTAINERS:
        return [v for v in _items(value) if type(v) not in _LITERALS], ()
    if issubclass(kind, tuple):  # of a class of its own
        return (), tuple.__iter__(value)
    if kind is MethodType:
        return (), (value.__self__,)
    if kind is partial:
        return (), (value.func, *value.args, *value.keywords.values())
    if kind is FunctionType:
        return (), [held for cell in value.__closure__ or () for held in _of_cell(cell)]
    return (), ()


def _items(container: Any) -> list[Any]:
    if type(container) in _DICTS:
        return [v for item in container.items() for v in item]
    return list(container)


def _of_cell(cell: CellType) -> list[Any]:
    try:
        return [cell.cell_contents]
    except ValueError:  # it is empty
        return []


def put_in_place(
    value: Any, new: Mapping[nn.Module, nn.Module], done: dict[int, Any], depth: int = 0
) -> Any:
    """`value` with new[module] for each of its keys in it. What can change stays the same object.

    Args:
        value: anything; containers are looked into.
        new: what replaces modules.
        done: the results for containers so far, by their ids.
        depth: of containers in containers.
    """
    if is_module(value):
        return new.get(value, value)
    if type(value) not in _CONTAINERS or id(value) in done or depth > _DEEPEST:
        return done.get(id(value), value)
    done[id(value)] = value  # it may hold itself
    before = _items(value)
    after = [v if type(v) in _LITERALS else put_in_place(v, new, done, depth + 1) for v in before]
    if all(a is b for a, b in zip(after, before, strict=True)):
        return value
    if type(value) is list:
        value[:] = after
    elif type(value) in _DICTS:
        value.clear()
        value.update(zip(after[::2], after[1::2], strict=True))
    elif type(value) in (set, deque):
        add = value.update if type(value) is set else value.extend
        value.clear()
        add(after)
    else:
        done[id(value)] = type(value)(after)
    return done[id(value)]
