"""Tables and charts of the audits of rewards, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lvrpo.audit_records import (
    MIN_GROUPS,
    Change,
    JudgeAudit,
    Ranking,
    RewardAudit,
    RewardRanking,
    SampleAudit,
    ScorerAudit,
    Series,
)
from lvrpo.errors import InputError
from lvrpo.reading import path_exists, read_json
from lvrpo.records import direction, from_json, number
from lvrpo.report.charts import Chart, Points, line_chart
from lvrpo.report.formatting import NONE, compact, interval, share, task_name, words
from lvrpo.report.tables import Cell, TextTable
from lvrpo.statistics import Interval
from lvrpo.types import OutputKind

NAMES = {
    "tokens": "tokens written",
    "cut_off": "share of texts cut off",
    "text_diversity": "share of a group's texts that differ",
    "picture_diversity": "difference of a group's images",
    "red": "mean red",
    "green": "mean green",
    "blue": "mean blue",
}
"""Display names of properties; other names are shown as they are."""
SHARES = "share of the variance of the advantages; shares of groups without a difference"
VALIDITY = "rank correlation with the truth; area under the curve, right against wrong outputs"
RANKING = ("rank [95 %]", "groups", "silent", "alike", "AUC [95 %]", "groups")
JUDGED: Mapping[OutputKind, str] = {
    "image": "images with one fact corrupted: area under the curve [95 %]; .5 is chance",
    "text": "texts with one fact corrupted",
}
"""Titles of the tables of a judge."""


def read_audit(path: Path, problems: list[str]) -> RewardAudit | None:
    """The audit, or None where the run has none; unreadable files are added to ``problems``."""
    if not path_exists(path):
        return None
    try:
        return from_json(RewardAudit, read_json(path, finite=False), str(path))
    except InputError as error:
        problems.append(f"{path.name} could not be read ({error}): lvrpo report writes it anew.")
        return None


def audit_section(audit: RewardAudit) -> dict[str, Any]:
    """What the template draws of an audit. Any: texts, tables and charts."""
    return {
        "head": f"{recorded_steps(audit)}; advantages: {audit.formula}",
        "conclusion": conclusion(audit),
        "tables": share_tables(audit),
        "folded": {
            "Means at the beginning and at the end": mean_tables(audit),
            "Whether rewards rank outputs as the truth does": ranking_tables(audit),
            "Correlations inside groups": correlation_tables(audit),
        },
        "shares": [chart for task in audit.tasks for chart in share_charts(audit, task)],
        "others": {
            task_name(task): other_charts(found.series, found.control_series) for task, found in audit.tasks.items()
        },
    }


# --- in words ---


def recorded_steps(audit: RewardAudit) -> str:
    """The number of recorded steps of the run."""
    every = audit.steps.last - audit.steps.first + 1
    there = "all" if audit.recorded >= every else f"{audit.recorded:,} of {every:,}"
    return f"steps {audit.steps.first} to {audit.steps.last}, {there} on record"


def conclusion(audit: RewardAudit) -> str:
    """Whether a trained reward rose while a held-out score fell."""
    if not audit.alarms.comparisons:
        return "no comparison: the run is too short, or nothing held out was scored"
    if audit.alarms.found:
        return "a trained reward rose while a held-out score fell"
    return f"no trained reward rose while a held-out score fell ({audit.alarms.comparisons} comparisons)"


def alarm_lines(audit: RewardAudit) -> Iterator[tuple[str, str]]:
    """(line, style of the terminal): the alarms, or that there are none."""
    alarms = audit.alarms
    for missing in alarms.missing:
        yield f"alarm: {missing.words}: metrics.jsonl says why (reward_failed_why)", "bold red"
    for alarm in alarms.found:
        yield f"alarm: {alarm.words}: look at samples/ before you trust this reward", "bold red"
    for task, reward, scorer in alarms.same:
        yield f"{task}: {reward} scores every output as {scorer} does, so the two are not compared", "dim"
    if not alarms.found:
        yield (
            f"{'no ' if alarms.comparisons else ''}alarm: {conclusion(audit)}",
            "green" if alarms.comparisons else "dim",
        )


# --- tables of a run, one per task ---


def share_tables(audit: RewardAudit) -> list[TextTable]:
    """The variance shares of the advantages, and the groups without a learning signal."""
    heads = ("scorer", "weight", "share", "configured", f"if {audit.other_formula}")
    heads += ("constant", "all best", "all worst", "missing")
    tables = []
    for task, found in audit.tasks.items():
        rows = [_scorer_row(scorer) for scorer in found.scorers]
        if found.rest >= 0.005:
            rows.append(("from none of these", "", share(found.rest), *[""] * 6))
        title = f"{task_name(task)}: {found.groups:,} groups, {share(found.with_signal)} of them with signal"
        tables.append(TextTable(title, heads, tuple(rows), "" if tables else SHARES))
    return tables


def mean_tables(audit: RewardAudit) -> list[TextTable]:
    """Means in the first and in the last window."""
    heads = ("mean of", *_ends(audit), "change [95 %]", "the base, at the end")
    tables = []
    for task, found in audit.tasks.items():
        rows = [(scorer.name, *_change_cells(scorer.mean, is_score=True)) for scorer in found.scorers]
        rows += [(NAMES.get(n, n), *_change_cells(change, is_score=False)) for n, change in found.drift.items()]
        tables.append(TextTable(f"{task_name(task)}: over the run", heads, tuple(rows)))
    return tables


def ranking_tables(audit: RewardAudit) -> list[TextTable]:
    """How every reward ranks outputs, and each category of prompts; no task whose rewards all equal success."""
    heads = (*(f"AUC, {span}" for span in _ends(audit)), "change [95 %]")
    tables = []
    for task, found in audit.tasks.items():
        more = {reward.name: _auc_change(reward) for reward in found.validity}
        tables += _ranking_tables(task_name(task), found.validity, heads, more)
    return _with_note(tables)


def correlation_tables(audit: RewardAudit) -> list[TextTable]:
    """Of the tasks whose scorers can be compared with anything."""
    tables = []
    for task, found in audit.tasks.items():
        names = dict.fromkeys([s.name for s in found.scorers] + [n for s in found.scorers for n in s.correlations])
        rows = []
        for scorer in found.scorers:
            known = [scorer.correlations.get(name) for name in names]
            cells = (share(c.value, True) if c is not None and c.groups >= MIN_GROUPS else NONE for c in known)
            rows.append((scorer.name, *cells))
        if any(scorer.correlations for scorer in found.scorers):
            heads = ("scorer", *(NAMES.get(name, name) for name in names))
            tables.append(TextTable(f"{task_name(task)}: correlation inside groups", heads, tuple(rows)))
    return tables


# --- tables of a judge ---


def sample_tables(audit: SampleAudit) -> list[TextTable]:
    """Every reward of a judge on a model's outputs."""
    tables = []
    for task, found in audit.tasks.items():
        title = f"{task_name(task)}: {found.groups} groups, {share(found.right)} right"
        missing = {name: (share(value),) for name, value in found.missing.items()}
        tables += _ranking_tables(title, found.validity, ("missing",), missing)
    return _with_note(tables)


def sensitivity_table(audit: JudgeAudit, output: OutputKind) -> TextTable:
    """AUC by kind of fact and, below each, by error."""
    known = [row for row in audit.rows if row.output == output]
    rewards = list(dict.fromkeys(row.reward for row in known))
    rows = []
    for kind in dict.fromkeys(row.kind for row in known):
        errors = sorted({row.error for row in known if row.kind == kind})
        for error in errors if len(errors) > 2 else errors[:1]:
            found = [audit.find(reward, output, kind, error) for reward in rewards]
            pairs = max((row.auc.n for row in found if row is not None), default=0)
            cells = ("" if row is None or not row.auc.n else interval(row.auc) for row in found)
            if pairs:
                rows.append((f"  {error}" if error else kind, *cells, str(pairs)))
    return TextTable(JUDGED[output], ("kind", *rewards, "pairs"), tuple(rows))


# --- charts ---


def share_charts(audit: RewardAudit, task: str) -> list[Chart]:
    """The share of each trained reward beside its configured one, where there is more than one."""
    found = audit.tasks[task]
    trained = [scorer for scorer in found.scorers if scorer.configured_share is not None]
    charts = []
    for scorer in trained if len(trained) > 1 else []:
        points = _points(found.series.get(f"share/{scorer.name}"))
        if points:
            ends = [(step, scorer.configured_share or 0.0) for step in (points[0][0], points[-1][0])]
            charts.append(line_chart(f"{task_name(task)}: {words(scorer.name)}", points, ends, (), 0.1, "configured"))
    return charts


def other_charts(series: Series, control: Series) -> list[Chart]:
    """Validity, constant groups, and traits of the outputs beside those of the base."""
    charts = []
    for key, raw in series.items():
        kind, _, name = key.partition("/")
        points = _points(raw)
        if kind == "share" or not points:
            continue
        titles = {"constant": f"groups constant in {name}", "auc": f"AUC of {name}"}
        title = titles.get(kind, NAMES.get(key, key)) if name else NAMES.get(key, key)
        charts.append(line_chart(words(title), points, _points(control.get(key)), min_span=0.1))
    return charts


# --- inside ---


def _ends(audit: RewardAudit) -> list[str]:
    return [f"steps {window.first} to {window.last}" for window in (audit.windows[0], audit.windows[-1])]


def _scorer_row(audit: ScorerAudit) -> tuple[str, ...]:
    parts = (audit.share, audit.configured_share, audit.other_share)
    parts += (audit.constant, audit.all_best, audit.all_worst, audit.missing)
    return (audit.name, f"{audit.weight:g}" if audit.weight else "held out", *map(share, parts))


def _change_cells(change: Change, is_score: bool) -> tuple[str, ...]:
    """First, last, change and base; ``is_score``: up is good, whereas a trait of outputs is neither good nor bad."""
    first, last, control = (
        NONE if number(x) is None else compact(x) for x in (change.first, change.last, change.control)
    )
    d = change.difference
    moved = interval(d, 3 if abs(d.score) < 1 else 1, signed=True)
    tone = direction(number(d.low), number(d.high)) if is_score else ""
    return first, last, Cell(moved, tone), control


def _ranking_tables(
    title: str, rewards: Sequence[RewardRanking], heads: tuple[str, ...], more: Mapping[str, tuple[str, ...]]
) -> list[TextTable]:
    """One table of a task; none where every reward equals success."""
    rows: list[tuple[str, ...]] = []
    for reward in rewards:
        if reward.is_success:
            rows.append((reward.name, "scores as success does", *[""] * (len(RANKING) + len(heads) - 1)))
            continue
        rows.append((reward.name, *_ranking_cells(reward.whole), *more[reward.name]))
        inner = reward.categories.items() if len(reward.categories) > 1 else ()
        rows += [(f"  {words(name)}", *_ranking_cells(each), *[""] * len(heads)) for name, each in inner]
    if all(reward.is_success for reward in rewards):
        return []
    title = f"{title}; truth: {rewards[0].verifier}"
    return [TextTable(title, ("reward", *RANKING, *heads), tuple(rows))]


def _with_note(tables: list[TextTable]) -> list[TextTable]:
    """What the numbers are, once."""
    return [replace(table, note=VALIDITY) if i == 0 else table for i, table in enumerate(tables)]


def _ranking_cells(ranking: Ranking) -> tuple[str, ...]:
    counts = (str(n) for n in (ranking.rank.n, ranking.silent, ranking.alike))
    return (_reliable(ranking.rank, signed=True), *counts, _reliable(ranking.auc), str(ranking.auc.n))


def _auc_change(reward: RewardRanking) -> tuple[str, ...]:
    """AUC in the first and the last window, and the change."""
    if reward.along is None:
        return (NONE,) * 3
    first, last = (_reliable(found.auc).partition(" ")[0] for found in (reward.along.first, reward.along.last))
    change = reward.along.auc_change
    known = NONE not in (first, last)
    return first, last, Cell(_reliable(change, signed=True), direction(change.low, change.high)) if known else NONE


def _reliable(found: Interval, signed: bool = False) -> str:
    """A dash for fewer than ``MIN_GROUPS`` groups."""
    return NONE if found.n < MIN_GROUPS else interval(found, signed=signed)


def _points(series: Points | None) -> Points:
    """The finite points."""
    return [(step, value) for step, value in series or [] if number(step) is not None and number(value) is not None]
