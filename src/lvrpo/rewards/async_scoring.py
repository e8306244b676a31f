"""Asynchronous scoring: rewards that wait for other programs run in a thread while the policy samples further groups.

One thread for all rewards of a process: a reward is never called by two threads at once.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar
from weakref import WeakSet

import torch

from lvrpo.rewards.base import Scores
from lvrpo.types import Group, TextSegment

Key = tuple[int, ...]
Score = Callable[[Sequence[Group]], tuple[Sequence[Group], Scores]]
"""Returns the groups that a reward applies to, and their scores."""
T = TypeVar("T")


class _Worker:
    """A thread that runs calls in order. It is a daemon: an interpreter that ends does not wait for what it does."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self._calls: SimpleQueue[tuple[int, Future[Any], Callable[[], Any]]] = SimpleQueue()  # Any: of each its own
        self._lock = threading.Lock()
        self._events: WeakSet[threading.Event] = WeakSet()
        self._generation = self._running = 0

    @property
    def is_current(self) -> bool:
        """Whether this code runs in its thread."""
        return threading.current_thread() is self.thread

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The result of a call, once those before it are done; it is cancelled by ``cancel``."""
        future: Future[T] = Future()
        self._calls.put((self._generation, future, call))
        if self.thread is None:
            self.thread = threading.Thread(target=self._run, name="rewards", daemon=True)
            self.thread.start()
        return future

    def _run(self) -> None:
        while True:
            self._running, future, call = self._calls.get()
            if self._running != self._generation:
                future.cancel()
                continue
            try:
                result = call()
            except BaseException as error:  # of whoever waits for the result
                future.set_exception(error)
            else:
                future.set_result(result)

    def event(self) -> threading.Event:
        """An event that ``cancel`` sets, now or, for a call of a cancelled one, at once."""
        event = threading.Event()
        with self._lock:
            self._events.add(event)
            if self.is_current and self._running != self._generation:
                event.set()
        return event

    def cancel(self) -> None:
        """Sets all events and cancels the calls that have not begun."""
        with self._lock:
            self._generation += 1
            for event in self._events:
                event.set()


_worker = _Worker()
if hasattr(os, "register_at_fork"):  # a thread does not survive a fork
    os.register_at_fork(after_in_child=_worker.__init__)


def cancellation() -> threading.Event:
    """An event for a call that waits; it is set when nobody wants the result any more."""
    return _worker.event()


def cancel_calls() -> None:
    """Ends all calls that wait and forgets those not begun, as the run was interrupted or failed."""
    if not _worker.is_current:  # a reward may score with others: its failure is its own
        _worker.cancel()


def wait_for_async_scores() -> None:
    """Returns when the thread has nothing left to do; at once in that thread itself."""
    if _worker.thread is not None and not _worker.is_current:
        _worker.submit(int).result()


class _Row(NamedTuple):
    """Of one group."""

    group: Group
    """Kept, so that the ids in its key stay those of its objects."""
    values: torch.Tensor
    failures: dict[int, str]


class AsyncScores:
    """The scores of one reward that were computed in the thread; they are taken once."""

    def __init__(self) -> None:
        self._queue: deque[Group] = deque()
        self._results: list[Future[dict[Key, _Row]]] = []

    def submit(self, groups: Sequence[Group], score: Score) -> None:
        """Scores groups in the thread; those that are submitted while it is busy share its next call."""
        self._queue.extend(groups)
        self._results.append(_worker.submit(lambda: self._score_queue(score)))

    def _score_queue(self, score: Score) -> dict[Key, _Row]:
        groups = [self._queue.popleft() for _ in range(len(self._queue))]
        if not groups:
            return {}
        chosen, scores = score(groups)
        values = torch.as_tensor(scores.values, dtype=torch.float32).detach().cpu()
        if values.shape != (len(chosen), len(groups[0])):
            return {}
        rows = [_Row(group, values[p], {}) for p, group in enumerate(chosen)]
        for (p, g), reason in scores.failures.items():
            rows[p].failures[g] = reason
        return {_key(row.group): row for row in rows}

    def take(self, groups: Sequence[Group]) -> Scores | None:
        """The scores of groups that were all submitted and scored, else None: they are then scored as usual.

        So what a reward raises is raised where it would be without the thread. After ``wait_for_async_scores``.
        """
        results, self._results = self._results, []
        done = [result for result in results if result.done() and not result.cancelled()]
        found = {key: row for result in done if result.exception() is None for key, row in result.result().items()}
        keys = [_key(group) for group in groups]
        if not found or any(key not in found for key in keys):
            return None
        rows = [found[key] for key in keys]
        failures = {(p, g): why for p, row in enumerate(rows) for g, why in row.failures.items()}
        return Scores(torch.stack([row.values for row in rows]), failures)

    def discard(self) -> None:
        """Forgets all submitted groups."""
        self._queue.clear()
        self._results.clear()


def _key(group: Group) -> Key:
    """The objects that a reward sees: the prompt, and the texts and images of all members."""
    outputs = [s.text if isinstance(s, TextSegment) else s.image for t in group.trajectories for s in t.segments]
    return (id(group.prompt), *map(id, outputs))
