"""The record of one benchmark, prompt by prompt and sample by sample: every table can be computed again from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from lvrpo.errors import ContractError
from lvrpo.evaluation.measures import Row, compare, measure
from lvrpo.metrics import ReadBack
from lvrpo.rewards.success import Metric
from lvrpo.statistics import (
    Interval,
    detectable_difference,
    holm,
    mean_interval,
    paired_difference,
    paired_p_value,
)

T = TypeVar("T")


@dataclass(frozen=True)
class Scored:
    """One benchmark, prompt by prompt; enough to compute every interval, and to be paired with another policy's.

    What follows ``scores`` is empty in records of before there were samples; else it has one entry per prompt.
    """

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    clusters: tuple[str, ...]
    """What a prompt shares with others: its picture, or what its text says. Whole clusters are resampled."""
    scores: tuple[float, ...]
    """Mean of the first ``samples`` outputs; nan where a reward failed: such prompts are left out of every mean."""
    samples: int = 1
    successes: tuple[tuple[float, ...], ...] = ()
    """1 or 0 of every sample; some prompts are sampled more often than ``samples``."""
    judged: tuple[tuple[float | None, ...], ...] = ()
    """What the judge's reading side makes of every sample; () where nobody judged, None where it could not."""
    read_back: tuple[ReadBack | None, ...] = ()
    """What the model itself reads in its first drawing; None where there is none."""
    forms: tuple[str, ...] = ()
    """The form of each question; "" where there is no right text."""
    right: tuple[str | None, ...] = ()
    """The right answers, where the output is a text."""
    answers: tuple[tuple[str, ...], ...] = ()
    """The answers given, of the first ``samples``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was sampled, and by whom it was judged. Any: JSON values."""
    metric: Metric = "success"
    """success: shares of right outputs; reward: means of the run's own rewards, of which no samples are held."""
    held_out: tuple[bool, ...] = ()
    """Whether a prompt shows a combination that training never shows."""

    def result(self) -> dict[str, Any]:
        """score, low, high, n, metric; the same per category; and what ``measures.measure`` makes of the samples."""
        means = _by_category(
            self,
            self._counted(),
            lambda rows: mean_interval(_at(self.scores, rows), _at(self.clusters, rows)).as_dict(),
        )
        return {**means, "metric": self.metric, **measure(self.rows(), self.samples)}

    def difference(self, after: Scored) -> dict[str, Any]:
        """``after`` minus this, paired by prompt.

        Each row has its interval, p (of categories also ``p_holm``, adjusted for how many there are) and the smallest
        effect that could have been told, ``detectable``.
        """
        if self.ids != after.ids:
            raise ContractError("the two evaluations hold different prompts: evaluate both with one command")

        def row(rows: Sequence[int]) -> dict[str, Any]:
            sides = _at(self.scores, rows), _at(after.scores, rows), _at(self.clusters, rows)
            found: Interval = paired_difference(*sides)
            return {**found.as_dict(), "detectable": detectable_difference(*sides), "p": paired_p_value(*sides)}

        both = sorted({*self._counted()} & {*after._counted()})
        found = _by_category(self, both, row)
        categories = list(found["categories"].values())
        for each, adjusted in zip(categories, holm([each["p"] for each in categories]), strict=True):
            each["p_holm"] = adjusted
        return {**found, "metric": self.metric, **compare(self.rows(), after.rows(), min(self.samples, after.samples))}

    def _counted(self) -> list[int]:
        return [i for i, score in enumerate(self.scores) if math.isfinite(score)]

    def rows(self) -> list[Row]:
        """Prompt by prompt, as the measures read them; none of a record that has no samples."""
        return [
            Row(
                cluster=self.clusters[i],
                successes=successes,
                judged=self.judged[i] if self.judged else (),
                read_back=self.read_back[i] if self.read_back else None,
                form=self.forms[i] if self.forms else "",
                right=self.right[i] if self.right else None,
                answers=self.answers[i] if self.answers else (),
            )
            for i, successes in enumerate(self.successes)
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is empty is left out."""
        raw: dict[str, Any] = {name: list(values) for name, values in vars(self).items() if isinstance(values, tuple)}
        raw["successes"] = [[int(success) for success in row] for row in self.successes]
        raw["read_back"] = [None if back is None else list(vars(back).values()) for back in self.read_back]
        kept = {
            name: values
            for name, values in raw.items()
            if values or name in ("ids", "categories", "clusters", "scores")
        }
        return {**kept, "samples": self.samples, "settings": dict(self.settings), "metric": self.metric}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Scored:
        """What ``as_dict`` gave, now or before there were samples; unknown fields are passed over."""
        known = {each.name for each in fields(cls)}
        values = {name: _tuples(value) for name, value in raw.items() if name in known}
        if "read_back" in values:
            values["read_back"] = tuple(None if back is None else ReadBack(*back) for back in values["read_back"])
        values["scores"] = tuple(math.nan if score is None else score for score in raw["scores"])
        return cls(**values)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, all the way down. Any: JSON values."""
    return tuple(_tuples(inner) for inner in value) if isinstance(value, list | tuple) else value


def _at(values: Sequence[T], rows: Sequence[int]) -> list[T]:
    return [values[i] for i in rows]


def _by_category(
    scored: Scored, counted: Sequence[int], row: Callable[[Sequence[int]], dict[str, Any]]
) -> dict[str, Any]:
    """The counted prompts; each category; and where some show unseen combinations, those and the others."""
    found = {**row(counted), "categories": _each(scored.categories, counted, row)}
    if any(scored.held_out):
        kinds = ["unseen" if new else "seen" for new in scored.held_out]
        found["compositions"] = _each(kinds, counted, row)
    return found


def _each(
    labels: Sequence[str], counted: Sequence[int], row: Callable[[Sequence[int]], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    rows: dict[str, list[int]] = {}
    for i in counted:
        rows.setdefault(labels[i], []).append(i)
    return {label: row(chosen) for label, chosen in rows.items() if label}


__all__ = ["Scored"]
