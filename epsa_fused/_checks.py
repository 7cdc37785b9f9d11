"""Checks of public arguments. Each kind of wrong value has one message: what was expected, and what
was given, but never the values of a tensor or an array."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

# A longer literal is cut in a message.
_LONGEST = 60
# Of any size: products of larger ones could overflow.
MOST = 2**31 - 1


def given(value: object) -> str:
    """What a message says of a wrong value: a literal as it is, of all else the type."""
    items = value if isinstance(value, list | tuple) else (value,)
    if all(item is None or isinstance(item, bool | int | float | str) for item in items):
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"an object of type {module}{kind.__qualname__}"


def first_line(error: Exception) -> str:
    """What an error says, for a message of one line."""
    return (text_of(error).splitlines() or [type(error).__name__])[0]


def text_of(error: Exception) -> str:
    """What an error of foreign code says, whose text may raise one itself."""
    try:
        return str(error)
    except Exception:
        return ""


def check_int(name: str, value: object, least: int | None = None, most: int = MOST) -> None:
    """Raise TypeError or ValueError unless the argument `name` is an int in [least, most].

    A bool is no int here, and neither is an integer of numpy, which torch.compile cannot trace.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {given(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most}, got {value}")


def check_ints(name: str, values: object, least: int | None = None) -> None:
    """The same for a sequence of ints; the message names the wrong one as name[i]."""
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise TypeError(f"{name}: expected a sequence of ints, got {given(values)}")
    for i, value in enumerate(values):
        check_int(f"{name}[{i}]", value, least)


def check_number(name: str, value: object) -> None:
    """Raise TypeError unless the argument `name` is an int or a float."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number, got {given(value)}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless the argument `name` is a bool. Texts like "no" would be true."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {given(value)}")


def check_callable(name: str, value: object) -> None:
    """Raise TypeError unless the argument `name` can be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a callable, got {given(value)}")


def check_module(name: str, value: object) -> None:
    """Raise TypeError unless the argument `name` is a module."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name}: expected a torch.nn.Module, got {given(value)}")


def check_modules(name: str, values: object) -> None:
    """The same for an iterable of modules that can be read twice; the message names name[i]."""
    if not isinstance(values, Sequence | nn.ModuleList):
        raise TypeError(f"{name}: expected a sequence of torch.nn.Module, got {given(values)}")
    for i, value in enumerate(values):
        check_module(f"{name}[{i}]", value)


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless the argument `name` is a Tensor, or stands for one in a trace."""
    if not isinstance(value, Tensor) and not hasattr(type(value), "__torch_function__"):
        raise TypeError(f"{name}: expected a Tensor, got {given(value)}")
