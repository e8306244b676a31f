"""The result of a run: the headline, and the table of scores before and after on one common axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lvrpo.records import Estimate, Summary
from lvrpo.report.charts import nice_ticks
from lvrpo.report.formatting import change, duration, in_sentence, label, score, task_order
from lvrpo.report.run import RunRecord

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
    every = [e for table in tables for entry in table.values() for e in (entry, *entry.categories.values())]
    values = [v for e in every for v in (e.score, e.low, e.high) if v is not None]
    low, high = min(0.0, *values, 0.0), max(1.0, *values, 1.0)  # wider than 0 to 1 where a score lies outside

    def place(value: float) -> float:
        return round(MARGIN + (100 - 2 * MARGIN) * (value - low) / (high - low), 2)

    rows = tuple(
        _task_row(summary, task, place) for task in task_order(summary.before, summary.after, summary.difference)
    )
    ticks = tuple((place(v), f"{v:g}".replace("0.", ".", 1)) for v in nice_ticks(low, high, 4))
    return ScoreTable(rows, ticks, base.name if base else None)


def _task_row(summary: Summary, task: str, place: Callable[[float], float]) -> ScoreRow:
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
    inner = {name: [entry.categories.get(name) if entry else None for entry in entries] for name in names}
    categories = tuple(_row(name, name.replace("_", " "), each, place) for name, each in inner.items())
    metric = next((entry.metric for entry in entries if entry), "success")
    return replace(_row(task, label(task), entries, place), categories=categories, metric=metric)


def _row(key: str, text: str, estimates: Sequence[Estimate | None], place: Callable[[float], float]) -> ScoreRow:
    before, after, difference, baseline, baseline_difference = estimates
    whiskers = []
    for kind, estimate in (("before", before), ("baseline", baseline), ("after", after)):
        if estimate is not None:
            ends = (estimate.score if end is None else end for end in (estimate.low, estimate.high))
            whiskers.append(Whisker(kind, estimate, *map(place, (estimate.score, *ends))))
    return ScoreRow(key, text, before, after, difference, baseline, baseline_difference, tuple(whiskers))


VERBS = {"up": "rose", "down": "fell", "flat": "did not clearly change:", "unsure": "went"}


@dataclass(frozen=True)
class Verdict:
    """The headline and the lines under it."""

    headline: str
    tone: str
    """up, down, flat or open (no final evaluation)."""
    lines: tuple[tuple[str, str], ...] = ()
    """(up | down | flat | note, sentence)."""


def verdict(run: RunRecord) -> Verdict:
    if run.summary is None or not run.summary.after:
        return _open_verdict(run)
    summary = run.summary
    tasks = task_order(summary.after)
    known = [t for t in tasks if t in summary.difference]
    if not known:
        task = tasks[0]
        value = score(summary.after[task].score, 2)
        return Verdict(f"{_cap(in_sentence(task))} stands at {value}; there is no difference to a base.", "flat")
    lead, rest = known[0], known[1:]
    fallen = [t for t in rest if summary.difference[t].direction == "down"]
    headline = _sentence(summary, lead)
    if fallen:
        named = _listed([in_sentence(t) for t in fallen])
        headline += f", but {named} fell" if summary.difference[lead].direction == "up" else f"; {named} fell too"
    lines = [(_tone(summary, t), _sentence(summary, t) + ".") for t in rest]
    lines.sort(key=lambda line: ("down", "up", "flat").index(line[0]))
    note = _baseline_note(summary, lead)
    return Verdict(headline + ".", "down" if fallen else _tone(summary, lead), (*lines, *note))


def _sentence(summary: Summary, task: str) -> str:
    difference = summary.difference[task]
    before, after = summary.before.get(task), summary.after.get(task)
    if before is None or after is None:
        return f"{_cap(in_sentence(task))} changed by {change(difference)}"
    what = " (mean reward)" if after.metric == "reward" else ""
    values = f"{score(before.score, 2)} to {score(after.score, 2)} ({change(difference)})"
    joint = "" if difference.direction == "flat" else " from"
    return f"{_cap(in_sentence(task))}{what} {VERBS[difference.direction]}{joint} {values}"


def _tone(summary: Summary, task: str) -> str:
    direction = summary.difference[task].direction
    return "flat" if direction == "unsure" else direction


def _baseline_note(summary: Summary, lead: str) -> list[tuple[str, str]]:
    baseline = summary.baseline
    if baseline is None or lead not in baseline.after:
        return []
    reached = f"{_cap(baseline.name)} from the same base reached {score(baseline.after[lead].score, 2)}"
    if lead in baseline.difference:
        reached += f" ({change(baseline.difference[lead])})"
    return [("note", f"{reached} in {in_sentence(lead)}.")]


def _open_verdict(run: RunRecord) -> Verdict:
    """The headline without a final evaluation: the progress of the training."""
    headline = "No final evaluation yet: this run is still going on or was stopped."
    if run.finished:
        headline = "Finished; no held-out rows were measured before and after."
    if run.metrics.last_step is None:
        return Verdict(headline, "open", (("note", "No finished step is on record."),))
    row = run.metrics.rows[-1]
    lines = [("note", f"The last step on record is {run.metrics.last_step}.")]
    seconds, left = row.get("seconds"), row.get("seconds_left")
    if isinstance(seconds, int | float) and isinstance(left, int | float) and not run.finished:
        lines = [("note", f"{lines[0][1]} It was written after {duration(seconds)}, with {duration(left)} left.")]
    for key in run.metrics.numeric_keys():
        if not key.startswith("reward/"):
            continue
        rewards = [value for _, value in run.metrics.series(key)][-5:]
        controls = [value for _, value in run.metrics.series("control/" + key.removeprefix("reward/"))][-5:]
        text = f"Reward {key.removeprefix('reward/')}: {score(sum(rewards) / len(rewards))}"
        if controls:
            text += f"; the base on the same prompts: {score(sum(controls) / len(controls))}"
        lines.append(("note", f"{text} (mean of the last {len(rewards)} steps)."))
    return Verdict(headline, "open", tuple(lines))


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
