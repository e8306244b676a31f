"""Evaluation metrics that distinguish alignment from sharpening: pass@k, best-of-n, answer collapse, consistency.

Pure functions on recorded evaluations, so that tables can be recomputed without the model.
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
"""A form has collapsed if one answer is given to at least this share of its questions (entropy of at most .47 bits for
two answers). Balanced yes-no questions that are all answered correctly have a share of .5."""
FEW_ANSWERS = 20
"""Forms of question with more distinct right answers have no balanced accuracy."""
MIN_ANSWERS = 20
"""Minimum answers per form: with fewer the share of one answer has a standard error above .06."""


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that at least one of ``k`` samples is correct, estimated from n >= k samples.

        pass@k = 1 - C(n - c, k) / C(n, k),   n = ``num_samples`` >= k, c = ``num_right``

    (arXiv:2107.03374, eq. 1): unbiased, where 1 - (1 - c / n)^k is not. Range [0, 1].
    Raises ContractError unless 1 <= k <= n and 0 <= c <= n.
    Differs from the paper: no; integer binomials are exact, so no running product is needed.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ContractError(f"pass@{k} of {num_right} right among {num_samples}: needs 1 <= k <= n and 0 <= c <= n")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def best_of_n_weights(scores: Sequence[float], n: int) -> list[float]:
    """Probability of each sample to have the highest score in a random subset of ``n``.

        w_i = [C(L + m, n) - C(L, n)] / (m C(N, n)),   L samples with a lower score than i, m with an equal one (with i)

    of N samples; ties are broken uniformly. The weights sum to 1; n = 1 gives 1 / N each, n = N the top scores only.
    Raises ContractError unless 1 <= n <= N, and for a score that is not finite.
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
    """Expected success of the sample with the highest score among ``n``, over all subsets of the samples.

        best-of-n = sum_i w_i s_i,   w as in ``best_of_n_weights``

    Without replacement, so unbiased for n fresh samples. Range [0, 1] for successes in [0, 1].
    Raises ContractError as ``best_of_n_weights``, and unless there is one success per score.
    """
    if len(scores) != len(successes):
        raise ContractError(f"{len(scores)} scores of {len(successes)} samples: give one per sample")
    return float(sum(w * s for w, s in zip(best_of_n_weights(scores, n), successes, strict=True)))


def recalls(right: Sequence[str], successes: Sequence[float]) -> dict[str, float]:
    """Recall of each right answer: the share of its questions that are answered correctly, in order of appearance."""
    if len(right) != len(successes):
        raise ContractError(f"{len(right)} right answers and {len(successes)} successes: give one each")
    rows: dict[str, list[float]] = {}
    for answer, success in zip(right, successes, strict=True):
        rows.setdefault(answer, []).append(float(success))
    return {answer: sum(row) / len(row) for answer, row in rows.items()}


def balanced_accuracy(right: Sequence[str], successes: Sequence[float]) -> float:
    """Mean of the ``recalls``.

        (1 / |A|) sum_{a in A} mean { s_i : right_i = a }

    A constant answer scores 1 / |A|, however unbalanced the questions are.
    nan for no question. Raises ContractError unless there is one success per right answer.
    """
    found = recalls(right, successes)
    return sum(found.values()) / len(found) if found else math.nan


def answer_entropy(answers: Sequence[str]) -> float:
    """Entropy of the answers in bits, - sum_a p_a log2 p_a; nan for no answer.

    The plug-in estimate, biased by about -(K - 1) / (2 n ln 2) for K distinct answers of n: compare at equal n.
    """
    if not answers:
        return math.nan
    shares = [count / len(answers) for count in Counter(answers).values()]
    return abs(-sum(p * math.log2(p) for p in shares))


@dataclass(frozen=True)
class Collapse:
    """A form of question whose answers have collapsed to one."""

    form: str
    answer: str
    share: float
    """Share of the questions that get this answer now."""
    before: float
    """Share of the questions that got it before."""
    entropy: float
    """Entropy of the answers now, in bits."""
    entropy_before: float


def collapsed_forms(
    before: Mapping[str, Sequence[str]],
    after: Mapping[str, Sequence[str]],
    right: Mapping[str, Sequence[str]] | None = None,
    share: float = COLLAPSED_SHARE,
) -> list[Collapse]:
    """The forms in which one answer has at least ``share`` of the questions in ``after`` but not in ``before``.

    A change from one dominant answer to another is a collapse too.

    ``before``, ``after``: the model's answers by form of question; forms with fewer than ``MIN_ANSWERS`` in ``after``,
    or none in ``before``, are left out. ``right``: the right answers by form; a form whose right answers have that
    share is not a collapse. Raises ContractError unless .5 < share <= 1.
    """
    if not 0.5 < share <= 1:
        raise ContractError(f"share={share}: needs .5 < share <= 1")
    found = []
    for form, answers in after.items():
        earlier = before.get(form, ())
        if len(answers) < MIN_ANSWERS or not earlier:
            continue
        answer, count = Counter(answers).most_common(1)[0]
        share_now, share_before = count / len(answers), share_of(answer, earlier)
        share_right = share_of(answer, right[form]) if right is not None and form in right else 0.0
        if share_now >= share > max(share_before, share_right):
            entropies = answer_entropy(answers), answer_entropy(earlier)
            found.append(Collapse(form, answer, share_now, share_before, *entropies))
    return found


def share_of(answer: str, answers: Sequence[str]) -> float:
    """Share of the answers that are this one; nan for no answer."""
    return sum(each == answer for each in answers) / len(answers) if answers else math.nan


@dataclass(frozen=True)
class GroupSpread:
    """Variation of the samples of one prompt."""

    std: float
    """Mean over groups of the standard deviation of success."""
    signal: float
    """Share of the groups with signal: not all samples are equal, so group-relative advantages are not 0."""
    groups: int


def group_spread(groups: Sequence[Sequence[float]]) -> GroupSpread:
    """Mean population standard deviation inside the groups and the share of groups with signal; nan for no group.

    Groups of one sample are left out.
    """
    stds = [float(np.std(group)) for group in groups if len(group) > 1]
    if not stds:
        return GroupSpread(math.nan, math.nan, 0)
    return GroupSpread(sum(stds) / len(stds), sum(std > 0 for std in stds) / len(stds), len(stds))


@dataclass(frozen=True)
class ReadBack:
    """Counts of the facts of one image, checked by the model itself (reader) and by a verifier."""

    facts: int
    """Facts that the prompt states."""
    confirmed: int
    """Facts that the reader confirms."""
    hold: int
    """Facts that the verifier confirms."""
    agree: int
    """Facts on which reader and verifier agree."""


@dataclass(frozen=True)
class Agreement:
    """Self-consistency of a model: agreement of its reading with its own images and with a verifier."""

    confirmed: float
    """Share of the stated facts that the reader confirms."""
    hold: float
    """Share of the stated facts that the verifier confirms."""
    agree: float
    """Share on which reader and verifier agree."""
    kappa: float
    """Cohen's kappa of reader and verifier: 1 for full agreement, 0 for chance agreement; nan if either is constant."""
    facts: int


def agreement(drawings: Sequence[ReadBack]) -> Agreement:
    """Facts of all images pooled, with Cohen's kappa between reader and verifier:

        kappa = (p_o - p_e) / (1 - p_e),   p_o = share agreed on,   p_e = r v + (1 - r)(1 - v),

    r and v the shares that reader and verifier confirm (Cohen 1960). nan for no fact.
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
