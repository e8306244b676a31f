"""The results page, computed from committed summaries alone; missing runs are marked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lvrpo.errors import InputError
from lvrpo.metrics import collapsed_forms
from lvrpo.records import LEVEL
from lvrpo.report.evidence import (
    MEASURES,
    SEEN,
    Column,
    Evidence,
    Measure,
    RowPlan,
    Summary,
    TablePlan,
    column,
    difference,
)
from lvrpo.report.formatting import NONE, duration, interval, score
from lvrpo.report.tables import TextTable
from lvrpo.statistics import MIN_SEEDS, TwoWayInterval, holm

FEW = "†"
"""Marks a cell with fewer than ``MIN_SEEDS`` runs, or too few prompts."""
BASE = "base"
RIVAL = "rival"

NOTES = f"""\
Each row at guidance and temperature tuned on the validation split; *unguided*: one pass at guidance
1, greedy. *Generation, editing, reasoning*: share of test prompts whose one output is right as a whole. *Unseen
compositions*: images of combinations that training never shows. *pass@16*: at least one of 16 images is right.
*Understanding*: balanced accuracy, the mean over forms of question. In brackets the change against the base, with the
95 % interval over runs and prompts. {FEW}: fewer than {MIN_SEEDS} runs, too few for a conclusion. A row that is the
best of several images is known on the prompts that were sampled often, and compared on these. *Detectable*: the
minimal true difference that these runs and prompts detect with probability .8. *Significant*: the interval excludes 0
and p, adjusted for the rows of the table (Holm), is below {LEVEL}. Runs of one base are not independent: the number of
bases stands beside that of runs."""


def evidence_page(plan: TablePlan, evidence: Evidence) -> str:
    """The whole page as markdown; the same summaries give the same text.

    Raises InputError for a summary of another experiment.
    """
    for runs in evidence.summaries.values():
        for summary in runs.values():
            if summary.raw.get("experiment") != plan.name:
                raise InputError(
                    f"{summary.row}-{summary.base}-{summary.seed}.json: is of {summary.raw.get('experiment')!r}, and "
                    f"this page of {plan.name!r}: keep each experiment in a folder of its own"
                )
    parts = [f"# Evidence: {plan.name}", "", _head(plan, evidence), "", "## All rows", "", _overview(plan, evidence)]
    parts += [NOTES, "", "## Against the strongest rival", "", _against_strongest(plan, evidence)]
    for measure in _measured(plan, evidence):
        parts += [f"## {measure.heading[0].upper()}{measure.heading[1:]}", "", _of_measure(plan, measure, evidence)]
    parts += ["## What the change reaches", "", _generalization(plan, evidence), "", _collapse(plan, evidence), ""]
    parts += ["## Choices on validation", "", _choices(plan, evidence)]
    return "\n".join(parts)


# --- what was run ---


def _head(plan: TablePlan, evidence: Evidence) -> str:
    runs = [summary for row in plan.rows for summary in evidence.summaries.get(row, {}).values()]
    planned = sum(len(row.runs) for row in plan.rows.values() if row.of is None)
    lines = [
        f"Written by `lvrpo reproduce {plan.name} --table` from the summaries in `{plan.name}/`: not edited by hand."
    ]
    if not plan.evidence:
        lines.append("**A smoke test, not evidence**: too few seeds, steps and prompts for a conclusion.")
    done = sum(run in row.runs for name, row in plan.rows.items() for run in evidence.summaries.get(name, {}))
    lines.append(f"{done} of {planned} runs are there.")
    if runs:
        dates = sorted({str(run.raw.get("test_opened")) for run in runs})
        opened = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}, each run once"
        budgets = sorted({f"{_budget(run):.3g}" for run in runs if _budget(run)})
        seconds = sum(float(run.raw["training_seconds"]) + float(run.raw["test_seconds"]) for run in runs)
        lines += [
            f"The test split was opened {opened}.",
            f"Bases: {', '.join(sorted({run.base for run in runs}))}; seeds {_joined(run.seed for run in runs)}; "
            f"{duration(seconds)} in all on {'; '.join(sorted({str(run.raw['hardware']) for run in runs}))}.",
            f"Code: {', '.join(sorted({str(run.raw['code']) for run in runs}))}.",
        ]
        lines += [
            f"Not healthy: {run.row}-{run.base}-{run.seed}: {words}."
            for run in runs
            for words in run.raw.get("not_well", ())
        ]
        if budgets:
            lines.append(f"Every row that trains may spend {' or '.join(budgets)} FLOPs of its models.")
    return "\n".join(lines)


def _budget(run: Summary) -> float:
    return float(run.raw.get("budget_flops") or 0.0)


def _joined(values: Any) -> str:  # Any: an iterable of numbers
    return ", ".join(map(str, sorted(set(values))))


# --- tables ---


def _measured(plan: TablePlan, evidence: Evidence) -> Sequence[Measure]:
    """Those that a run has; all before the first run."""
    found = [m for m in MEASURES if any(column(plan, name, m, evidence).known for name in plan.rows)]
    return found or MEASURES


def _overview(plan: TablePlan, evidence: Evidence) -> str:
    measures = _measured(plan, evidence)
    heads = ("row", "what", "group", *(m.heading for m in measures), "steps", "FLOPs a step", "FLOPs", "runs (bases)")
    rows = []
    for name, row in plan.rows.items():
        runs = _summaries(plan, name, evidence)
        if not runs:
            rows.append((name, row.about, row.group, *["not run"] * len(measures), *[NONE] * 3, "0"))
            continue
        cells = [_cell(plan, name, measure, evidence) for measure in measures]
        rows.append((name, row.about, row.group, *cells, *_costs(row, runs), _count(runs)))
    return TextTable("", heads, tuple(rows)).markdown()


def _costs(row: RowPlan, runs: Sequence[Summary]) -> tuple[str, str, str]:
    if row.of is not None or not any(run.raw["steps"] for run in runs):
        return NONE, NONE, NONE
    steps = sorted({int(run.raw["steps"]) for run in runs})
    a_step, whole = (float(np.mean([run.raw[key] for run in runs])) for key in ("flops_per_step", "flops"))
    return " / ".join(map(str, steps)), f"{a_step:.2e}", f"{whole:.2e}"


def _count(runs: Sequence[Summary]) -> str:
    return f"{len(runs)} ({len({run.base for run in runs})})"


def _summaries(plan: TablePlan, name: str, evidence: Evidence) -> list[Summary]:
    row = plan.rows[name]
    found = evidence.summaries.get(row.of or name, {})
    return [found[run] for run in row.runs if run in found]


def _cell(plan: TablePlan, name: str, measure: Measure, evidence: Evidence) -> str:
    own = column(plan, name, measure, evidence)
    if not own.known:
        return NONE
    text = score(own.mean) + (FEW if len(own.values) < MIN_SEEDS else "")
    change = _minus_base(plan, name, measure, evidence)
    return text if change is None else f"{text} ({_interval(change)})"


def _minus_base(plan: TablePlan, name: str, measure: Measure, evidence: Evidence) -> TwoWayInterval | None:
    if name == BASE or BASE not in plan.rows:
        return None
    return _minus(plan, name, BASE, measure, evidence)


def _minus(plan: TablePlan, one: str, other: str, measure: Measure, evidence: Evidence) -> TwoWayInterval | None:
    """``one`` minus ``other``: by base where either is not trained, on many samples where either is a best of many."""
    rows = plan.rows[one], plan.rows[other]
    many = any(row.best_of is not None for row in rows)
    by_base = any(row.group in ("base", "inference") for row in rows)
    sides = [column(plan, name, measure, evidence, many) for name in (one, other)]
    return difference(sides[0], sides[1], by_base) if all(side.known for side in sides) else None


def _interval(change: TwoWayInterval) -> str:
    return interval(change.interval, 3, signed=True) + (FEW if change.too_few else "")


def _detectable(change: TwoWayInterval | None) -> str:
    return NONE if change is None or not np.isfinite(change.detectable) else score(change.detectable)


def _significance(change: TwoWayInterval | None, p: float) -> str:
    if change is None or change.too_few:
        return NONE if change is None else "too few seeds"
    if not change.interval.excludes_zero or (np.isfinite(p) and p >= LEVEL):
        return "no"
    return "higher" if change.interval.score > 0 else "lower"


def strongest_rival(plan: TablePlan, measure: Measure, evidence: Evidence) -> tuple[str, Column] | None:
    """The row and the column of the rival with the highest mean among those that have run."""
    found = [(name, column(plan, name, measure, evidence)) for name, row in plan.rows.items() if row.group == RIVAL]
    return max((each for each in found if each[1].known), key=lambda each: each[1].mean, default=None)


def _against_strongest(plan: TablePlan, evidence: Evidence) -> str:
    heads = ("measure", "strongest rival", "its score", plan.ours, "difference [95 %]", "detectable", "significant")
    rows = []
    measures, changes = _measured(plan, evidence), list[tuple[tuple[str, Column] | None, TwoWayInterval | None]]()
    for measure in measures:
        rival = strongest_rival(plan, measure, evidence)
        changes.append((rival, None if rival is None else _minus(plan, plan.ours, rival[0], measure, evidence)))
    adjusted = holm([float("nan") if change is None else change.p for _, change in changes])
    for measure, (rival, change), p in zip(measures, changes, adjusted, strict=True):
        if rival is None or change is None:
            rows.append((measure.heading, *["not run"] * 2, *[NONE] * 4))
            continue
        (name, known), ours = rival, column(plan, plan.ours, measure, evidence)
        scores = (name, score(known.mean), score(ours.mean))
        rows.append((measure.heading, *scores, _interval(change), _detectable(change), _significance(change, p)))
    note = (
        "Of the rivals that have run; a difference is of the runs that both have. The oracle and inference stand apart."
    )
    return TextTable("", heads, tuple(rows), note).markdown()


def _of_measure(plan: TablePlan, measure: Measure, evidence: Evidence) -> str:
    heads = ("row", "score", "minus base [95 %]", "detectable", "significant")
    heads += (f"{plan.ours} minus it [95 %]", "detectable", "significant", "runs (bases)")
    names = [name for name in plan.rows if column(plan, name, measure, evidence).known]
    if not names:
        return "Not run.\n"
    base = [_minus_base(plan, name, measure, evidence) for name in names]
    ours = [None if name == plan.ours else _minus(plan, plan.ours, name, measure, evidence) for name in names]
    p_base, p_ours = ([float("nan") if c is None else c.p for c in changes] for changes in (base, ours))
    rows = []
    for i, (name, adjusted_base, adjusted_ours) in enumerate(zip(names, holm(p_base), holm(p_ours), strict=True)):
        own = column(plan, name, measure, evidence)
        cells = [score(own.mean) + (FEW if len(own.values) < MIN_SEEDS else "")]
        for change, p in ((base[i], adjusted_base), (ours[i], adjusted_ours)):
            cells += [NONE if change is None else _interval(change), _detectable(change), _significance(change, p)]
        rows.append((name, *cells, _count(_summaries(plan, name, evidence))))
    missing = [name for name in plan.rows if not _summaries(plan, name, evidence)]
    return TextTable("", heads, tuple(rows), f"Not run: {', '.join(missing)}." if missing else "").markdown()


# --- in words ---


def _generalization(plan: TablePlan, evidence: Evidence) -> str:
    """The gain on unseen compositions as a share of that on seen ones, texts being unseen in both."""
    if not _summaries(plan, plan.ours, evidence) or not _summaries(plan, BASE, evidence):
        return f"{plan.ours} on unseen compositions: not run."
    unseen = next(measure for measure in MEASURES if measure.prompts == "unseen")
    gains = [_minus_base(plan, plan.ours, measure, evidence) for measure in (unseen, SEEN)]
    if gains[0] is None or gains[1] is None:
        return f"{plan.ours} on unseen compositions: no such prompts."
    ratio = gains[0].interval.score / gains[1].interval.score if gains[1].interval.excludes_zero else float("nan")
    share = f"{ratio:.2f} of it" if np.isfinite(ratio) else "no share, as the latter is not significant"
    return (
        f"Generation, {plan.ours} minus base: unseen compositions {_interval(gains[0])}, seen compositions in unseen "
        f"texts {_interval(gains[1])}; the former is {share}."
    )


def _collapse(plan: TablePlan, evidence: Evidence) -> str:
    """The rows in which a form of question gets nearly always one answer, and did not from the base."""
    bases = {summary.base: summary for summary in _summaries(plan, BASE, evidence)} if BASE in plan.rows else {}
    found: Counter[tuple[str, str, str]] = Counter()
    compared = 0
    for name, row in plan.rows.items():
        for summary in _summaries(plan, name, evidence) if row.of is None and name != BASE else ():
            base = bases.get(summary.base)
            if base is None:
                continue
            compared += 1
            for benchmark, outcome in summary.outcomes.items():
                earlier = base.outcomes.get(benchmark)
                if earlier is not None and not benchmark.endswith("_plain"):
                    sides = _spelled(earlier.answers), _spelled(outcome.answers), _right(evidence, outcome.prompts)
                    found.update((name, each.form, each.answer) for each in collapsed_forms(*sides))
    if not compared:
        return "Forms of questions that collapsed to one answer: not run."
    if not found:
        return f"No form of question collapsed to one answer in any of {compared} runs."
    lines = [f"{name}: {form!r} to {answer!r} in {runs}" for (name, form, answer), runs in found.items()]
    return f"Forms of questions that collapsed to one answer, of {compared} runs: {'; '.join(lines)}."


def _spelled(counts: Mapping[str, Mapping[str, int]]) -> dict[str, list[str]]:
    return {form: [answer for answer, n in given.items() for _ in range(n)] for form, given in counts.items()}


def _right(evidence: Evidence, prompts: str) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    known = evidence.prompts[prompts]
    for form, right in zip(known.forms, known.right, strict=True):
        if form and right is not None:
            out.setdefault(form, []).append(right)
    return out


def _choices(plan: TablePlan, evidence: Evidence) -> str:
    heads = ("row", "member of the grid", "validation score", "steps", "FLOPs", "chosen")
    rows = []
    for name, row in plan.rows.items():
        if row.untuned is not None:
            rows.append((name, f"no grid: {row.untuned}", *[NONE] * 4))
        tuning = evidence.tuning.get(name)
        for i, member in enumerate([] if tuning is None else tuning["members"]):
            what = " ".join(member["overrides"]) or "as configured"
            chosen = "yes" if tuning is not None and tuning["chosen"] == i else ""
            cost = f"{float(member['flops']):.2e}"
            rows.append((name if i == 0 else "", what, score(member["score"]), str(member["steps"]), cost, chosen))
    if not rows:
        return "No grid has been run.\n"
    note = "A run per member, at the budget of the table, with a seed that no result has; scores are means over tasks."
    return TextTable("", heads, tuple(rows), note).markdown()
