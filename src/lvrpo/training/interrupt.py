"""Ctrl-C and SIGTERM: the first lets the step finish and a checkpoint be written, the second ends at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self


class Interrupted(KeyboardInterrupt):
    """The run stopped on request, with a checkpoint written; the message says where and how to go on."""


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
