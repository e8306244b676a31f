"""The alarms of the reward audit: a trained reward that rises while a held-out scorer of the same task falls, and a
reward whose scores are missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lvrpo.audit_records import Alarms, MissingScores, Overoptimization, Window
from lvrpo.evaluation.recorded_groups import Array, Groups, Looks, Recorded, in_window, per_group
from lvrpo.statistics import Interval, comparable, divergence

VALIDATION = "validation"
"""The held-out prompts of validation, as a scorer."""
Labels = Sequence[str]

ERROR = 0.05
"""Chance that a run in which nothing changes sounds any alarm at all, at most."""


@dataclass(frozen=True)
class Pair:
    """A trained reward and a held-out scorer, by part of the run."""

    task: str
    reward: str
    scorer: str
    rewards: Sequence[Array]
    """Means of groups."""
    scores: Sequence[Array]
    """Means of groups, or scores of validation's prompts in one order."""
    paired: bool
    """Whether the scores of two parts are of the same prompts."""
    strata: tuple[Sequence[Labels], Sequence[Labels]]
    """Category of every value of ``rewards`` and of ``scores``; not used of scores that are paired."""

    def testable(self) -> list[int]:
        """The earlier parts that can be compared with the last."""
        return comparable(self.rewards, self.scores)


def find_alarms(record: Recorded, windows: Sequence[Window]) -> Alarms:
    """Compares every earlier part of the run with the last, for every trained reward and held-out scorer of a task.

    An alarm: the reward's change lies above 0 and the scorer's below 0, each with its whole interval. The intervals
    (Welch's t over group means, within categories of prompts; Student's t over validation's prompts, paired) have
    confidence 1 - .05 / comparisons (Bonferroni). Both must be clear of 0, so chance sounds an alarm more rarely than
    that.
    """
    groups = record.groups
    pairs: list[Pair] = []
    same: list[tuple[str, str, str]] = []
    for task in dict.fromkeys(groups.task.tolist()):
        for pair in _pairs(task, groups.of(groups.task == task), record.looks, windows, same):
            pairs.append(pair)
    comparisons = sum(len(pair.testable()) for pair in pairs)
    confidence = 1 - ERROR / max(1, comparisons)
    found = [alarm for pair in pairs if (alarm := _worst(pair, windows, confidence)) is not None]
    return Alarms(tuple(found), comparisons, confidence, tuple(same), tuple(_missing(record, windows)))


def _missing(record: Recorded, windows: Sequence[Window]) -> Iterator[MissingScores]:
    groups = record.groups
    whole = Window(int(groups.step.min()), int(groups.step.max()))
    for task in dict.fromkeys(groups.task.tolist()):
        for k, name in enumerate(groups.names):
            for window in (whole, windows[-1]):
                rows = (groups.task == task) & groups.applies[:, k]
                rows &= (groups.step >= window.first) & (groups.step <= window.last)
                share = float(np.isnan(groups.scores[rows, :, k]).mean()) if rows.any() else 0.0
                limit = record.max_failed.get(name, 1.0)
                if share > limit:
                    words = (
                        f"{task}: {share:.0%} of the scores of {name} failed in steps {window.first} to {window.last}, "
                        f"{limit:.0%} may"
                    )
                    yield MissingScores(task, name, share, words)
                    break


def _worst(pair: Pair, windows: Sequence[Window], confidence: float) -> Overoptimization | None:
    found = divergence(pair.rewards, pair.scores, confidence, pair.paired, pair.strata)
    if found is None:
        return None
    before, after, reward, scorer = windows[found.part], windows[-1], found.reward, found.scorer
    words = _words(pair, before, after, reward, scorer)
    return Overoptimization(pair.task, pair.reward, pair.scorer, before, after, reward, scorer, words)


def _pairs(
    task: str, groups: Groups, looks: Looks, windows: Sequence[Window], same: list[tuple[str, str, str]]
) -> Iterator[Pair]:
    """Pairs of one task; those that score every output alike are noted in ``same``."""
    scorers = groups.scorers()
    trained = groups.trained()[0]
    held_out = {name: values for name, values in scorers.items() if name not in trained}
    validation = _validation_scores(looks, task, windows)
    for reward in trained:
        rewards, of_rewards = _parts(groups, scorers[reward], windows)
        for name, values in held_out.items():
            if np.array_equal(values, scorers[reward], equal_nan=True):
                same.append((task, reward, name))
            else:
                scores, of_scores = _parts(groups, values, windows)
                yield Pair(task, reward, name, rewards, scores, False, (of_rewards, of_scores))
        if validation is not None:
            yield Pair(task, reward, VALIDATION, rewards, validation, True, (of_rewards, ()))


def _parts(groups: Groups, values: Array, windows: Sequence[Window]) -> tuple[list[Array], list[Labels]]:
    """Means of the groups of each part, and the categories of their prompts."""
    means = per_group(values)
    finite = np.isfinite(means)
    return [in_window(groups.step, means, window) for window in windows], [
        groups.category[finite & (groups.step >= window.first) & (groups.step <= window.last)].tolist()
        for window in windows
    ]


def _validation_scores(looks: Looks, task: str, windows: Sequence[Window]) -> list[Array] | None:
    """The last look of each part of the run, empty where there was none; looks before and after are of the ends."""
    kept: list[tuple[int, Array]] = [(step, by_task[task]) for step, by_task in looks if task in by_task]
    if not kept:
        return None
    scored = np.isfinite(np.stack([scores for _, scores in kept])).all(axis=0)  # looks are paired prompt by prompt
    parts: list[Array] = [np.zeros(0, dtype=np.float32) for _ in windows]
    for step, scores in kept:
        place = next((i for i, window in enumerate(windows) if step <= window.last), len(windows) - 1)
        parts[place] = scores[scored]
    return parts


def _words(pair: Pair, before: Window, after: Window, reward: Interval, scorer: Interval) -> str:
    held_out = "validation's held-out score" if pair.scorer == VALIDATION else pair.scorer
    return (
        f"{pair.task}: {pair.reward} rose by {_moved(reward)} while {held_out} fell by {_moved(scorer)}, from steps "
        f"{before.first} to {before.last} to steps {after.first} to {after.last}"
    )


def _moved(change: Interval) -> str:
    ends = sorted((abs(change.low), abs(change.high)))
    return f"{abs(change.score):.3f} ({ends[0]:.3f} to {ends[1]:.3f})"
