"""Bad input: one change to a good call, and the error that it must raise.

A table gives a name to each row (change, words), where `words` is a regular expression. `raising`
adds the exception. Arguments are a dictionary in the order of the operator's schema.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


@dataclass(frozen=True)
class Bad:
    change: Change
    words: str
    error: type[Exception]

    @property
    def of_one_device(self) -> bool:
        """RuntimeError is that of tensors on different devices alone."""
        return self.error is not RuntimeError


@dataclass(frozen=True)
class Refusals:
    """An operator, its good arguments on a device, and the rows that it refuses."""

    operator: Callable
    good: Callable[[str], Arguments]
    bad: dict[str, Bad]
    devices: tuple[str, ...] = ("cpu",)
    differentiable: bool = True

    @property
    def name(self) -> str:
        return self.operator._schema.name.removeprefix("epsa_fused::")


def raising(error: type[Exception], table: dict[str, tuple[Change, str]]) -> dict[str, Bad]:
    return {name: Bad(change, words, error) for name, (change, words) in table.items()}


# ---- changes ----


def at(name: str, change: Callable[[Any], Any]) -> Change:
    """One argument, where the operator has it."""
    return lambda a: a | {name: change(a[name])} if name in a else a


def item(name: str, index: int, change: Callable[[Any], Any]) -> Change:
    """One entry of a list."""
    return at(name, lambda given: [change(v) if i == index else v for i, v in enumerate(given)])


def each(name: str, change: Callable[[Any], Any]) -> Change:
    """Every entry of a list."""
    return at(name, lambda given: [change(v) for v in given])


def put(name: str, value: Any) -> Change:
    return at(name, lambda _: value)


def both(*changes: Change) -> Change:
    return lambda a: functools.reduce(lambda given, change: change(given), changes, a)


def shaped(*shape: int) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.ones(shape, dtype=t.dtype, device=t.device)


def tensors(change: Callable[[Tensor], Tensor]) -> Change:
    """Every tensor."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(v) for v in value]
        return change(value) if isinstance(value, Tensor) else value

    return lambda a: {name: changed(value) for name, value in a.items()}


def tensors_of(arguments: Arguments) -> list[Tensor]:
    found: list[Tensor] = []
    tensors(lambda t: found.append(t) or t)(arguments)
    return found


def on_meta(t: Tensor) -> Tensor:
    return t.to("meta")


# the device of good arguments, in words of errors
HERE = r"(cpu|cuda:\d)"
