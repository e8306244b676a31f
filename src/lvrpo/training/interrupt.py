"""Ctrl-C and SIGTERM: the first lets the step finish and a checkpoint be written, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """The run stopped on request, with a checkpoint written; the message says where and how to go on."""


def say_stopping() -> None:
    """Tells whoever looks at the terminal; unbuffered, for a handler may come in the middle of another print."""
    with suppress(OSError):
        os.write(1, b"\nstopping after this step; once more stops at once\n")


class Interruption:
    """While the context lasts, a signal is noted, and ``notify`` called; calling the object tells whether one came."""

    def __init__(self, notify: Callable[[], object] = lambda: None) -> None:
        self.requested = False
        self.notify = notify
        self._handlers: dict[signal.Signals, object] = {}

    def __call__(self) -> bool:
        return self.requested

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave
        self._handlers.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self.notify()
