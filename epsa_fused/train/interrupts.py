"""Ctrl-C and SIGTERM as a flag that the training looks at between two steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any, Self


class Interrupts:
    """A context in which SIGINT and SIGTERM set `pending`; a second Ctrl-C has its usual effect.

    Schedulers send SIGTERM before they take a machine away, and torchrun passes it on: one that
    signals every process reaches this one twice, so SIGTERM stays noted. SIGKILL remains.
    """

    def __init__(self) -> None:
        self.pending = False

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
