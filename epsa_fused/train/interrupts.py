"""Ctrl-C and the signals that end programs, as a flag that the training looks at between steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Self

# A terminal's Ctrl-C, a scheduler's notice, a terminal that was closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A context in which :data:`SIGNALS` set `pending`; a second Ctrl-C has its usual effect.

    Schedulers send SIGTERM before they take a machine away, and torchrun passes it on: one that
    signals every process reaches this one twice, so SIGTERM stays noted. SIGKILL remains. A signal
    that is ignored stays so: nohup has SIGHUP ignored.

    Python lets only the main thread choose what signals do: in another one they are left alone.
    """

    def __init__(self) -> None:
        self.pending = False

    def __enter__(self) -> Self:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # None: a handler of another language, which could not be put back
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
