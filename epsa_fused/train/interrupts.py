"""Ctrl-C and the signals that end programs, as a flag that the training reads between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from typing_extensions import Self

# Ctrl-C in a terminal, a scheduler's notice, a closed terminal.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A context in which :data:`SIGNALS` set `pending`; a second Ctrl-C has its usual effect.

    SIGTERM stays noted: a scheduler that signals every process reaches this one twice, since
    torchrun passes the signal on. Ignored signals stay ignored, as SIGHUP under nohup.

    Outside the main thread Python allows no handlers, and signals are left alone.
    """

    def __init__(self) -> None:
        self.pending = False

    def __enter__(self) -> Self:
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None stands for a handler of another language, which cannot be restored.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])
