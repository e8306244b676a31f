"""Results of a benchmark from its record: means with intervals, pass@k, best of n, balanced accuracy and agreement.

A measure that the record cannot give is left out, never 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

from lvrpo.errors import ContractError
from lvrpo.metrics import (
    FEW_ANSWERS,
    ReadBack,
    agreement,
    answer_entropy,
    balanced_accuracy,
    best_of_n,
    collapsed_forms,
    group_spread,
    pass_at_k,
)
from lvrpo.records import BenchmarkRecord, BenchmarkResult, Estimate
from lvrpo.statistics import (
    Floats,
    Interval,
    bootstrap_statistic,
    detectable_difference,
    holm,
    mean_interval,
    paired_difference,
    paired_p_value,
)

T = TypeVar("T")

PASS_AT = (1, 4, 16)
BEST_OF = (2, 4, 8)
BASELINE_BEST_OF = 4
"""Values of n: a single sample of the later policy is compared with the best of n of the earlier one."""
MOST_REASONS = 5
"""Reasons of missing scores that a result names."""

Measures = dict[str, Any]
"""Any: nested JSON values."""


@dataclass(frozen=True)
class PromptResult:
    """One prompt of a record: see ``BenchmarkRecord``."""

    cluster: str
    successes: tuple[float, ...]
    judged: tuple[float | None, ...] = ()
    read_back: ReadBack | None = None
    form: str = ""
    right: str | None = None
    answers: tuple[str, ...] = ()


def benchmark_result(record: BenchmarkRecord) -> BenchmarkResult:
    """Means with intervals, over all prompts and by category, and the measures of ``measure``."""

    def mean(rows: Sequence[int]) -> Estimate:
        return _estimate(mean_interval(_take(record.scores, rows), _take(record.clusters, rows)))

    counted = _scored_prompts(record)
    whole = _estimate(_mean_over_categories(record.scores, record, counted)) if by_category(record) else mean(counted)
    measures = measure(_record_rows(record), record.samples) | missing(record)
    return _result(record, counted, whole, mean, measures)


def by_category(record: BenchmarkRecord) -> bool:
    """Whether the score of the whole is the mean of categories."""
    return record.mean_over == "categories" and len({*record.categories}) > 1


def missing(record: BenchmarkRecord) -> Measures:
    """``masked``: how many prompts have no score, of how many, and the most frequent reasons; {} for none."""
    pairs = zip(record.failures or [""] * len(record.scores), record.scores, strict=True)
    reasons = Counter(reason or "no score" for reason, score in pairs if not math.isfinite(score))
    if not reasons:
        return {}
    common = dict(reasons.most_common(MOST_REASONS))
    return {"masked": {"prompts": sum(reasons.values()), "of": len(record.ids), "reasons": common}}


def _mean_over_categories(values: Sequence[float], record: BenchmarkRecord, rows: Sequence[int]) -> Interval:
    """Mean over categories of their means, clusters resampled; nan where a category has no score.

    (1 / |C|) sum_c mean { values_i : category c, i in rows }
    """
    if {*record.categories} > {record.categories[i] for i in rows}:
        return Interval(math.nan, math.nan, math.nan, len(rows))
    if len({values[i] for i in rows}) == 1:
        return mean_interval(_take(values, rows), _take(record.clusters, rows))
    cluster = {name: c for c, name in enumerate(dict.fromkeys(_take(record.clusters, rows)))}
    column = {name: c for c, name in enumerate(dict.fromkeys(_take(record.categories, rows)))}
    sums, counts = np.zeros((len(cluster), len(column))), np.zeros((len(cluster), len(column)))
    for i in rows:
        place = cluster[record.clusters[i]], column[record.categories[i]]
        sums[place] += values[i]
        counts[place] += 1

    def macro(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nanmean((weights @ sums) / (weights @ counts), axis=1)

    return bootstrap_statistic(macro, len(cluster), n=len(rows))


def _category_difference(
    whole: Estimate, before: BenchmarkRecord, after: BenchmarkRecord, rows: Sequence[int]
) -> Estimate:
    """The mean over categories of their mean differences, in place of ``whole``, which is that over prompts.

    p and the detectable effect are those of the mean of

        y_i = D + n (d_i - mean_c) / (|C| n_c),   n differences d_i, n_c of them of category c; D = mean of mean_c,

    which is D, and whose clustered standard error is the linearized one of D.
    """
    gains = [a - b for b, a in zip(before.scores, after.scores, strict=True)]
    found = _mean_over_categories(gains, after, rows)
    if math.isfinite(found.score) and len({gains[i] for i in rows}) == 1:
        return whole  # equal differences have one mean
    labels, clusters = _take(after.categories, rows), _take(before.clusters, rows)
    counts = Counter(labels)
    sums = dict.fromkeys(counts, 0.0)
    for i, label in zip(rows, labels, strict=True):
        sums[label] += gains[i]
    linear = [
        found.score + (gains[i] - sums[c] / counts[c]) * len(rows) / (len(counts) * counts[c])
        for i, c in zip(rows, labels, strict=True)
    ]
    if not math.isfinite(found.score):
        return replace(_estimate(found), detectable=math.nan, p=math.nan)
    sides = [0.0] * len(rows), linear, clusters
    return replace(_estimate(found), detectable=detectable_difference(*sides), p=paired_p_value(*sides))


def benchmark_difference(before: BenchmarkRecord, after: BenchmarkRecord) -> BenchmarkResult:
    """``after`` minus ``before``, paired by prompt.

    Each estimate has its interval, p (of categories also ``p_holm``, adjusted for how many there are) and the smallest
    effect that could have been found, ``detectable``. Raises ContractError for records of different prompts.
    """
    if not after.has_prompts_of(before):
        raise ContractError("the two evaluations hold different prompts: evaluate both with one command")

    def paired(rows: Sequence[int]) -> Estimate:
        sides = _take(before.scores, rows), _take(after.scores, rows), _take(before.clusters, rows)
        found = _estimate(paired_difference(*sides))
        return replace(found, detectable=detectable_difference(*sides), p=paired_p_value(*sides))

    both = sorted({*_scored_prompts(before)} & {*_scored_prompts(after)})
    whole = paired(both)
    if by_category(after):
        whole = _category_difference(whole, before, after, both)
    measures = compare(_record_rows(before), _record_rows(after), min(before.samples, after.samples))
    lost = len(before.ids) - len(both)
    measures |= {"masked": {"prompts": lost, "of": len(before.ids)}} if lost else {}
    result = _result(before, both, whole, paired, measures)
    adjusted = holm([math.nan if each.p is None else each.p for each in result.categories.values()])
    pairs = zip(result.categories.items(), adjusted, strict=True)
    return replace(result, categories={name: replace(each, p_holm=p) for (name, each), p in pairs})


def _result(
    record: BenchmarkRecord,
    counted: Sequence[int],
    whole: Estimate,
    estimate: Callable[[Sequence[int]], Estimate],
    measures: Measures,
) -> BenchmarkResult:
    """``whole`` with the estimates by category, and by seen or unseen compositions where some are unseen."""
    kinds = ["unseen" if new else "seen" for new in record.held_out] if any(record.held_out) else []
    categories, compositions = (
        {label: estimate(rows) for label, rows in _by_label(labels, counted).items()}
        for labels in (record.categories, kinds)
    )
    return BenchmarkResult(
        **vars(whole), categories=categories, compositions=compositions, metric=record.metric, measures=measures
    )


def _estimate(found: Interval) -> Estimate:
    return Estimate(found.score, found.low, found.high, found.n)


def _by_label(labels: Sequence[str], counted: Sequence[int]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    for i in counted if labels else ():
        if labels[i]:
            rows.setdefault(labels[i], []).append(i)
    return rows


def _scored_prompts(record: BenchmarkRecord) -> list[int]:
    return [i for i, score in enumerate(record.scores) if math.isfinite(score)]


def _take(values: Sequence[T], rows: Sequence[int]) -> list[T]:
    return [values[i] for i in rows]


def _record_rows(record: BenchmarkRecord) -> list[PromptResult]:
    """The rows of a record, prompt by prompt; [] for a record without samples."""
    return [
        PromptResult(
            cluster=record.clusters[i],
            successes=successes if all(map(math.isfinite, successes)) else (),
            judged=record.judged[i] if record.judged else (),
            read_back=record.read_back[i] if record.read_back else None,
            form=record.forms[i] if record.forms else "",
            right=record.right[i] if record.right else None,
            answers=record.answers[i] if record.answers else (),
        )
        for i, successes in enumerate(record.successes)
    ]


def measure(rows: Sequence[PromptResult], samples: int = 1) -> Measures:
    """pass_at_k, best_of, groups, agreement, balanced and forms, as far as the record holds them.

    pass@k, best of n and ``groups`` (spread of the samples) are over the prompts with the most samples. ``balanced``:
    macro mean over forms of question of their balanced accuracy, of the first ``samples`` answers; ``forms``: per form
    its balanced accuracy and the entropy of given and right answers.
    """
    found: Measures = {}
    many = [row for row in rows if len(row.successes) == _max_samples(rows)]
    if _max_samples(rows) > 1:
        found["pass_at_k"] = {str(k): _mean(many, _pass_values(many, k)) for k in PASS_AT if k <= _max_samples(rows)}
        spread = group_spread([row.successes for row in many])
        found["groups"] = {**asdict(spread), "samples": _max_samples(rows)}
    judged = [row for row in many if _has_judge(row)]
    if judged and _max_samples(rows) > 1:
        sizes = [n for n in BEST_OF if n <= _max_samples(rows)]
        found["best_of"] = {str(n): _mean(judged, _best_values(judged, n)) for n in sizes}
    drawings = [row for row in rows if row.read_back is not None]
    if drawings:
        found["agreement"] = _agreement(drawings)
    forms = _form_rows(rows)
    if forms:
        found |= _answers(forms, samples)
    return found


def compare(before: Sequence[PromptResult], after: Sequence[PromptResult], samples: int = 1) -> Measures:
    """``after`` minus ``before``, paired by prompt: each with its interval and ``detectable`` effect.

    ``against_best_of``: one sample of ``after`` minus the best of ``BASELINE_BEST_OF`` of ``before`` by its judge.
    ``collapsed``: forms of question that nearly always get the same answer now.
    """
    found: Measures = {}
    if len(before) != len(after) or not before:
        return found
    pairs = [
        (b, a)
        for b, a in zip(before, after, strict=True)
        if (len(b.successes), len(a.successes)) == _both(before, after)
    ]
    one, two = [b for b, _ in pairs], [a for _, a in pairs]
    most = min(_both(before, after))
    if most > 1:
        found["pass_at_k"] = {
            str(k): _paired(one, _pass_values(one, k), _pass_values(two, k)) for k in PASS_AT if k <= most
        }
        spreads = [group_spread([row.successes for row in side]) for side in (one, two)]
        found["groups"] = {"std": spreads[1].std - spreads[0].std, "signal": spreads[1].signal - spreads[0].signal}
    judged = [(b, a) for b, a in pairs if _has_judge(b)]
    if judged and most >= BASELINE_BEST_OF:
        one, two = [b for b, _ in judged], [a for _, a in judged]
        found["against_best_of"] = {
            str(BASELINE_BEST_OF): _paired(one, _best_values(one, BASELINE_BEST_OF), _pass_values(two, 1))
        }
        if all(_has_judge(row) for row in two):
            sizes = [n for n in BEST_OF if n <= most]
            found["best_of"] = {str(n): _paired(one, _best_values(one, n), _best_values(two, n)) for n in sizes}
    asked = [
        pair for pair in zip(before, after, strict=True) if pair[0].form == pair[1].form and all(map(_is_asked, pair))
    ]
    if asked:
        sides = [_form_rows([pair[side] for pair in asked]) for side in (0, 1)]
        balanced = _balanced_interval(sides[1], samples, minus=sides[0])
        if balanced is not None:
            found["balanced"] = balanced.as_dict()
        given = [{name: _given_answers(rows, samples) for name, rows in side.items()} for side in sides]
        right = {name: [str(row.right) for row in rows] for name, rows in sides[0].items()}
        found["collapsed"] = [asdict(each) for each in collapsed_forms(given[0], given[1], right)]
        found["forms"] = {
            name: {"entropy": answer_entropy(given[1][name]) - answer_entropy(given[0][name])} for name in right
        }
    return found


def _pass_values(rows: Sequence[PromptResult], k: int) -> list[float]:
    """pass@k of each prompt."""
    return [pass_at_k(len(row.successes), round(sum(row.successes)), k) for row in rows]


def _best_values(rows: Sequence[PromptResult], n: int) -> list[float]:
    """Best of ``n`` by the judge, of each prompt; all of them must be judged."""
    return [best_of_n([score for score in row.judged if score is not None], row.successes, n) for row in rows]


def _form_rows(rows: Sequence[PromptResult]) -> dict[str, list[PromptResult]]:
    """The questions of each form, those with a right text and an answer."""
    found: dict[str, list[PromptResult]] = {}
    for row in filter(_is_asked, rows):
        found.setdefault(row.form, []).append(row)
    return found


def _is_asked(row: PromptResult) -> bool:
    """Whether it is a question with a right text, an answer and its score."""
    return bool(row.form and row.right is not None and row.answers and row.successes)


def _balanced_interval(
    forms: Mapping[str, Sequence[PromptResult]], samples: int, minus: Mapping[str, Sequence[PromptResult]] | None = None
) -> Interval | None:
    """Mean over forms of the balanced accuracy, clusters resampled; None where no form has 2 to ``FEW_ANSWERS`` right
    answers. ``minus``: another policy's rows of the same questions, whose accuracy is subtracted.

        (1 / |F|) sum_f (1 / |A_f|) sum_{a in A_f} mean { s_i : form f, right answer a }
    """
    cells: list[tuple[int, list[PromptResult], list[float]]] = []
    used = [name for name, rows in forms.items() if _has_balanced_accuracy(rows)]
    for f, name in enumerate(used):
        earlier = minus[name] if minus is not None else [None] * len(forms[name])
        by_answer: dict[str, tuple[list[PromptResult], list[float]]] = {}
        for row, other in zip(forms[name], earlier, strict=True):
            rows, values = by_answer.setdefault(str(row.right), ([], []))
            rows.append(row)
            values.append(_mean_success(row, samples) - (0.0 if other is None else _mean_success(other, samples)))
        cells += [(f, rows, values) for rows, values in by_answer.values()]
    if not cells:
        return None
    index = {name: i for i, name in enumerate(dict.fromkeys(row.cluster for _, rows, _ in cells for row in rows))}
    sums, counts = np.zeros((len(index), len(cells))), np.zeros((len(index), len(cells)))
    for column, (_, rows, values) in enumerate(cells):
        places = [index[row.cluster] for row in rows]
        np.add.at(sums[:, column], places, values)
        np.add.at(counts[:, column], places, 1.0)
    form_of = np.array([f for f, _, _ in cells])

    def macro(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            recall = (weights @ sums) / (weights @ counts)
            drawn = np.isfinite(recall)
            by_form = [
                np.where(drawn, recall, 0.0)[:, form_of == f].sum(axis=1) / drawn[:, form_of == f].sum(axis=1)
                for f in range(len(used))
            ]
        return np.nanmean(np.stack(by_form), axis=0)

    return bootstrap_statistic(macro, len(index), n=sum(len(rows) for _, rows, _ in cells))


# --- inside ---


def _answers(forms: Mapping[str, Sequence[PromptResult]], samples: int) -> Measures:
    found: Measures = {}
    balanced = _balanced_interval(forms, samples)
    if balanced is not None:
        found["balanced"] = balanced.as_dict()
    found["forms"] = {}
    for name, rows in forms.items():
        right = [str(row.right) for row in rows]
        successes = [_mean_success(row, samples) for row in rows]
        found["forms"][name] = {
            "balanced": balanced_accuracy(right, successes) if _has_balanced_accuracy(rows) else None,
            "accuracy": sum(successes) / len(successes),
            "entropy": answer_entropy(_given_answers(rows, samples)),
            "entropy_right": answer_entropy(right),
            "n": len(rows),
        }
    return found


def _agreement(drawings: Sequence[PromptResult]) -> Measures:
    backs = [row.read_back for row in drawings if row.read_back is not None]
    index = {name: i for i, name in enumerate(dict.fromkeys(row.cluster for row in drawings))}
    counts = np.zeros((len(index), 4))
    for row, back in zip(drawings, backs, strict=True):
        counts[index[row.cluster]] += (back.facts, back.confirmed, back.hold, back.agree)

    def ratio(column: int) -> Measures:
        def share(weights: Floats) -> Floats:
            totals = weights @ counts
            return totals[:, column] / totals[:, 0]

        return bootstrap_statistic(share, len(index), n=len(drawings)).as_dict()

    whole = agreement(backs)
    return {
        "confirmed": ratio(1),
        "hold": ratio(2),
        "agree": ratio(3),
        "kappa": whole.kappa if math.isfinite(whole.kappa) else None,
        "facts": whole.facts,
    }


def _max_samples(rows: Sequence[PromptResult]) -> int:
    return max((len(row.successes) for row in rows), default=0)


def _both(before: Sequence[PromptResult], after: Sequence[PromptResult]) -> tuple[int, int]:
    return _max_samples(before), _max_samples(after)


def _has_judge(row: PromptResult) -> bool:
    return len(row.judged) == len(row.successes) > 0 and None not in row.judged


def _has_balanced_accuracy(rows: Sequence[PromptResult]) -> bool:
    return 2 <= len({row.right for row in rows}) <= FEW_ANSWERS


def _given_answers(rows: Sequence[PromptResult], samples: int) -> list[str]:
    return [answer for row in rows for answer in row.answers[:samples]]


def _mean_success(row: PromptResult, samples: int) -> float:
    first = row.successes[:samples]
    return sum(first) / len(first)


def _mean(rows: Sequence[PromptResult], values: Sequence[float]) -> Measures:
    return mean_interval(values, [row.cluster for row in rows]).as_dict()


def _paired(rows: Sequence[PromptResult], before: Sequence[float], after: Sequence[float]) -> Measures:
    clusters = [row.cluster for row in rows]
    found = paired_difference(before, after, clusters).as_dict()
    return {**found, "detectable": detectable_difference(before, after, clusters)}
