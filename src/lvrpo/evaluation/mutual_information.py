"""Mutual information between the hidden states of the two experts: an InfoNCE lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from lvrpo.data.scenes import ScenePrompts, ScenesConfig
from lvrpo.data.scenes.objects import DEFAULT_SIZE
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Policy
from lvrpo.statistics import Interval, mean_interval, paired_difference
from lvrpo.types import Image, Parts

Direction = Literal["see_and_plan", "name_and_form"]
"""see_and_plan: the understanding expert over the image, the generation expert about to draw from the text;
name_and_form: the understanding expert over the text, the generation expert over the noisy image."""
BATCH_SIZE = 64
NOISY_T = 0.3
"""Flow time t of the noisy image that the generation expert reads."""
MIN_BATCHES = 4
"""Minimum number of batches of held-out pairs, for an estimate of the spread."""


@runtime_checkable
class HasStates(Protocol):
    """A policy that returns the hidden states of its experts."""

    def context_states(self, contexts: Sequence[Parts]) -> Tensor:
        """Mean final state of the understanding expert over each context, float32 (B, D)."""
        ...

    def generation_states(self, contexts: Sequence[Parts], images: Sequence[Image], t: float, seed: int) -> Tensor:
        """Mean final state of the generation expert over each noisy image after its context, float32 (B, D)."""
        ...


@dataclass(frozen=True)
class Information:
    """A lower bound of a mutual information, nats."""

    bound: Interval
    """Mean over held-out pairs, pairs resampled (their negatives stay as they are)."""
    ceiling: float
    """log N, the largest value of this estimator."""
    values: tuple[float, ...]
    """Per held-out pair, in order, to compare two policies on the same pairs."""

    def gain(self, after: Information) -> Interval:
        """``after`` minus this, pair by pair."""
        return paired_difference(self.values, after.values)


def measure_information(
    policy: Policy,
    direction: Direction = "see_and_plan",
    pairs: int = 1024,
    negatives: int = 128,
    seed: int = 0,
) -> Information:
    """The bound for captions and images of the built-in world; the critic is fitted on train, applied to test scenes.

    The two experts read different modalities, so shared information is what the model has learned about text and
    image together. ``pairs``: held out; twice as many fit the critic. ``negatives``: N.

    Raises InputError for a policy without states, and for too few pairs.
    """
    if direction not in get_args(Direction):
        raise InputError(f"direction={direction}: unknown: use {', '.join(get_args(Direction))}")
    if not isinstance(policy, HasStates):
        raise InputError(f"{type(policy).__name__} gives no hidden states of its experts: use another policy")
    if negatives < 2 or pairs < MIN_BATCHES * negatives:
        raise InputError(
            f"pairs={pairs}, negatives={negatives}: needs negatives >= 2 and pairs >= {MIN_BATCHES} x negatives"
        )
    size = policy.image_size or DEFAULT_SIZE
    states = [
        _states(policy, *_scene_pairs(split, count, size, seed), direction, seed)
        for split, count in (("train", 2 * pairs), ("test", pairs))
    ]
    return infonce(*states[0], *states[1], negatives=negatives, seed=seed)


def _scene_pairs(split: Any, count: int, size: int, seed: int) -> tuple[list[str], list[Image]]:
    """Captions and images of the built-in world. Any: one of its splits."""
    source = ScenePrompts(ScenesConfig(size=size), split, seed)
    texts, images = [], []
    for i in range(count):
        example = source.example("generate", i)
        image = example.outputs[0]
        assert not isinstance(image, str)
        texts.append(str(example.prompt.parts[0]))
        images.append(image)
    return texts, images


def infonce(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, negatives: int = 128, seed: int = 0
) -> Information:
    """InfoNCE's lower bound of I(X; Y), with a critic f fitted on other pairs (arXiv:1807.03748, eq. 4 and 5).

        I(X; Y) >= log N + mean_i [ f(x_i, y_i) - log sum_j exp f(x_i, y_j) ],  j over the N pairs of a batch,

    the mean of this and of the same with x and y exchanged; both are bounds. The critic is a product of two small
    networks with a bias for each side; any critic gives a valid bound on pairs it was not fitted on, a better one a
    tighter one. It can never exceed log N.

    Shapes: (M, D) and (M, E) to fit, (n, D) and (n, E) to measure; the last n mod N pairs are left out.
    Raises: ContractError where shapes do not fit; InputError for fewer than ``MIN_BATCHES`` batches.
    Differs from the paper: the bound is taken in both directions, on held-out pairs.
    """
    if len(train_x) != len(train_y) or len(test_x) != len(test_y):
        raise ContractError(f"{len(train_x)} x and {len(train_y)} y to fit, {len(test_x)} and {len(test_y)} to measure")
    batches = len(test_x) // negatives
    if batches < MIN_BATCHES:
        raise InputError(f"{len(test_x)} pairs are {batches} batches of {negatives}: give at least {MIN_BATCHES}")
    scale_x, scale_y = (_normalizer(data) for data in (train_x, train_y))
    critic = _fit_critic(scale_x(train_x), scale_y(train_y), negatives, seed)
    measured = batches * negatives
    x, y = (scale(data[:measured]) for scale, data in ((scale_x, test_x), (scale_y, test_y)))
    with torch.no_grad():
        parts = zip(x.split(negatives), y.split(negatives), strict=True)
        values = torch.cat([_values(critic(*part)) for part in parts])
    found = values.double().tolist()
    return Information(mean_interval(found), math.log(negatives), tuple(found))


# --- inside ---


def _normalizer(data: Tensor) -> Callable[[Tensor], Tensor]:
    mean, deviation = data.mean(dim=0), data.std(dim=0)
    scale = torch.where(deviation > 1e-6, deviation, 1.0)
    return lambda values: (values - mean) / scale


class _Critic(nn.Module):
    """f(x, y) = g(x) . h(y) + a(x) + b(y), as (N, N) for all pairs of a batch."""

    def __init__(self, dim_x: int, dim_y: int, width: int = 128, shared: int = 32) -> None:
        super().__init__()
        self.x, self.y = (
            nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, shared + 1)) for dim in (dim_x, dim_y)
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        g, h = self.x(x), self.y(y)
        return g[:, :-1] @ h[:, :-1].T + g[:, -1:] + h[:, -1]


def _values(scores: Tensor) -> Tensor:
    """Per pair log N + log softmax of the right one, the mean of both directions; (N,)."""
    right = scores.diagonal()
    both = (scores.logsumexp(dim=1) + scores.logsumexp(dim=0)) / 2
    return math.log(len(scores)) + right - both


FIT_STEPS = 400
CHECK_EVERY = 25


def _fit_critic(x: Tensor, y: Tensor, negatives: int, seed: int) -> _Critic:
    """The critic with the best bound on an eighth of the pairs, which is held out from fitting."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        critic = _Critic(x.shape[1], y.shape[1])
    kept = max(negatives, len(x) // 8)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=2e-3, weight_decay=1e-2)
    best, weights = -math.inf, {k: v.clone() for k, v in critic.state_dict().items()}
    for step in range(1, FIT_STEPS + 1):
        rows = kept + torch.randperm(len(x) - kept, generator=generator)[:negatives]
        loss = -_values(critic(x[rows], y[rows])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % CHECK_EVERY == 0:
            with torch.no_grad():
                parts = zip(x[:kept].split(negatives), y[:kept].split(negatives), strict=True)
                found = [float(_values(critic(a, b)).mean()) for a, b in parts if len(a) == negatives]
            if sum(found) / len(found) > best:
                best = sum(found) / len(found)
                weights = {k: v.clone() for k, v in critic.state_dict().items()}
    critic.load_state_dict(weights)
    return critic


def _states(
    policy: HasStates, texts: Sequence[str], images: Sequence[Image], direction: Direction, seed: int
) -> tuple[Tensor, Tensor]:
    read, drawn = [], []
    for start in range(0, len(texts), BATCH_SIZE):
        captions, shown = texts[start : start + BATCH_SIZE], images[start : start + BATCH_SIZE]
        if direction == "see_and_plan":
            read.append(policy.context_states([(image,) for image in shown]))
            drawn.append(policy.generation_states([(text,) for text in captions], shown, 1.0, seed))
        else:
            read.append(policy.context_states([(text,) for text in captions]))
            drawn.append(policy.generation_states([() for _ in captions], shown, NOISY_T, seed))
    one, other = (functional.normalize(torch.cat(states).float().cpu(), dim=1) for states in (read, drawn))
    return one, other
