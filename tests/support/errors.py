"""Bad input: one change to a good call, and the error that it must raise.

A table gives a name to each row (change, words), where `words` is a regular expression. `raising`
adds the exception. Arguments are a dictionary in the order of the operator's schema.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.cases import memory_of
from torch import Tensor

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


@dataclass(frozen=True)
class Bad:
    change: Change
    words: str
    error: type[Exception]


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


ON_META = tensors(lambda t: t.to("meta"))


# ---- the test of a row ----


def assert_raises(
    operator: Callable, bad: Bad, good: Callable[[], Arguments], *, requires_grad: bool = False
) -> None:
    """With the operator's name and the row's words. No input is written, and the next good call
    gives what it gave before."""
    with torch.no_grad():
        expected = torch.utils._pytree.tree_leaves(operator(*good().values()))
    wrong = bad.change(good())
    given = tensors_of(wrong)
    if requires_grad:
        given = [t.requires_grad_() for t in given if t.is_floating_point()]
    given = [t for t in given if not t.is_meta]
    before = [memory_of(t).clone() for t in given]
    name = operator._schema.name.removeprefix("epsa_fused::")
    with pytest.raises(bad.error, match=f"^{name}: {bad.words}"):
        operator(*wrong.values())
    assert all(torch.equal(memory_of(t), old) for t, old in zip(given, before, strict=True))
    with torch.no_grad():
        again = torch.utils._pytree.tree_leaves(operator(*good().values()))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def assert_same_words_on_meta(operator: Callable, bad: Bad, good: Callable[[], Arguments]) -> None:
    """Without data the same row raises the same error, word for word."""
    wrong = bad.change(good())
    with pytest.raises(bad.error) as with_data:
        operator(*wrong.values())
    with pytest.raises(bad.error) as on_meta:
        operator(*ON_META(wrong).values())
    assert str(on_meta.value) == str(with_data.value)
