"""Estimators that tell alignment from sharpening: what many samples, a judge's choice and the mix of answers say.

Pure functions on the record of an evaluation, so that every table can be computed again without the model.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from lvrpo.errors import ContractError

COLLAPSED_SHARE = 0.9
"""A form has collapsed where one answer is given to at least this share of its questions: at most .47 bits between two
answers. Balanced yes-no questions that are all answered rightly lie at .5."""
MIN_ANSWERS = 20
"""Fewer answers to a form say nothing of its collapse: the share of one answer has then a standard error above .06."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that at least one of ``k`` samples is right, from the right ones among more samples.

        pass@k = 1 - C(n - c, k) / C(n, k),   n = ``num_samples`` >= k, c = ``num_right``

    (arXiv:2107.03374, eq. 1): unbiased, where 1 - (1 - c / n)^k is not. Range [0, 1].
    Raises ContractError unless 1 <= k <= n and 0 <= c <= n.
    Differs from the paper: nothing; binomials of whole numbers are exact, so no running product is needed.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ContractError(f"pass@{k} of {num_right} right among {num_samples}: needs 1 <= k <= n and 0 <= c <= n")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def best_of_n_weights(scores: Sequence[float], n: int) -> list[float]:
    """Probability of each sample to be the one a judge picks from a random subset of ``n``.

        w_i = [C(L + m, n) - C(L, n)] / (m C(N, n)),   L samples scored lower than i, m scored as i is (i among them)

    of N samples: the top score of a subset is that of i where none is higher and not all are lower; ties are broken
    evenly. The weights sum to 1; n = 1 gives 1 / N each, n = N the top ones alone.
    Raises ContractError unless 1 <= n <= N, and on a score that is not finite.
    """
    if not 1 <= n <= len(scores):
        raise ContractError(f"best of {n} among {len(scores)} samples: needs 1 <= n <= samples")
    if not all(math.isfinite(score) for score in scores):
        raise ContractError("a judge's score is not finite: leave the prompt out, a missing score is never a number")
    counts = Counter(scores)
    lower, weight = 0, {}
    for score in sorted(counts):
        tied = counts[score]
        weight[score] = (comb(lower + tied, n) - comb(lower, n)) / (tied * comb(len(scores), n))
        lower += tied
    return [weight[score] for score in scores]


def best_of_n(scores: Sequence[float], successes: Sequence[float], n: int) -> float:
    """Expected success of the sample that a judge scores highest among ``n``, over all subsets of the samples.

        best-of-n = sum_i w_i s_i,   w as in ``best_of_n_weights``

    Without replacement, so unbiased for n fresh samples. Range [0, 1] for successes in it.
    Raises ContractError as ``best_of_n_weights`` does, and without one success per score.
    """
    if len(scores) != len(successes):
        raise ContractError(f"{len(scores)} scores of {len(successes)} samples: give one per sample")
    return float(sum(w * s for w, s in zip(best_of_n_weights(scores, n), successes, strict=True)))


def recalls(right: Sequence[str], successes: Sequence[float]) -> dict[str, float]:
    """Share of the questions with each right answer that are answered rightly, in order of first appearance."""
    if len(right) != len(successes):
        raise ContractError(f"{len(right)} right answers and {len(successes)} successes: give one each")
    rows: dict[str, list[float]] = {}
    for answer, success in zip(right, successes, strict=True):
        rows.setdefault(answer, []).append(float(success))
    return {answer: sum(row) / len(row) for answer, row in rows.items()}


def balanced_accuracy(right: Sequence[str], successes: Sequence[float]) -> float:
    """Mean over the right answers that occur of the share answered rightly.

        (1 / |A|) sum_{a in A} mean { s_i : right_i = a }

    Whoever gives one and the same answer to every question has 1 / |A|, however unbalanced the questions are.
    nan for no question. Raises ContractError without one success per right answer.
    """
    found = recalls(right, successes)
    return sum(found.values()) / len(found) if found else math.nan


def answer_entropy(answers: Sequence[str]) -> float:
    """Entropy of the answers given, in bits: - sum_a p_a log2 p_a with their shares p; 0 where all are one.

    nan for no answer. The plug-in estimate, low by about (K - 1) / (2 n ln 2) for K answers of n: compare equal n.
    """
    if not answers:
        return math.nan
    shares = [count / len(answers) for count in Counter(answers).values()]
    return abs(-sum(p * math.log2(p) for p in shares))


@dataclass(frozen=True)
class Collapse:
    """A form of question that nearly always gets the same answer, and did not before."""

    form: str
    answer: str
    """The answer."""
    share: float
    """Of the questions that get it now."""
    before: float
    """Share of them that got it before."""
    entropy: float
    """Of the answers, bits, now."""
    entropy_before: float


def collapsed_forms(
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
    right: Mapping[str, Sequence[str]] | None = None,
    share: float = COLLAPSED_SHARE,
) -> list[Collapse]:
    """The forms whose answers have collapsed to one: ``share`` of the questions or more get it now, and did not before.

    That answers flip from nearly always one to nearly always another is a collapse too.

    ``before``, ``after``: the answers given, by form of question; forms with fewer than ``MIN_ANSWERS`` now, or none
    before, are left out. ``right``: the right answers by form; where they are themselves one answer at that share, to
    give it is no collapse. Raises ContractError unless .5 < share <= 1.
    """
    if not 0.5 < share <= 1:
        raise ContractError(f"share={share}: needs .5 < share <= 1")
    found = []
    for form, answers in after.items():
        earlier = before.get(form, ())
        if len(answers) < MIN_ANSWERS or not earlier:
            continue
        answer, count = Counter(answers).most_common(1)[0]
        now, then = count / len(answers), share_of(answer, earlier)
        deserved = share_of(answer, right[form]) if right is not None and form in right else 0.0
        if now >= share > max(then, deserved):
            found.append(Collapse(form, answer, now, then, answer_entropy(answers), answer_entropy(earlier)))
    return found


def share_of(answer: str, answers: Sequence[str]) -> float:
    """How many of the answers are this one; nan for none."""
    return sum(each == answer for each in answers) / len(answers) if answers else math.nan


@dataclass(frozen=True)
class GroupSpread:
    """How the samples of one prompt differ."""

    std: float
    """Mean over groups of the standard deviation of success."""
    signal: float
    """Share of the groups in which not all samples are equal: a group-relative advantage is 0 in the others."""
    groups: int


def group_spread(groups: Sequence[Sequence[float]]) -> GroupSpread:
    """Mean standard deviation (over the group, divided by G) inside the groups, and the share with any; nan for none.

    Groups of one sample are left out: they have no spread.
    """
    stds = [float(np.std(group)) for group in groups if len(group) > 1]
    if not stds:
        return GroupSpread(math.nan, math.nan, 0)
    return GroupSpread(sum(stds) / len(stds), sum(std > 0 for std in stds) / len(stds), len(stds))


@dataclass(frozen=True)
class ReadBack:
    """Facts of one drawing as the model's own reader and as a verifier find them."""

    facts: int
    """How many the prompt states."""
    confirmed: int
    """Of which the reader finds in the drawing."""
    hold: int
    """Of which the verifier finds."""
    agree: int
    """On which the two say the same."""


@dataclass(frozen=True)
class Agreement:
    """The two directions of a model: what it reads in what it drew."""

    confirmed: float
    """Share of the stated facts that its reader finds in its drawing: agreement of the two directions."""
    hold: float
    """Share that the verifier finds."""
    agree: float
    """Share on which reader and verifier say the same."""
    kappa: float
    """Cohen's kappa of the two: 1 where they always agree, 0 where as often as two that know nothing of each other;
    nan where either of them always says the same."""
    facts: int


def agreement(drawings: Sequence[ReadBack]) -> Agreement:
    """Facts of all drawings pooled, with Cohen's kappa between reader and verifier:

        kappa = (p_o - p_e) / (1 - p_e),   p_o = share agreed on,   p_e = r v + (1 - r)(1 - v),

    r and v the shares that reader and verifier find (Cohen 1960). nan for no fact.
    """
    facts = sum(d.facts for d in drawings)
    if not facts:
        return Agreement(math.nan, math.nan, math.nan, math.nan, 0)
    confirmed = sum(d.confirmed for d in drawings) / facts
    hold = sum(d.hold for d in drawings) / facts
    agree = sum(d.agree for d in drawings) / facts
    chance = confirmed * hold + (1 - confirmed) * (1 - hold)
    kappa = math.nan if {confirmed, hold} & {0.0, 1.0} else (agree - chance) / (1 - chance)
    return Agreement(confirmed, hold, agree, kappa, facts)


__all__ = [
    "COLLAPSED_SHARE",
    "MIN_ANSWERS",
    "Agreement",
    "Collapse",
    "GroupSpread",
    "ReadBack",
    "agreement",
    "answer_entropy",
    "balanced_accuracy",
    "best_of_n",
    "best_of_n_weights",
    "collapsed_forms",
    "group_spread",
    "pass_at_k",
    "recalls",
    "share_of",
]
