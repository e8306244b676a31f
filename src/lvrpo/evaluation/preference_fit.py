"""Fits a preference head to pairs and measures it on prompts that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from lvrpo.algorithms import bradley_terry_loss
from lvrpo.data.preferences import Pair, PairCounts, Ties, leave_out, read_pairs, split_by_prompt
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.given import given_group
from lvrpo.rewards.identity import judge_identity
from lvrpo.rewards.preference_head import PreferenceHead, Reading, ReadsTexts, features_of
from lvrpo.statistics import Interval, mean_interval
from lvrpo.types import TASKS, Parts

PAIRS_AT_ONCE = 32
CALIBRATION_SHARE = 0.1
"""Of the prompts, where the head is calibrated."""
BINS = 10

T = TypeVar("T")


@dataclass(frozen=True)
class FitSettings:
    """How a head is fitted."""

    ties: Ties = "half"
    held_out: float = 0.2
    """Share of the prompts that it is measured on."""
    max_broken: float = 0.05
    """Share of the rows that may be unusable."""
    l2: float = 0.01
    """Weight of half the squared length of w; features have a deviation of 1."""
    limit: int | None = None
    """Only the first so many pairs."""
    calibrate: bool = False
    seed: int = 0
    """Of the split."""
    reading: Reading = field(default_factory=Reading)


@dataclass(frozen=True)
class PreferenceFit:
    """A head and what it is worth."""

    head: PreferenceHead
    counts: PairCounts
    accuracy: Interval
    """Share of the held-out pairs, ties left out, whose order it tells; prompts resampled."""
    train_accuracy: float
    log_loss: float
    """Of the held-out pairs, nats; log 2 = .693 for a head that knows nothing."""
    calibration_error: float
    """Mean distance of the stated probability from the share that came true, over ten bins of the held-out pairs."""
    prompts: tuple[int, int]
    """Trained on (calibration included) and held out."""


def fit_preference(
    judge: Policy,
    path: Path,
    settings: FitSettings = FitSettings(),  # frozen
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PreferenceFit:
    """Fits a Bradley-Terry head on the frozen ``judge``'s features of pairs, and measures it on held-out prompts.

    Raises InputError, one line, for unusable data: see ``read_pairs``; also where either side of the split has fewer
    than two prompts, or all pairs are ties.
    """
    if not isinstance(judge, ReadsTexts):
        raise InputError(f"{type(judge).__name__} gives no features of its reading side: use another policy")
    counts = PairCounts()
    features, shares, keys, tasks = _features(judge, path, settings, counts, progress)
    cut = (settings.held_out, CALIBRATION_SHARE) if settings.calibrate else (settings.held_out,)
    part = torch.tensor(split_by_prompt(keys, cut, settings.seed))
    train = part == len(cut)
    held_out = part == 0
    _check_split(keys, shares, train, held_out)
    head = _fitted(features[train], shares[train], settings, judge_identity(judge), tasks)
    if settings.calibrate and bool((part == 1).any()):
        head = replace(head, scale=_scale(_margins(head, features[part == 1]), shares[part == 1]))
    margin, share = _margins(head, features[held_out]), shares[held_out]
    held_keys = [key for key, held in zip(keys, held_out.tolist(), strict=True) if held]
    decided = share != 0.5
    right = _right(margin[decided], share[decided])
    clusters = [key for key, known in zip(held_keys, decided.tolist(), strict=True) if known]
    train_margin, train_share = _margins(head, features[train]), shares[train]
    known = train_share != 0.5
    fit = PreferenceFit(
        head,
        counts,
        mean_interval(right.tolist(), clusters),
        float(_right(train_margin[known], train_share[known]).mean()),
        float(bradley_terry_loss(margin, share).mean()),
        calibration_error(margin, share),
        (len(set(keys)) - len(set(held_keys)), len(set(held_keys))),
    )
    return replace(fit, head=replace(head, measured=_measured(fit, settings)))


def calibration_error(margin: Tensor, share: Tensor) -> float:
    """sum_b n_b / n |mean p_b - mean share_b| over ten bins of p = sigmoid(|margin|), from .5 to 1.

    Shapes: (B,), (B,). Range: [0, .5].
    """
    p = torch.sigmoid(margin.abs())
    won = torch.where(margin >= 0, share, 1 - share)
    place = ((p - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    total = 0.0
    for b in range(BINS):
        inside = place == b
        if inside.any():
            total += float(inside.sum()) / len(p) * abs(float(p[inside].mean() - won[inside].mean()))
    return total


# --- inside ---


def _features(
    judge: Policy, path: Path, settings: FitSettings, counts: PairCounts, progress: Callable[[int, int], None]
) -> tuple[Tensor, Tensor, list[str], set[str]]:
    """Features (N, 2, F), shares (N,), the keys of the prompts, and the tasks seen."""
    rows: list[Tensor] = []
    shares: list[float] = []
    keys: list[str] = []
    tasks: set[str] = set()
    pairs = read_pairs(path, counts, settings.ties, settings.max_broken, judge.image_size)
    for batch in _batched(islice(pairs, settings.limit), PAIRS_AT_ONCE):
        for pair, found in zip(batch, _of_batch(judge, batch, settings, counts), strict=True):
            if found is not None:
                rows.append(found)
                shares.append(pair.share)
                keys.append(pair.key)
                tasks.add(pair.prompt.task)
        progress(counts.rows, counts.total)
    if not rows:
        raise InputError(f"{path}: no pair is left of {counts.rows} rows: give pairs with a preference")
    return torch.stack(rows), torch.tensor(shares), keys, tasks


def _of_batch(judge: Policy, batch: Sequence[Pair], settings: FitSettings, counts: PairCounts) -> list[Tensor | None]:
    """Features (2, F) of each pair; None where the policy cannot read the pair, which is then counted."""
    cases = [case for pair in batch for case in _cases(pair, settings.reading)]
    try:
        return list(features_of(judge, cases).unflatten(0, (len(batch), 2)))
    except InputError as error:
        if len(batch) > 1:
            return [found for pair in batch for found in _of_batch(judge, [pair], settings, counts)]
        counts.pairs -= 1
        counts.ties -= batch[0].share == 0.5
        leave_out(counts, f"{batch[0].where}: {error}", settings.max_broken)
        return [None]


def _cases(pair: Pair, reading: Reading) -> list[tuple[Parts, str]]:
    found = [reading.case(t) for t in given_group(pair.prompt, [(output,) for output in pair.outputs]).trajectories]
    return [case for case in found if not isinstance(case, str)]  # what is read is neither empty nor missing


def _batched(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch


def _check_split(keys: Sequence[str], shares: Tensor, train: Tensor, held_out: Tensor) -> None:
    for name, rows in (("trained on", train), ("held out", held_out)):
        rows = rows & (shares != 0.5)
        prompts = {key for key, chosen in zip(keys, rows.tolist(), strict=True) if chosen}
        if len(prompts) < 2:
            raise InputError(
                f"{len(prompts)} prompts with a preference are {name}, of {len(set(keys))} prompts in all: give more "
                "prompts, or another --held-out"
            )


def _fitted(features: Tensor, shares: Tensor, settings: FitSettings, policy: str, tasks: set[str]) -> PreferenceHead:
    """The head that minimises the mean loss + l2 / 2 |w|^2: a convex problem, solved by L-BFGS in float64."""
    flat = features.double().flatten(0, 1)
    mean, deviation = flat.mean(dim=0), flat.std(dim=0)
    deviation = torch.where(deviation > 1e-6, deviation, 1.0)
    difference = (features[:, 0].double() - features[:, 1].double()) / deviation
    weight = torch.zeros(flat.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=500, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry_loss(difference @ weight, shares.double()).mean()
        loss = loss + settings.l2 / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]  # L-BFGS calls it for tensors
    return PreferenceHead(
        policy,
        weight.detach().float(),
        mean.float(),
        deviation.float(),
        tuple(task for task in TASKS if task in tasks),
        reading=settings.reading,
    )


def _margins(head: PreferenceHead, features: Tensor) -> Tensor:
    return head.score(features[:, 0]) - head.score(features[:, 1])


def _scale(margin: Tensor, share: Tensor) -> float:
    """The factor on the margins that predicts best, between 1/20 and 20."""

    def loss(log_scale: float) -> float:
        return float(bradley_terry_loss(margin * math.exp(log_scale), share).mean())

    found: Any = minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded")  # Any: scipy's result has no types
    return math.exp(float(found.x))


def _right(margin: Tensor, share: Tensor) -> Tensor:
    """1 where the order is told, 1/2 where both scores are equal."""
    return torch.where(margin == 0, 0.5, ((margin > 0) == (share > 0.5)).float())


def _measured(fit: PreferenceFit, settings: FitSettings) -> dict[str, object]:
    counts = fit.counts
    return {
        "held_out_accuracy": fit.accuracy.as_dict(),
        "train_accuracy": fit.train_accuracy,
        "log_loss": fit.log_loss,
        "calibration_error": fit.calibration_error,
        "prompts": {"trained": fit.prompts[0], "held_out": fit.prompts[1]},
        "rows": counts.rows,
        "pairs": counts.pairs,
        "ties": {"count": counts.ties, "handling": settings.ties},
        "unlabelled": counts.unlabelled,
        "broken": len(counts.broken),
        "l2": settings.l2,
        "seed": settings.seed,
        "calibrated": settings.calibrate,
    }


def readme(fit: PreferenceFit, model: str, data: str) -> str:
    """The model card of a head."""
    accuracy, counts = fit.accuracy, fit.counts
    return f"""---
library_name: lvrpo
tags: [reward-model, preference]
---
# Preference head

A Bradley-Terry head on the frozen reading side of `{fit.head.policy}` (class and hash of the weights of `{model}`). It
is of use with these weights only, and refuses others.

| measured | |
|---|---|
| held-out accuracy [95 %] | {accuracy.score:.3f} [{accuracy.low:.3f}, {accuracy.high:.3f}], {accuracy.n} pairs of \
{fit.prompts[1]} prompts that it was not fitted on |
| accuracy on what it was fitted on | {fit.train_accuracy:.3f}, {fit.prompts[0]} prompts |
| log loss (.693: knows nothing) | {fit.log_loss:.3f} |
| calibration error | {fit.calibration_error:.3f} |
| data | {data}: {counts.rows} rows, {counts.pairs} pairs, {counts.ties} ties, {counts.unlabelled} without a label, \
{len(counts.broken)} unusable |
| tasks | {", ".join(fit.head.tasks)} |

```yaml
rewards:
  - name: learned_preference
    options: {{head: THIS_FOLDER}}
```
"""
