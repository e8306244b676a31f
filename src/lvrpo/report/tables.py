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

from lvrpo.errors import InputError
from lvrpo.records import LEVEL, BenchmarkRecord, Estimate, EvaluationRecord, direction, number, read_record
from lvrpo.report.formatting import NONE, interval, label, score, share, task_order, words
from lvrpo.report.run import load_run
from lvrpo.statistics import MIN_SEEDS, Floats, TwoWayInterval, holm, seeds_and_prompts_interval

Results = Mapping[str, Mapping[str, Any]]
"""Results by benchmark. Any: JSON values."""
DETECTABLE = "≥ x: the smallest true difference detectable with probability .8"
BEST_OF = "4"
MIN_QUESTIONS = 10
"""A form with fewer questions is not shown by itself."""


class Cell(str):
    """A cell with a tone, which the page and the terminal show as a color."""

    tone: str
    """up, down, flat or unsure, as ``Estimate.direction``; together or apart of gradients; "" for none."""

    def __new__(cls, text: str, tone: str) -> Cell:
        cell = super().__new__(cls, text)
        cell.tone = tone
        return cell


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are ready to be shown."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The first cell names the row; it is empty where a row continues the one above, and begins with two spaces where
    a row is a part of it."""
    note: str = ""

    def markdown(self) -> str:
        """A table for a results page, the note below it."""
        lines = ["| " + " | ".join(self.heads) + " |", "|---" * len(self.heads) + "|"]
        for row in self.rows:
            cells = (cell.strip().replace("|", "\\|").replace("\n", "<br>") for cell in row)
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def scores_table(results: Results, title: str) -> TextTable:
    """The scores of one evaluation, and of its categories."""
    masked = any("masked" in each for each in results.values())
    rows = []
    for name, each in results.items():
        lost = (str(each.get("masked", {}).get("prompts", 0)),) if masked else ()
        rows.append((name, _score(each), str(each["n"]), *lost))
        rows += [(f"  {words(n)}", _score(c), str(c["n"]), *[""] * masked) for n, c in each["categories"].items()]
    heads = ("benchmark", "score, 95 % interval", *(("scored", "masked") if masked else ("prompts",)))
    return TextTable(title, heads, tuple(rows))


def summary_table(summary: Mapping[str, Any]) -> TextTable:
    """Before, after and difference per task and category, and the baseline where there is one. Any: JSON values."""
    baseline = summary.get("baseline")
    rows = []
    for task, before in summary["before"].items():
        parts = [before, summary["after"][task], summary["difference"][task]]
        if baseline:
            parts += [baseline["after"][task], summary["ours_minus_baseline"][task]]
        rows.append(_summary_row(words(task), parts))
        # one side may have scored none of a category
        categories = dict.fromkeys(c for part in parts for c in part["categories"])
        rows += [_summary_row(f"  {words(c)}", [part["categories"].get(c) for part in parts]) for c in categories]
    heads = ("task", "before", "after", "difference [95 %]", *(("baseline", "ours minus it") if baseline else ()))
    return TextTable("", heads, tuple(rows))


def _summary_row(name: str, parts: Sequence[Mapping[str, Any] | None]) -> tuple[str, ...]:
    """Scores, and differences in their tone; a dash for a part without score. Any: JSON values."""
    before, after, difference, *other = parts
    known = [NONE if each is None else share(each["score"]) for each in (before, after, *other[:1])]
    return (name, *known[:2], _change(difference), *known[2:], *map(_change, other[1:]))


def measure_tables(
    phases: Mapping[str, Results], difference: Results | None = None, full: bool = False
) -> list[TextTable]:
    """Tables for the results of several phases (before, after, a baseline); ``difference``: after minus before.

    ``full``: best of every n, else of ``BEST_OF`` alone.
    """
    known = {phase: _readable(results) for phase, results in phases.items()}
    change = _readable(difference)
    tables = (_samples_table(known, change, full), _answers_table(known, change), _agreement_table(known))
    kept = (_without_empty_columns(table) for table in tables if table.rows)
    return [table for table in kept if len(table.heads) > 1]  # few answers have no balanced accuracy and no form


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
            cells = [interval(found["pass_at_k"].get(k)) for k in passes]
            cells += [interval(found.get("best_of", {}).get(n)) for n in bests]
            rows.append(
                (*_name(rows, benchmark, phase), *cells, *(share(found["groups"][k]) for k in ("std", "signal")))
            )
        found = difference.get(benchmark, {})
        if "pass_at_k" in found:
            cells = [_change(found["pass_at_k"].get(k)) for k in passes]
            cells += [_change(found.get("best_of", {}).get(n)) for n in bests]
            cells += [share(found["groups"][k], signed=True) for k in ("std", "signal")]
            rows.append(("", "difference", *cells))
        for n, rival in found.get("against_best_of", {}).items():
            cells = [_change(rival) if k == "1" else "" for k in passes]
            rows.append(("", f"single sample minus best of {n} before", *cells, *[""] * (len(bests) + 2)))
    note = "best of n: chosen by the frozen understanding side of the judge; spread: standard deviation inside a group"
    note += f"; {DETECTABLE}" if difference else ""
    return TextTable("Samples of one prompt", ("benchmark", "", *heads), tuple(rows), note)


def _answers_table(phases: Mapping[str, Results], difference: Results) -> TextTable:
    """Balanced accuracy and entropy of the answers, per form of question."""
    heads = [f"{what} {phase}".strip() for what in ("balanced accuracy", "entropy") for phase in phases]
    rows = []
    for benchmark in _benchmarks(phases, "forms"):
        found = [results.get(benchmark, {}) for results in phases.values()]
        change = _change(difference[benchmark].get("balanced")) if benchmark in difference else ""
        cells = [interval(each.get("balanced")) for each in found]
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
            balanced, entropy = ([share(one.get(name)) for one in each] for name in ("balanced", "entropy"))
            rows.append((f"  {form}", *balanced, *entropy, share(right), note))
    note = (
        "balanced accuracy: mean over right answers of the share answered rightly; entropy of the answers given, bits"
    )
    return TextTable("Answers by form of question", ("form", *heads, "of right ones", "change"), tuple(rows), note)


def _agreement_table(phases: Mapping[str, Results]) -> TextTable:
    """How a model reads its own images."""
    rows = []
    for benchmark in _benchmarks(phases, "agreement"):
        for phase, results in phases.items():
            found = results.get(benchmark, {}).get("agreement")
            if found:
                cells = [interval(found[k]) for k in ("confirmed", "hold", "agree")]
                rows.append((*_name(rows, benchmark, phase), *cells, share(found["kappa"])))
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


def _score(raw: Mapping[str, Any], signed: bool = False) -> str:
    """A score with its interval, or a word that it has none. Any: JSON values."""
    text = interval(raw, signed=signed)
    return text if "[" in text or text == NONE else f"{text}, no interval"


def _change(raw: Mapping[str, Any] | None) -> str:
    """A difference in its tone. Any: JSON values."""
    if raw is None:
        return NONE
    low, high, p = (number(raw.get(name)) for name in ("low", "high", "p_holm"))
    return Cell(_score(raw, signed=True), direction(low, high, p))


# --- several runs ---


def compare_runs(runs: Sequence[Path]) -> TextTable:
    """Rows are runs, and baselines inside them; columns are tasks, of which runs without a summary have none.

    Raises InputError where no run has results.
    """
    if not runs:
        raise InputError("no run to compare: name at least one run directory")
    records = [load_run(Path(path)) for path in runs]
    tasks = task_order(*(t for r in records if r.summary for t in (r.summary.before, r.summary.after)))
    if not tasks:
        raise InputError(
            f"{runs[0]}: no run has results: wait until one has finished, or train with held-out rows (data.jsonl.test)"
        )
    counted = Counter(record.name for record in records)
    rows: list[tuple[str, ...]] = []
    for record in records:
        name = record.name if counted[record.name] == 1 else str(record.path)
        title, summary = name if record.finished else f"{name} (not finished)", record.summary
        if summary is None:
            rows.append((title, *[NONE] * len(tasks)))
            continue
        methods = [(title, summary.after, summary.difference)]
        if summary.baseline is not None:
            base = summary.baseline
            methods.append((f"{name}: {base.name}", base.after, base.difference))
        for method, after, difference in methods:
            cells = (_run_cell(summary.before.get(t), after.get(t), difference.get(t)) for t in tasks)
            rows.append((method, *cells))
    heads = ("run", *map(label, tasks))
    return TextTable("before → after, difference with 95 % interval", heads, tuple(rows))


def _run_cell(before: Estimate | None, after: Estimate | None, change: Estimate | None) -> str:
    values = " → ".join(NONE if each is None else score(each.score) for each in (before, after))
    if change is None:
        return NONE if before is after is None else values
    return Cell(f"{values}\n{interval(replace(change, detectable=None), 3, signed=True)}", change.direction)


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
            if not all(records[name].has_prompts_of(first) for records in each.values()):
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


def seeds_table(runs: Sequence[Path]) -> TextTable:
    """``seed_rows`` as text; rows with too few seeds are marked."""
    rows = []
    for benchmark, found in seed_rows(runs).items():
        for i, row in enumerate(found):
            name = f"  {row.name.replace('_', ' ')}" if i else label(benchmark)
            each, detectable = row.change.interval, row.change.detectable
            cells = (score(row.before), score(row.after), interval(each, 3, signed=True))
            known = (
                score(detectable) if np.isfinite(detectable) else NONE,
                f"{row.p:.2g}" if np.isfinite(row.p) else NONE,
            )
            rows.append((name, *cells, *known, row.verdict))
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
