"""Tables of text for the page, the terminal and markdown: samples and answers, several runs, several seeds.

Their input is the results in ``summary.json`` and in the files of ``lvrpo evaluate``; missing values are a dash.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from lvrpo.errors import InputError
from lvrpo.records import BenchmarkRecord, Estimate, EvaluationRecord, number, read_record
from lvrpo.report.formatting import label, score, task_order
from lvrpo.report.run import RunRecord, load_run
from lvrpo.statistics import MIN_SEEDS, Floats, TwoWayInterval, holm, seeds_and_prompts_interval

Results = Mapping[str, Mapping[str, Any]]
"""Results by benchmark. Any: JSON values."""
NONE = "–"
DETECTABLE = "≥ x: the smallest true difference detectable with probability .8"
BEST_OF = "4"
MIN_QUESTIONS = 10
"""A form with fewer questions is not shown by itself."""


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are ready to be shown."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The first cell names the row; it is empty where a row continues the one above."""
    note: str = ""

    def markdown(self) -> str:
        """A table for a results page, the note below it."""
        lines = ["| " + " | ".join(self.heads) + " |", "|---" * len(self.heads) + "|"]
        lines += ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def measure_tables(
    phases: Mapping[str, Results], difference: Results | None = None, full: bool = False
) -> list[TextTable]:
    """Tables for the results of several phases (before, after, a baseline); ``difference``: after minus before.

    ``full``: best of every n, else of ``BEST_OF`` alone.
    """
    known = {phase: _readable(results) for phase, results in phases.items()}
    change = _readable(difference)
    tables = (_samples_table(known, change, full), _answers_table(known, change), _agreement_table(known))
    return [_without_empty_columns(table) for table in tables if table.rows]


def summary_phases(summary: Mapping[str, Any]) -> dict[str, Results]:
    """Before, after and the baseline of ``summary.json``, as far as it has them. Any: JSON values."""
    phases: dict[str, Results] = {phase: summary[phase] for phase in ("before", "after") if summary.get(phase)}
    other = summary.get("baseline")
    if isinstance(other, Mapping) and other.get("after"):
        phases[str(other.get("name") or "baseline")] = other["after"]
    return phases


def _samples_table(phases: Mapping[str, Results], difference: Results, full: bool = False) -> TextTable:
    """Single sample, pass@k, best of n by the model's own reader, spread inside groups."""
    passes, bests = (_keys(phases, name) for name in ("pass_at_k", "best_of"))
    bests = [n for n in bests if full or n == BEST_OF or BEST_OF not in bests]
    heads = ["single sample" if k == "1" else f"pass@{k}" for k in passes]
    heads += [f"best of {n}" for n in bests] + ["spread", "with signal"]
    rows = []
    for benchmark in _benchmarks(phases, "pass_at_k"):
        for phase, results in phases.items():
            found = results.get(benchmark, {})
            if "pass_at_k" not in found:
                continue
            cells = [_interval(found["pass_at_k"].get(k)) for k in passes]
            cells += [_interval(found.get("best_of", {}).get(n)) for n in bests]
            rows.append(
                (*_name(rows, benchmark, phase), *cells, *(_share(found["groups"][k]) for k in ("std", "signal")))
            )
        found = difference.get(benchmark, {})
        if "pass_at_k" in found:
            cells = [_change(found["pass_at_k"].get(k)) for k in passes]
            cells += [_change(found.get("best_of", {}).get(n)) for n in bests]
            cells += [_share(found["groups"][k], signed=True) for k in ("std", "signal")]
            rows.append(("", "difference", *cells))
        for n, rival in found.get("against_best_of", {}).items():
            cells = [_change(rival) if k == "1" else "" for k in passes]
            rows.append(("", f"single sample minus best of {n} before", *cells, *[""] * (len(bests) + 2)))
    note = "best of n: chosen by the frozen reading side of the judge; spread: standard deviation inside a group"
    note += f"; {DETECTABLE}" if difference else ""
    return TextTable("Samples of one prompt", ("benchmark", "", *heads), tuple(rows), note)


def _answers_table(phases: Mapping[str, Results], difference: Results) -> TextTable:
    """Balanced accuracy and entropy of the answers, per form of question."""
    heads = [f"{what} {phase}".strip() for what in ("balanced accuracy", "entropy") for phase in phases]
    rows = []
    for benchmark in _benchmarks(phases, "forms"):
        found = [results.get(benchmark, {}) for results in phases.values()]
        change = _change(difference[benchmark].get("balanced")) if benchmark in difference else ""
        cells = [_interval(each.get("balanced")) for each in found]
        rows.append((label(benchmark), *cells, *[""] * (len(phases) + 1), change))
        collapsed = {each["form"]: each for each in difference.get(benchmark, {}).get("collapsed", ())}
        forms = dict.fromkeys(form for each in found for form in each.get("forms", {}))
        for form in forms:
            each = [one.get("forms", {}).get(form, {}) for one in found]
            if max(one.get("n", 0) for one in each) < MIN_QUESTIONS and form not in collapsed:
                continue
            right = next((one["entropy_right"] for one in each if "entropy_right" in one), None)
            note = (
                f"collapsed: {collapsed[form]['share']:.0%} “{collapsed[form]['answer']}”" if form in collapsed else ""
            )
            balanced, entropy = ([_share(one.get(name)) for one in each] for name in ("balanced", "entropy"))
            rows.append((f"  {form}", *balanced, *entropy, _share(right), note))
    note = (
        "balanced accuracy: mean over right answers of the share answered rightly; entropy of the answers given, bits"
    )
    return TextTable("Answers by form of question", ("form", *heads, "of right ones", "change"), tuple(rows), note)


def _agreement_table(phases: Mapping[str, Results]) -> TextTable:
    """How a model reads its own drawings."""
    rows = []
    for benchmark in _benchmarks(phases, "agreement"):
        for phase, results in phases.items():
            found = results.get(benchmark, {}).get("agreement")
            if found:
                cells = [_interval(found[k]) for k in ("confirmed", "hold", "agree")]
                rows.append((*_name(rows, benchmark, phase), *cells, _share(found["kappa"])))
    heads = ("benchmark", "", "reader finds", "verifier finds", "they agree", "kappa")
    return TextTable("Draw, then read back: share of the stated facts", heads, tuple(rows))


def collapses(difference: Results | None) -> list[str]:
    """The forms of question that nearly always get one answer now, and did not before, in words."""
    found = []
    for benchmark, each in _readable(difference).items():
        for one in each.get("collapsed", ()):
            shares = f"“{one['answer']}” to {one['share']:.0%} of the questions, {one['before']:.0%} before"
            found.append(f"{label(benchmark)}, “{one['form']}”: {shares}")
    return found


# --- inside ---


def _readable(results: Results | None) -> Results:
    """The benchmarks that have results: of a run that has not come so far they may be null."""
    return {name: each for name, each in (results or {}).items() if isinstance(each, Mapping)}


def _without_empty_columns(table: TextTable) -> TextTable:
    kept = [i for i in range(len(table.heads)) if i == 0 or any(row[i] not in ("", NONE) for row in table.rows)]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return replace(table, heads=tuple(table.heads[i] for i in kept), rows=rows)


def _benchmarks(phases: Mapping[str, Results], measure: str) -> list[str]:
    return list(dict.fromkeys(name for results in phases.values() for name, each in results.items() if measure in each))


def _keys(phases: Mapping[str, Results], measure: str) -> list[str]:
    """The k or n that some result has, rising."""
    found = {key for results in phases.values() for each in results.values() for key in each.get(measure, {})}
    return sorted(found, key=int)


def _name(rows: Sequence[tuple[str, ...]], benchmark: str, phase: str) -> tuple[str, str]:
    known = any(row[0] == label(benchmark) for row in rows)
    return ("" if known else label(benchmark), phase)


def _share(value: Any, signed: bool = False) -> str:
    found = number(value)
    return NONE if found is None else score(found, 2, signed)


def _interval(raw: Mapping[str, Any] | None, signed: bool = False) -> str:
    if raw is None or number(raw.get("score")) is None:
        return NONE
    low, high = number(raw.get("low")), number(raw.get("high"))
    spread = "" if low is None or high is None else f" [{score(low, 2, signed)}, {score(high, 2, signed)}]"
    return _share(raw["score"], signed) + spread


def _change(raw: Mapping[str, Any] | None) -> str:
    detectable = number(raw.get("detectable")) if raw else None
    return _interval(raw, signed=True) + ("" if detectable is None else f" ≥ {score(detectable, 2)}")


COLORS = {"up": "green", "down": "red", "flat": "dim", "unsure": "dim"}


@dataclass(frozen=True)
class RunCell:
    """One task of one run."""

    before: Estimate | None
    after: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Rows are runs (and their baselines), columns are tasks."""

    tasks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[RunCell, ...]], ...]

    def table(self) -> Table:
        """The table for ``rich.print``."""
        table = Table(title="before → after, difference with 95 % interval", title_justify="left", show_lines=True)
        table.add_column("run", overflow="fold")
        for task in self.tasks:
            table.add_column(label(task), justify="right", overflow="fold")
        for name, cells in self.rows:
            table.add_row(Text(name), *(_rich_cell(cell) for cell in cells))
        return table

    def markdown(self) -> str:
        """A table for a results page."""
        heads = ["run", *(label(task) for task in self.tasks)]
        lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * len(self.tasks) + "|"]
        for name, cells in self.rows:
            texts = [
                f"{_cell_values(cell)}<br>{_cell_change(cell)}" if _cell_change(cell) else _cell_values(cell)
                for cell in cells
            ]
            lines.append("| " + " | ".join([name.replace("|", "\\|"), *texts]) + " |")
        return "\n".join(lines) + "\n"


def compare_runs(runs: Sequence[Path]) -> Comparison:
    """Read the summaries of some runs. A run without one has empty cells; a baseline inside one is a row of its own."""
    if not runs:
        raise InputError("no run to compare: name at least one run directory")
    records = [load_run(Path(path)) for path in runs]
    tables = [t for r in records if r.summary for t in (r.summary.before, r.summary.after)]
    tasks = tuple(task_order(*tables))
    counted = Counter(record.name for record in records)
    rows: list[tuple[str, tuple[RunCell, ...]]] = []
    for record in records:
        name = record.name if counted[record.name] == 1 else str(record.path)
        rows.append((name if record.finished else f"{name} (not finished)", _cells(record, tasks)))
        if record.summary and record.summary.baseline:
            base = record.summary.baseline
            cells = tuple(
                RunCell(record.summary.before.get(t), base.after.get(t), base.difference.get(t)) for t in tasks
            )
            rows.append((f"{name}: {base.name}", cells))
    return Comparison(tasks, tuple(rows))


def _cells(record: RunRecord, tasks: tuple[str, ...]) -> tuple[RunCell, ...]:
    summary = record.summary
    if summary is None:
        return tuple(RunCell(None, None, None) for _ in tasks)
    tables = (summary.before, summary.after, summary.difference)
    return tuple(RunCell(*(table.get(task) for table in tables)) for task in tasks)


def _cell_values(cell: RunCell) -> str:
    before, after = (score(e.score) if e else "–" for e in (cell.before, cell.after))
    return f"{before} → {after}" if cell.before or cell.after else "–"


def _cell_change(cell: RunCell) -> str:
    d = cell.difference
    if d is None:
        return ""
    interval = ""
    if d.low is not None and d.high is not None:
        interval = f" [{score(d.low, signed=True)}, {score(d.high, signed=True)}]"
    return score(d.score, signed=True) + interval


def _rich_cell(cell: RunCell) -> Text:
    text = Text(_cell_values(cell))
    if cell.difference is not None:
        text.append("\n" + _cell_change(cell), style=COLORS[cell.difference.direction])
    return text


LEVEL = 0.05


@dataclass(frozen=True)
class SeedRow:
    """One benchmark, or one category of it, over all runs."""

    name: str
    before: float
    after: float
    change: TwoWayInterval
    p: float
    """p-value of no change; for a category adjusted for their number (Holm)."""

    @property
    def verdict(self) -> str:
        """up, down, "" for no significant change, or why none can be tested."""
        if self.change.too_few:
            seeds = self.change.interval.n
            return f"too few seeds ({seeds})" if seeds < MIN_SEEDS else "too few prompts"
        if not (self.change.interval.excludes_zero and (not np.isfinite(self.p) or self.p < LEVEL)):
            return ""
        return "up" if self.change.interval.score > 0 else "down"


def seed_rows(runs: Sequence[Path]) -> dict[str, list[SeedRow]]:
    """Per benchmark that all runs have: the whole, then its categories; over prompts that every run could score.

    Raises InputError for a run without evaluations, and for runs that were evaluated on different prompts.
    """
    if not runs:
        raise InputError("no run to compare: name at least one run directory")
    places = [Path(run).resolve() for run in runs]
    doubled = [str(run) for i, run in enumerate(runs) if places[i] in places[:i]]
    if doubled:
        raise InputError(f"{doubled[0]}: named twice, but one run is one seed: name each once")
    phases = [{phase: read_scores(Path(run), phase) for phase in ("before", "after")} for run in runs]
    names = [n for n in phases[0]["before"] if all(n in records for each in phases for records in each.values())]
    found = {}
    for name in names:
        first = phases[0]["before"][name]
        for run, each in zip(runs, phases, strict=True):
            if any(records[name].ids != first.ids for records in each.values()):
                raise InputError(
                    f"{run}: {name} was evaluated on other prompts than in {runs[0]}: evaluate both with one command"
                )
        before, after = (np.array([each[phase][name].scores for each in phases]) for phase in ("before", "after"))
        sides = [records[name].scores for each in phases for records in each.values()]
        scored = [all(map(math.isfinite, column)) for column in zip(*sides, strict=True)]
        if not any(scored):
            raise InputError(f"{name}: no prompt has a score in all of the runs: see that their rewards work")
        kinds = [kind if known else "" for kind, known in zip(first.categories, scored, strict=True)]
        categories = [category for category in dict.fromkeys(kinds) if category]
        parts = {category: [c == category for c in kinds] for category in categories}
        inner = [_row(category, before, after, first.clusters, kept) for category, kept in parts.items()]
        adjusted = holm([row.change.p for row in inner])
        found[name] = [_row(name, before, after, first.clusters, scored)]
        found[name] += [SeedRow(r.name, r.before, r.after, r.change, p) for r, p in zip(inner, adjusted, strict=True)]
    return found


def seeds_table(runs: Sequence[Path], categories: bool = True) -> TextTable:
    """``seed_rows`` as text; rows with too few seeds are marked."""
    rows = []
    for benchmark, found in seed_rows(runs).items():
        for i, row in enumerate(found if categories else found[:1]):
            name = f"  {row.name.replace('_', ' ')}" if i else label(benchmark)
            each, detectable = row.change.interval, row.change.detectable
            spread = f" [{score(each.low, 3, True)}, {score(each.high, 3, True)}]" if np.isfinite(each.low) else ""
            cells = (score(row.before), score(row.after), score(each.score, 3, True) + spread)
            detectable_cell = score(detectable) if np.isfinite(detectable) else "–"
            rows.append((name, *cells, detectable_cell, f"{row.p:.2g}" if np.isfinite(row.p) else "–", row.verdict))
    seeds = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    heads = ("task", "before", "after", "difference [95 %]", "detectable", "p", "significant")
    note = "interval over seeds and prompts; detectable: effect at power .8; p of categories adjusted (Holm)"
    return TextTable(f"{seeds}, one per seed", heads, tuple(rows), note)


def read_scores(run: Path, phase: str) -> Mapping[str, BenchmarkRecord]:
    """Scores of eval/PHASE.json of a run, by benchmark; raises InputError where it is missing or unreadable."""
    path = run / "eval" / f"{phase}.json"
    return read_record(EvaluationRecord, path, "name runs that have been evaluated").scores


def _row(name: str, before: Floats, after: Floats, clusters: Sequence[str], kept: Sequence[bool]) -> SeedRow:
    mask = np.array(kept)
    own = [cluster for cluster, keep in zip(clusters, kept, strict=True) if keep]
    change = seeds_and_prompts_interval((after - before)[:, mask], own)
    return SeedRow(name, float(before[:, mask].mean()), float(after[:, mask].mean()), change, change.p)
