"""Scores of rewards that wait for other programs, computed in a thread while the policy samples further groups.

One thread for all rewards of a process: a reward is never called by two threads at once.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple
from weakref import WeakSet

import torch

from lvrpo.rewards.base import Scores
from lvrpo.types import Group, TextSegment

Key = tuple[int, ...]
Score = Callable[[Sequence[Group]], tuple[Sequence[Group], Scores]]
"""Returns the groups that a reward applies to, and their scores."""
_thread = ThreadPoolExecutor(1, thread_name_prefix="rewards")
_calls: WeakSet[threading.Event] = WeakSet()


def cancellation() -> threading.Event:
    """An event for a call that waits; it is set when nobody wants the result any more."""
    event = threading.Event()
    _calls.add(event)
    return event


def cancel_calls() -> None:
    """Ends all calls that wait, as the run was interrupted or failed."""
    for event in list(_calls):
        event.set()


def wait_for_early_scores() -> None:
    """Returns when the thread has nothing left to do; an interruption ends its calls."""
    try:
        _thread.submit(int).result()
    except BaseException:
        cancel_calls()
        raise


class _Row(NamedTuple):
    """Of one group."""

    group: Group
    """Kept, so that the ids in its key stay those of its objects."""
    values: torch.Tensor
    failures: dict[int, str]


class EarlyScores:
    """The early scores of one reward; they are taken once."""

    def __init__(self) -> None:
        self._queue: deque[Group] = deque()
        self._results: list[Future[dict[Key, _Row]]] = []

    def submit(
        self, groups: Sequence[Group], score: Callable[[Sequence[Group]], tuple[Sequence[Group], Scores]]
    ) -> None:
        """Scores groups in the thread; those that are submitted while it is busy share its next call.

        ``score`` returns the groups that the reward applies to, and their scores.
        """
        self._queue.extend(groups)
        self._results.append(_thread.submit(self._score_queue, score))

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

        So what a reward raises is raised where it would be without the thread. After ``wait_for_early_scores``.
        """
        results, self._results = self._results, []
        found = {key: row for result in results if result.exception() is None for key, row in result.result().items()}
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
