"""Handling of Ctrl-C and SIGTERM: the first stops the run after the step with a checkpoint, the second immediately."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """The run stopped on request after writing a checkpoint; the message says how to resume."""


def print_stopping() -> None:
    """Prints a notice, unbuffered because a signal handler may interrupt another print."""
    with suppress(OSError):
        os.write(1, b"\nstopping after this step; press Ctrl-C again to stop at once\n")


class InterruptHandler:
    """Inside the context, the first signal is recorded and ``notify`` called; calling the object returns whether."""

    def __init__(self, notify: Callable[[], object] = lambda: None) -> None:
        self.requested = False
        self.notify = notify
        self._handlers: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
        self._handlers.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.notify()
