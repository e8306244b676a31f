"""From committed summaries to the values of a results page: per run and prompt, so that every interval follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lvrpo.metrics import pass_at_k
from lvrpo.report.evidence import Evidence, Outcome, PromptSet, RowPlan, Summary, TablePlan
from lvrpo.statistics import Floats, TwoWay, over_seeds_and_prompts

FEW_ANSWERS = 20
"""A form of question with more right answers than these has no balanced accuracy."""

Run = tuple[str, int]
"""(base, seed)."""


@dataclass(frozen=True)
class Measure:
    """A column of the page."""

    heading: str
    benchmark: str
    kind: Literal["first", "balanced", "pass"] = "first"
    """The first sample; the same weighted so that its mean is the balanced accuracy; pass@k of many samples."""
    k: int = 1
    prompts: Literal["all", "seen", "unseen"] = "all"
    """All, or those with combinations that training shows, or never shows."""


MEASURES = (
    Measure("drawings", "generate"),
    Measure("unguided", "generate_plain"),
    Measure("unseen compositions", "generate", prompts="unseen"),
    Measure("pass@16", "generate", "pass", 16),
    Measure("edits", "edit"),
    Measure("questions", "understand", "balanced"),
    Measure("reasoning", "reason"),
)
SEEN = Measure("seen compositions", "generate", prompts="seen")


@dataclass(frozen=True)
class Column:
    """One measure of one row, run by run."""

    values: Mapping[Run, Floats]
    """(P,), nan for prompts that it does not know."""
    clusters: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Over runs and prompts; nan where nothing is known."""
        known = [float(np.nanmean(values)) for values in self.values.values() if np.isfinite(values).any()]
        return sum(known) / len(known) if known else float("nan")

    @property
    def known(self) -> bool:
        """Whether any value is."""
        return bool(self.values) and np.isfinite(self.mean)


def column(plan: TablePlan, row: str, measure: Measure, evidence: Evidence, many: bool = False) -> Column:
    """What the summaries say of one row.

    ``many``: the mean of many samples in place of the first one, for prompts that have them.
    """
    own = plan.rows[row]
    summaries = evidence.summaries.get(own.of or row, {})
    values: dict[Run, Floats] = {}
    clusters: tuple[int, ...] = ()
    for run in own.runs:
        found = None if run not in summaries else _values(own, measure, summaries[run], evidence, many)
        if found is not None:
            values[run], prompts = found
            clusters = prompts.clusters
    return Column(values, clusters)


def difference(later: Column, earlier: Column, by_base: bool = False) -> TwoWay | None:
    """``later`` minus ``earlier`` over the runs that both have, and the prompts that all of these know.

    ``by_base``: a run is compared with that of the same base, whatever its seed. None where nothing can be compared.
    """
    pairs: list[tuple[Floats, Floats]] = []
    of_base = {base: values for (base, _), values in earlier.values.items()}
    for run, values in later.values.items():
        other = of_base.get(run[0]) if by_base else earlier.values.get(run)
        if other is not None:
            pairs.append((values, other))
    if not pairs:
        return None
    table = np.stack([values - other for values, other in pairs])
    mask = np.isfinite(table).all(axis=0)
    if not mask.any():
        return None
    own = [later.clusters[i] for i in np.flatnonzero(mask)]
    return over_seeds_and_prompts(table[:, mask], own)


def balanced_weights(prompts: PromptSet) -> Floats:
    """(P,) weights whose sum is 1: sum_i w_i s_i is the mean over forms of their balanced accuracy.

        w_i = 1 / (|F| |A_f| n_fa),   question i of form f with right answer a; n_fa such questions

    0 for questions of a form with one right answer alone, or with more than ``FEW_ANSWERS``.
    """
    counts: dict[str, dict[str, int]] = {}
    for form, right in zip(prompts.forms, prompts.right, strict=True):
        if form and right is not None:
            of_form = counts.setdefault(form, {})
            of_form[right] = of_form.get(right, 0) + 1
    used = {form: answers for form, answers in counts.items() if 2 <= len(answers) <= FEW_ANSWERS}
    return np.array(
        [
            1.0 / (len(used) * len(used[form]) * used[form][right]) if form in used and right is not None else 0.0
            for form, right in zip(prompts.forms, prompts.right, strict=True)
        ]
    )


def _values(
    row: RowPlan, measure: Measure, summary: Summary, evidence: Evidence, many: bool
) -> tuple[Floats, PromptSet] | None:
    name = measure.benchmark
    if row.settings == "plain" and measure.kind != "pass" and not name.endswith("_plain"):
        name += "_plain"
    outcome = summary.outcomes.get(name)
    if outcome is None:
        return None
    prompts = evidence.prompts[outcome.prompts]
    values = _of_outcome(row, measure, outcome, many)
    if measure.kind == "balanced":
        values = values * balanced_weights(prompts) * values.size
    if measure.prompts != "all":
        wanted = np.array(prompts.held_out) == (measure.prompts == "unseen")
        values = np.where(wanted, values, np.nan)
    return values, prompts


def _of_outcome(row: RowPlan, measure: Measure, outcome: Outcome, many: bool) -> Floats:
    unknown = np.full(outcome.first.size, np.nan)
    if row.best_of is not None:
        single = measure.kind == "first" and not measure.benchmark.endswith("_plain")
        return outcome.best_of.get(row.best_of, unknown) if single else unknown
    if measure.kind == "pass":
        if row.settings == "plain" or outcome.samples < measure.k:
            return unknown
        known = np.isfinite(outcome.counts)
        passes = [pass_at_k(outcome.samples, round(float(c)), measure.k) for c in outcome.counts[known]]
        unknown[known] = passes
        return unknown
    return outcome.counts / outcome.samples if many else outcome.first


__all__ = ["MEASURES", "SEEN", "Column", "Measure", "balanced_weights", "column", "difference"]
