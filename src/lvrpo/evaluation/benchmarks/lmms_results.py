"""Scores from the files of lmms-eval: the results as it aggregates them, and a record of every sample.

A metric whose aggregated value is the mean over its samples (or 100 times that) has intervals and paired differences;
of another (MME's sums, corpus BLEU) the value alone is known.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvrpo.errors import ContractError
from lvrpo.evaluation.benchmarks.lmms_process import result_file
from lvrpo.evaluation.results import benchmark_difference, benchmark_result
from lvrpo.reading import parse_json, read_json_object, read_text
from lvrpo.records import BenchmarkRecord, number

if TYPE_CHECKING:
    from lvrpo.evaluation.suite import Evaluation

RESTORE = "delete the folder of the task to run it again"
TOLERANCE = 1e-6
NOT_LOGGED, NO_NUMBER = "lmms-eval logged no answer", "lmms-eval gave no number"


@dataclass(frozen=True)
class HarnessScore:
    """One metric of one task."""

    value: float
    """As lmms-eval aggregates it."""
    n: int
    """Documents of the task."""
    record: BenchmarkRecord | None = None
    """Its samples; None where the value is not their mean."""

    def as_dict(self) -> dict[str, Any]:
        """As ``BenchmarkResult.as_dict``, with ``official``, the value of lmms-eval."""
        if self.record is not None:
            return {**benchmark_result(self.record).as_dict(), "official": self.value}
        return {**_plain(self.value, self.n), "official": self.value}

    def difference(self, after: HarnessScore) -> dict[str, Any]:
        """``after`` minus this, paired by document where both have the same."""
        if self.record is not None and after.record is not None and self.record.ids == after.record.ids:
            return benchmark_difference(self.record, after.record).as_dict()
        return _plain(after.value - self.value, self.n)


@dataclass(frozen=True)
class HarnessEvaluation:
    """What ``suite.Evaluation`` is for our own benchmarks: by ``task`` or ``task/metric``."""

    scored: Mapping[str, HarnessScore]
    seconds: float = 0.0
    failed: Mapping[str, str] = field(default_factory=dict)
    """Tasks without results, and why."""
    own: Evaluation | None = None
    """Benchmarks of ours that the same command evaluated."""

    def with_own(self, own: Evaluation | None) -> HarnessEvaluation:
        """With benchmarks of ours, whose seconds are added."""
        return self if own is None else replace(self, own=own, seconds=self.seconds + own.seconds)

    def results(self) -> dict[str, Any]:
        """By title: score, low, high, n, categories, official."""
        tasks = {title: score.as_dict() for title, score in self.scored.items()}
        return tasks if self.own is None else self.own.results() | tasks

    def difference(self, after: HarnessEvaluation) -> dict[str, Any]:
        """By title that both have: ``after`` minus this."""
        tasks = {
            title: score.difference(after.scored[title])
            for title, score in self.scored.items()
            if title in after.scored
        }
        return tasks if self.own is None or after.own is None else self.own.difference(after.own) | tasks

    def as_dict(self) -> dict[str, Any]:
        """For JSON: results, and the scores of single samples where they are known."""
        records = {title: score.record.as_dict() for title, score in self.scored.items() if score.record is not None}
        own = {} if self.own is None else self.own.as_dict()["scores"]
        return {
            "results": self.results(),
            "seconds": self.seconds,
            "scores": own | records,
            "failed": dict(self.failed),
        }


def read_scores(output: Path, task: str) -> dict[str, HarnessScore]:
    """The scores of a finished task (of a group: of each of its tasks, and its own) by title.

    Raises ContractError where no document was scored, InputError for damaged files.
    """
    file = result_file(output)
    assert file is not None  # of a finished task
    found = read_json_object(file, RESTORE, finite=False)
    rows = {name: row for name, row in found.get("results", {}).items() if isinstance(row, Mapping)}
    counts = {name: int(each["effective"]) for name, each in found.get("n-samples", {}).items()}
    higher = found.get("higher_is_better", {})
    if not rows or not sum(counts.values()):
        raise ContractError(f"lmms-eval: task {task} scored no sample: see that its data and --n leave some")
    scores: dict[str, HarnessScore] = {}
    for name, row in rows.items():
        samples = _samples(file, name) if name in counts else {}
        metrics = _metrics(row)
        n = counts.get(name, sum(counts.values()))
        for (metric, kind), value in metrics.items():
            title = name if len(metrics) == 1 else f"{name}/{metric}"
            title += f" ({kind})" if sum(other == metric for other, _ in metrics) > 1 else ""
            title += " (lower is better)" if higher.get(name, {}).get(metric) is False else ""
            scores[title] = HarnessScore(value, n, _record(samples, metric, value, n))
    if not scores:
        raise ContractError(f"lmms-eval: task {task} has no score that is a number: see {file}")
    return scores


def _metrics(row: Mapping[str, Any]) -> dict[tuple[str, str], float]:
    """The numbers of a row by metric and filter, without standard errors. Any: JSON values."""
    found = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        as_number = number(value)
        if comma and as_number is not None and "_stderr" not in metric:
            found[metric, kind] = as_number
    return found


def _samples(results: Path, task: str) -> dict[str, Mapping[str, Any]]:
    """The logged samples by document; {} where a document is logged twice, by several filters. Any: JSON values."""
    path = results.with_name(results.name.replace("_results.json", f"_samples_{task}.jsonl"))
    if not path.is_file():
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    lines = read_text(path, RESTORE).splitlines()
    for place, line in enumerate(lines, start=1):
        row = parse_json(line, f"{path}:{place}", RESTORE, finite=False)
        found[str(row.get("doc_id"))] = row
    return found if len(found) == len(lines) else {}


def _record(samples: Mapping[str, Mapping[str, Any]], metric: str, value: float, n: int) -> BenchmarkRecord | None:
    """The record of a metric whose mean over samples is ``value``, else None. Any: JSON values."""
    found = {
        key: number(float(s) if isinstance(s, bool) else s) for key, row in samples.items() for s in [row.get(metric)]
    }
    known = [each for each in found.values() if each is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    scale = next((s for s in (1.0, 100.0) if math.isclose(s * mean, value, rel_tol=TOLERANCE, abs_tol=TOLERANCE)), None)
    if scale is None:
        return None
    lost = [key for key in map(str, range(n)) if key not in found][: max(0, n - len(found))]
    ids = (*found, *lost)
    scores = tuple(math.nan if (each := found.get(key)) is None else scale * each for key in ids)
    reasons = tuple(NOT_LOGGED if key not in found else NO_NUMBER if found[key] is None else "" for key in ids)
    return BenchmarkRecord(
        ids,
        tuple("" for _ in ids),
        tuple(_cluster(samples.get(key), key) for key in ids),
        scores,
        settings={"scored_by": f"lmms-eval, {metric}"},
        metric="success" if all(0 <= each <= 1 for each in known) and scale == 1 else "reward",
        failures=reasons if any(reasons) else (),
    )


def _cluster(sample: Mapping[str, Any] | None, key: str) -> str:
    """The unit of the bootstrap: the pictures, where they are named, else the document."""
    media: Sequence[Any] = (sample or {}).get("input_media") or ()
    return json.dumps(media) if media else key


def _plain(value: float, n: int) -> dict[str, Any]:
    return {"score": value, "low": None, "high": None, "n": n, "categories": {}, "metric": "reward"}
