"""Runs of one recipe with several seeds as one table: the change over seeds and prompts, and what could be told."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lvrpo.errors import InputError
from lvrpo.records import BenchmarkRecord, EvaluationRecord, read_record
from lvrpo.report.measures import TextTable
from lvrpo.report.numbers import score
from lvrpo.report.verdict import label
from lvrpo.statistics import MIN_SEEDS, Floats, TwoWay, holm, over_seeds_and_prompts

LEVEL = 0.05


@dataclass(frozen=True)
class SeedRow:
    """One benchmark, or one category of it, over all runs."""

    name: str
    before: float
    after: float
    change: TwoWay
    p: float
    """Of no change; of a category adjusted for how many the benchmark has (Holm)."""

    @property
    def told(self) -> str:
        """up, down, "" where no change is told, or why none can be."""
        if self.change.too_few:
            seeds = self.change.interval.n
            return f"too few seeds to tell ({seeds})" if seeds < MIN_SEEDS else "too few prompts to tell"
        if not (self.change.interval.clear_of_zero and (not np.isfinite(self.p) or self.p < LEVEL)):
            return ""
        return "up" if self.change.interval.score > 0 else "down"


def seed_rows(runs: Sequence[Path]) -> dict[str, list[SeedRow]]:
    """By benchmark that all runs have: the whole, then its categories; of prompts that every run could score.

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
    """``seed_rows`` as text; a row with too few seeds says so."""
    rows = []
    for benchmark, found in seed_rows(runs).items():
        for i, row in enumerate(found if categories else found[:1]):
            name = f"  {row.name.replace('_', ' ')}" if i else label(benchmark)
            each, tells = row.change.interval, row.change.detectable
            spread = f" [{score(each.low, 3, True)}, {score(each.high, 3, True)}]" if np.isfinite(each.low) else ""
            cells = (score(row.before), score(row.after), score(each.score, 3, True) + spread)
            tells_cell = score(tells) if np.isfinite(tells) else "–"
            rows.append((name, *cells, tells_cell, f"{row.p:.2g}" if np.isfinite(row.p) else "–", row.told))
    seeds = f"{len(runs)} run{'s' if len(runs) != 1 else ''}"
    heads = ("task", "before", "after", "difference [95 %]", "could tell", "p", "told")
    note = "interval over seeds and prompts; could tell: with probability .8; p of categories adjusted (Holm)"
    return TextTable(f"{seeds}, one per seed", heads, tuple(rows), note)


def read_scores(run: Path, phase: str) -> Mapping[str, BenchmarkRecord]:
    """Scores of eval/PHASE.json of a run, by benchmark; raises InputError where it is missing or unreadable."""
    path = run / "eval" / f"{phase}.json"
    return read_record(EvaluationRecord, path, "name runs that have been evaluated").scores


def _row(name: str, before: Floats, after: Floats, clusters: Sequence[str], kept: Sequence[bool]) -> SeedRow:
    mask = np.array(kept)
    own = [cluster for cluster, keep in zip(clusters, kept, strict=True) if keep]
    change = over_seeds_and_prompts((after - before)[:, mask], own)
    return SeedRow(name, float(before[:, mask].mean()), float(after[:, mask].mean()), change, change.p)


__all__ = ["SeedRow", "read_scores", "seed_rows", "seeds_table"]
