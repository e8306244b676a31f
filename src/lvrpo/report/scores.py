"""The before/after table as the template draws it: numbers, and places on one common axis in percent of its width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lvrpo.records import BenchmarkResult, Estimate, Summary
from lvrpo.report.curves import nice_ticks
from lvrpo.report.verdict import label, task_order

MARGIN = 3.0
"""Percent of the axis kept free on each side, so that a dot at 0 or 1 is drawn whole."""


@dataclass(frozen=True)
class Whisker:
    """A dot with its interval."""

    kind: str
    """before, after or baseline."""
    estimate: Estimate
    at: float
    low: float
    high: float


@dataclass(frozen=True)
class ScoreRow:
    """One task or one category."""

    key: str
    label: str
    before: Estimate | None
    after: Estimate | None
    difference: Estimate | None
    baseline: Estimate | None
    baseline_difference: Estimate | None
    whiskers: tuple[Whisker, ...]
    categories: tuple[ScoreRow, ...] = ()
    metric: str = "success"
    """success or reward."""

    @property
    def n(self) -> int | None:
        shown = self.after or self.before
        return shown.n if shown else None


@dataclass(frozen=True)
class ScoreTable:
    """The rows of the results section and their common axis."""

    rows: tuple[ScoreRow, ...]
    ticks: tuple[tuple[float, str], ...]
    """(place in percent, label)."""
    baseline_name: str | None


def score_table(summary: Summary) -> ScoreTable:
    base = summary.baseline
    tables = [summary.before, summary.after] + ([base.after] if base else [])
    low, high = _range(tables)
    tasks = task_order(summary.before, summary.after, summary.difference)
    rows = tuple(_task_row(summary, task, low, high) for task in tasks)
    ticks = tuple((_place(v, low, high), f"{v:g}".replace("0.", ".", 1)) for v in nice_ticks(low, high, 4))
    return ScoreTable(rows, ticks, base.name if base else None)


def _range(tables: list[Mapping[str, BenchmarkResult]]) -> tuple[float, float]:
    """0 to 1, wider where a score lies outside."""
    every = [e for table in tables for entry in table.values() for e in (entry, *entry.categories.values())]
    values = [v for e in every for v in (e.score, e.low, e.high) if v is not None]
    return min(0.0, *values, 0.0), max(1.0, *values, 1.0)


def _task_row(summary: Summary, task: str, low: float, high: float) -> ScoreRow:
    base = summary.baseline
    tables = (
        summary.before,
        summary.after,
        summary.difference,
        base.after if base else {},
        base.difference if base else {},
    )
    entries = [table.get(task) for table in tables]
    names = dict.fromkeys(name for entry in entries if entry for name in entry.categories)
    categories = tuple(
        _row(
            name,
            name.replace("_", " "),
            [entry.categories.get(name) if entry else None for entry in entries],
            low,
            high,
        )
        for name in names
    )
    metric = next((entry.metric for entry in entries if entry), "success")
    row = _row(task, label(task), list(entries), low, high, categories)
    return replace(row, metric=metric)


def _row(
    key: str,
    text: str,
    estimates: list[Estimate | None],
    low: float,
    high: float,
    categories: tuple[ScoreRow, ...] = (),
) -> ScoreRow:
    before, after, difference, baseline, baseline_difference = estimates
    drawn = (("before", before), ("baseline", baseline), ("after", after))
    whiskers = tuple(_whisker(kind, e, low, high) for kind, e in drawn if e is not None)
    return ScoreRow(key, text, before, after, difference, baseline, baseline_difference, whiskers, categories)


def _whisker(kind: str, estimate: Estimate, low: float, high: float) -> Whisker:
    ends = [estimate.score if end is None else end for end in (estimate.low, estimate.high)]
    at, left, right = (_place(v, low, high) for v in (estimate.score, *ends))
    return Whisker(kind, estimate, at, left, right)


def _place(value: float, low: float, high: float) -> float:
    return round(MARGIN + (100 - 2 * MARGIN) * (value - low) / (high - low), 2)
