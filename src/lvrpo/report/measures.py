"""What many samples, a judge's choice and the mix of answers say, as tables of text: for the page and the terminal.

Read from results as ``summary.json`` and the files of ``lvrpo evaluate`` hold them; what is missing is a dash.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lvrpo.records import number
from lvrpo.report.numbers import score
from lvrpo.report.verdict import label

Results = Mapping[str, Mapping[str, Any]]
"""By benchmark. Any: JSON values."""
NONE = "–"
TELLS = "≥ x: the smallest true difference that these prompts tell with probability .8"
BEST_OF = "4"
MIN_QUESTIONS = 10
"""A form with fewer questions is not shown by itself."""


@dataclass(frozen=True)
class TextTable:
    """A table whose cells are ready to be shown."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    """The first cell names the row; it is empty where the row goes on with the one above."""
    note: str = ""

    def markdown(self) -> str:
        """A table for a results page, the note below it."""
        lines = ["| " + " | ".join(self.heads) + " |", "|---" * len(self.heads) + "|"]
        lines += ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"


def measure_tables(
    phases: Mapping[str, Results], difference: Results | None = None, full: bool = False
) -> list[TextTable]:
    """What the results of some phases (before, after, a baseline) give; ``difference``: after minus before.

    ``full``: best of every n, else of ``BEST_OF`` alone.
    """
    known = {phase: _readable(results) for phase, results in phases.items()}
    change = _readable(difference)
    tables = (samples_table(known, change, full), answers_table(known, change), agreement_table(known))
    return [_without_empty_columns(table) for table in tables if table.rows]


def summary_phases(summary: Mapping[str, Any]) -> dict[str, Results]:
    """Before, after and the baseline of ``summary.json``, as far as it has them. Any: JSON values."""
    phases: dict[str, Results] = {phase: summary[phase] for phase in ("before", "after") if summary.get(phase)}
    other = summary.get("baseline")
    if isinstance(other, Mapping) and other.get("after"):
        phases[str(other.get("name") or "baseline")] = other["after"]
    return phases


def samples_table(phases: Mapping[str, Results], difference: Results, full: bool = False) -> TextTable:
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
    note += f"; {TELLS}" if difference else ""
    return TextTable("Samples of one prompt", ("benchmark", "", *heads), tuple(rows), note)


def answers_table(phases: Mapping[str, Results], difference: Results) -> TextTable:
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


def agreement_table(phases: Mapping[str, Results]) -> TextTable:
    """What a model reads in what it drew."""
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
    tells = number(raw.get("detectable")) if raw else None
    return _interval(raw, signed=True) + ("" if tells is None else f" ≥ {score(tells, 2)}")


__all__ = ["TextTable", "collapses", "measure_tables", "summary_phases"]
