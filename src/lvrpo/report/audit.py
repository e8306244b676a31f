"""The reward audit as the template draws it, from ``audit.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lvrpo.audit_records import MIN_GROUPS, Change, GroupAudit, RewardAudit, RewardRanking, ScorerAudit, Series
from lvrpo.errors import InputError
from lvrpo.reading import path_exists, read_json
from lvrpo.records import Estimate, from_json, number
from lvrpo.report.charts import TASK_NAMES, Chart, Points, line_chart
from lvrpo.report.formatting import label
from lvrpo.statistics import Interval

NAMES = {
    "tokens": "tokens written",
    "cut_off": "share of texts cut off",
    "text_diversity": "share of a group's texts that differ",
    "picture_diversity": "difference of a group's pictures",
    "red": "mean red",
    "green": "mean green",
    "blue": "mean blue",
}
"""Display names of properties; other names are shown as they are."""


@dataclass(frozen=True)
class ScorerRow:
    """One row of the table of variance shares."""

    name: str
    weight: float | None
    """None: held out."""
    variance_shares: tuple[float | None, ...]
    """Share, configured share, share under the other formula."""
    degenerate: tuple[float | None, ...]
    """Shares of groups: constant, all best, all worst; share of outputs: missing."""


@dataclass(frozen=True)
class MeanRow:
    """One row of the table of means."""

    name: str
    is_score: bool
    """Whether up is good; a trait of the outputs is neither good nor bad."""
    first: float | None
    last: float | None
    difference: Estimate | None
    control: float | None


@dataclass(frozen=True)
class Correlations:
    """A table of correlations inside groups; None for fewer than ``MIN_GROUPS`` groups."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@dataclass(frozen=True)
class RankingRow:
    """One row of the table of rankings; None for fewer than ``MIN_GROUPS`` groups."""

    name: str
    """Name of a reward, or of a category of prompts."""
    is_category: bool
    rank: Estimate | None
    auc: Estimate | None
    first: float | None
    """AUC in the first part of the run, where that is known."""
    last: float | None
    change: Estimate | None


@dataclass(frozen=True)
class AuditPanel:
    """The audit of one task."""

    label: str
    groups: int
    with_signal: float | None
    rest: float | None
    scorers: tuple[ScorerRow, ...]
    means: tuple[MeanRow, ...]
    rankings: tuple[RankingRow, ...]
    verifier: str
    """The verifier of ``RankingRow.rank``."""
    correlations: Correlations
    shares: tuple[Chart, ...]
    """The variance share of each reward beside its configured share."""
    others: tuple[Chart, ...]
    """Validity, constant groups, and traits of the outputs beside those of the base."""


@dataclass(frozen=True)
class Audit:
    """``audit.json``."""

    formula: str
    other_formula: str
    steps: str
    first: str
    last: str
    tasks: tuple[AuditPanel, ...]
    alarms: tuple[str, ...]
    """Alarms of both kinds."""
    overoptimized: bool
    """Whether one of them is of a reward that rose while a held-out score fell."""
    comparisons: int


def read_audit(path: Path, problems: list[str]) -> Audit | None:
    """The audit, or None where the run has none; unreadable files are added to ``problems``."""
    if not path_exists(path):
        return None
    try:
        return _audit(from_json(RewardAudit, read_json(path, finite=False), str(path)))
    except InputError as error:
        problems.append(f"{path.name} could not be read ({error}): lvrpo report writes it anew.")
        return None


def _audit(audit: RewardAudit) -> Audit:
    first, last = (f"steps {window.first} to {window.last}" for window in (audit.windows[0], audit.windows[-1]))
    every = audit.steps.last - audit.steps.first + 1
    complete = audit.recorded >= every
    return Audit(
        formula=audit.formula,
        other_formula=audit.other_formula,
        steps="All steps are on record" if complete else f"{audit.recorded:,} of {every:,} steps are on record",
        first=first,
        last=last,
        tasks=tuple(_task(task, found) for task, found in audit.tasks.items()),
        alarms=tuple(alarm.words for alarm in (*audit.alarms.missing, *audit.alarms.found)),
        overoptimized=bool(audit.alarms.found),
        comparisons=audit.alarms.comparisons,
    )


def _task(task: str, audit: GroupAudit) -> AuditPanel:
    scorers = tuple(_scorer_row(each) for each in audit.scorers)
    means = [_mean_row(each.name, each.mean, is_score=True) for each in audit.scorers]
    means += [_mean_row(name, change, is_score=False) for name, change in audit.drift.items()]
    name = TASK_NAMES.get(task) or label(task)
    return AuditPanel(
        label=name,
        groups=audit.groups,
        with_signal=number(audit.with_signal),
        rest=number(audit.rest),
        scorers=scorers,
        means=tuple(means),
        rankings=tuple(row for found in audit.validity for row in _ranking_rows(found)),
        verifier=next((found.verifier for found in audit.validity), ""),
        correlations=_correlations(audit.scorers),
        shares=_share_charts(name, scorers, audit.series),
        others=_other_charts(audit.series, audit.control_series),
    )


def _scorer_row(audit: ScorerAudit) -> ScorerRow:
    variance_shares = (audit.share, audit.configured_share, audit.other_share)
    degenerate = tuple(map(number, (audit.constant, audit.all_best, audit.all_worst, audit.missing)))
    return ScorerRow(audit.name, audit.weight or None, variance_shares, degenerate)


def _ranking_rows(found: RewardRanking) -> list[RankingRow]:
    """A reward and its categories; nothing of one that scores as success does."""
    if found.is_success:
        return []
    along, whole = found.along, found.whole
    first, last = (None, None) if along is None else (_reliable(along.first.auc), _reliable(along.last.auc))
    row = RankingRow(
        name=found.name,
        is_category=False,
        rank=_reliable(whole.rank),
        auc=_reliable(whole.auc),
        first=first and first.score,
        last=last and last.score,
        change=None if along is None else _reliable(along.auc_change),
    )
    inner = found.categories.items() if len(found.categories) > 1 else ()
    parts = [RankingRow(_words(c), True, _reliable(r.rank), _reliable(r.auc), None, None, None) for c, r in inner]
    return [row, *parts]


def _reliable(interval: Interval) -> Estimate | None:
    """An interval over enough groups."""
    return None if interval.n < MIN_GROUPS else _estimate(interval)


def _estimate(interval: Interval) -> Estimate | None:
    value = number(interval.score)
    return None if value is None else Estimate(value, number(interval.low), number(interval.high))


def _mean_row(name: str, change: Change, is_score: bool) -> MeanRow:
    ends = number(change.first), number(change.last), _estimate(change.difference), number(change.control)
    return MeanRow(NAMES.get(name, name), is_score, *ends)


def _correlations(scorers: Sequence[ScorerAudit]) -> Correlations:
    names = [scorer.name for scorer in scorers]
    columns = list(dict.fromkeys([*names, *(name for scorer in scorers for name in scorer.correlations)]))
    if not any(scorer.correlations for scorer in scorers):
        return Correlations((), ())
    rows = []
    for scorer in scorers:
        found = [scorer.correlations.get(column) for column in columns]
        values = tuple(number(c.value) if c is not None and c.groups >= MIN_GROUPS else None for c in found)
        rows.append((scorer.name, values))
    return Correlations(tuple(NAMES.get(column, column) for column in columns), tuple(rows))


def _share_charts(task: str, scorers: tuple[ScorerRow, ...], series: Series) -> tuple[Chart, ...]:
    """One per trained reward where there is more than one."""
    trained = [scorer for scorer in scorers if scorer.variance_shares[1] is not None]
    charts = []
    for scorer in trained if len(trained) > 1 else []:
        points = _points(series.get(f"share/{scorer.name}"))
        if points:
            configured = scorer.variance_shares[1] or 0.0
            ends = [(points[0][0], configured), (points[-1][0], configured)]
            charts.append(line_chart(f"{task}: {_words(scorer.name)}", points, ends, "configured"))
    return tuple(charts)


def _other_charts(series: Series, control: Series) -> tuple[Chart, ...]:
    charts = []
    for key, raw in series.items():
        kind, _, name = key.partition("/")
        points = _points(raw)
        if kind == "share" or not points:
            continue
        titles = {"constant": f"groups constant in {name}", "auc": f"AUC of {name}"}
        title = titles.get(kind, NAMES.get(key, key)) if name else NAMES.get(key, key)
        charts.append(line_chart(_words(title), points, _points(control.get(key)), "the base on the same prompts"))
    return tuple(charts)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _points(series: Points | None) -> Points:
    """The finite points."""
    return [(step, value) for step, value in series or [] if number(step) is not None and number(value) is not None]
