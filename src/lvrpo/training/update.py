"""One joint update: text and drawing segments of all tasks, one optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from lvrpo.algorithms import (
    best_worst_mask,
    centered_advantages,
    clipped_surrogate,
    gdpo_advantages,
    group_relative_advantages,
    k3,
    nft_loss,
    reduce_tokens,
    reward_probability,
    velocity_regularizer,
)
from lvrpo.policies.base import Policy
from lvrpo.sampling import STEPS, derive_seed, normal_noise, shift_time, step_weights, uniform_noise
from lvrpo.training.config import AdvantageConfig, FlowConfig, TextConfig, TrainConfig
from lvrpo.types import TASKS, FlowSegment, Group, RewardTable, Task, TextSegment, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

MICRO_BATCH = 192
"""Trajectories replayed at once."""


@dataclass(frozen=True)
class Policies:
    """The four sets of weights of a run."""

    live: Policy
    """Trained; samples text."""
    old: Policy
    """A short moving average of live: samples drawings and anchors DiffusionNFT."""
    reference: Policy
    """Where the run began: the frozen judge, the anchor of every divergence, and the control."""
    average: Policy
    """A longer moving average of live: evaluated and saved."""


@dataclass
class Metrics:
    """Sums and counts under names such as "loss/text"."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: torch.Tensor | float, count: float = 1.0) -> None:
        """Adds a mean over ``count`` items."""
        number = float(value.detach()) if isinstance(value, torch.Tensor) else float(value)
        self.sums[name] = self.sums.get(name, 0.0) + number * count
        self.counts[name] = self.counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        """The weighted means."""
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


def compute_advantages(table: RewardTable, config: AdvantageConfig) -> Float[torch.Tensor, "P G"]:
    """Advantages of a step, (P, G); 0 in groups without signal. Rewards of weight 0 have no part in them."""
    table = table.trained()
    if config.kind == "gdpo":
        tasks = torch.tensor([TASKS.index(task) for task in table.tasks])
        return gdpo_advantages(
            table.scores, table.mask, table.weights, tasks, std_floor=config.std_floor, clamp=config.clamp
        )
    weighted = torch.where(table.mask, table.scores * table.weights, 0.0).sum(dim=2)
    advantages = group_relative_advantages(weighted, whole_scores(table), std_floor=config.std_floor)
    return advantages.clamp(-config.clamp, config.clamp)


def whole_scores(table: RewardTable) -> Bool[torch.Tensor, "P G"]:
    """Members with a score from every reward that applies to their group: a sum with a failed term is no number."""
    applies = table.mask.any(dim=1, keepdim=True)
    return (table.mask | ~applies).all(dim=2) & table.mask.any(dim=2)


def update(
    policies: Policies,
    groups: Sequence[Group],
    advantages: Float[torch.Tensor, "P G"],
    config: TrainConfig,
    step: int,
) -> Metrics:
    """Accumulates the gradients of all segments of all tasks; the caller steps the optimizers."""
    metrics = Metrics()
    for task in TASKS:
        chosen = [p for p, group in enumerate(groups) if group.prompt.task == task]
        weight = config.task_weights.get(task, 1.0)
        if not chosen or weight == 0:
            continue
        task_groups = [groups[p] for p in chosen]
        A = advantages[chosen]
        metrics.add(f"signal/{task}", (A != 0).any(dim=1).float().mean())
        if config.text.weight:
            _text_update(policies, task, task_groups, A, config.text, weight * config.text.weight, metrics)
        if config.flow.weight:
            _flow_update(policies, task, task_groups, A, config, weight * config.flow.weight, step, metrics)
    return metrics


def _text_update(
    policies: Policies,
    task: Task,
    groups: Sequence[Group],
    A: Float[torch.Tensor, "P G"],
    config: TextConfig,
    weight: float,
    metrics: Metrics,
) -> None:
    """Clipped surrogate and k3 divergence over the text segments of one task."""
    chosen = [
        (trajectory, float(A[p, g]))
        for p, group in enumerate(groups)
        if bool((A[p] != 0).any())
        for g, trajectory in enumerate(group.trajectories)
        if any(isinstance(segment, TextSegment) for segment in trajectory.segments)
    ]
    for start in range(0, len(chosen), 8 * MICRO_BATCH):
        part = chosen[start : start + 8 * MICRO_BATCH]
        share = _weight(part, config.reduction) / _weight(chosen, config.reduction)
        trajectories = [trajectory for trajectory, _ in part]
        logprobs, behavior, mask, entropy = _token_grid(policies.live, trajectories)
        advantage = torch.tensor([a for _, a in part], device=logprobs.device)[:, None]
        surrogate = clipped_surrogate(
            logprobs, behavior, advantage, mask, clip_low=config.clip_low, clip_high=config.clip_high
        )
        loss = reduce_tokens(surrogate.loss_terms, mask, config.reduction)
        metrics.add(f"loss/text/{task}", loss, share)
        metrics.add("ratio/text", surrogate.ratio[mask].mean(), share)
        metrics.add("clip_fraction/text", surrogate.clipped[mask].float().mean(), share)
        metrics.add(f"entropy/{task}", entropy[mask].mean(), share)
        if config.kl_coef:
            with torch.no_grad():
                ref_logprobs, _, _, _ = _token_grid(policies.reference, trajectories)
            divergence = reduce_tokens(k3(logprobs, ref_logprobs), mask, config.reduction)
            metrics.add(f"kl/text/{task}", divergence, share)
            loss = loss + config.kl_coef * divergence
        if config.entropy_coef:
            loss = loss - config.entropy_coef * reduce_tokens(entropy, mask, config.reduction)
        (weight * share * loss).backward()


def _weight(chosen: Sequence[tuple[Trajectory, float]], reduction: str) -> int:
    """What a part of the batch counts in the reduction: its tokens or its trajectories."""
    if reduction == "trajectory":
        return len(chosen)
    return sum(len(s.tokens) for trajectory, _ in chosen for s in trajectory.segments if isinstance(s, TextSegment))


def _token_grid(
    policy: Policy, trajectories: Sequence[Trajectory]
) -> tuple[
    Float[torch.Tensor, "B L"], Float[torch.Tensor, "B L"], Bool[torch.Tensor, "B L"], Float[torch.Tensor, "B L"]
]:
    """Log-probs now, log-probs at sampling, mask and entropies of all text tokens, padded to (B, L)."""
    now, behavior, entropies = [], [], []
    for trajectory, replayed in zip(trajectories, policy.logprobs(trajectories), strict=True):
        texts = [
            (segment, scored)
            for segment, scored in zip(trajectory.segments, replayed, strict=True)
            if isinstance(segment, TextSegment)
        ]
        now.append(torch.cat([scored.logprobs for _, scored in texts]))
        behavior.append(torch.cat([segment.behavior_logprobs for segment, _ in texts]).to(now[-1].device))
        entropies.append(torch.cat([scored.entropy for _, scored in texts if scored.entropy is not None]))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(row), dtype=torch.bool, device=row.device) for row in now], batch_first=True)
    return pad(now, batch_first=True), pad(behavior, batch_first=True), mask, pad(entropies, batch_first=True)


def _flow_update(
    policies: Policies,
    task: Task,
    groups: Sequence[Group],
    A: Float[torch.Tensor, "P G"],
    config: TrainConfig,
    weight: float,
    step: int,
    metrics: Metrics,
) -> None:
    """DiffusionNFT or the clipped objective over the best and worst drawings of one task."""
    keep = best_worst_mask(A, config.flow.keep)
    A = centered_advantages(A, keep)
    chosen = [
        (group.trajectories[g], float(A[p, g]))
        for p, group in enumerate(groups)
        if "image" in group.prompt.output
        for g in keep[p].nonzero()[:, 0].tolist()
    ]
    for start in range(0, len(chosen), MICRO_BATCH):
        part = chosen[start : start + MICRO_BATCH]
        trajectories = [trajectory for trajectory, _ in part]
        advantage = torch.tensor([a for _, a in part])
        share = len(part) / len(chosen)
        if config.flow.kind == "nft":
            loss = _nft(policies, task, trajectories, advantage, config.flow, step, share, metrics)
        else:
            loss = _flow_grpo(policies, task, trajectories, advantage, config.flow, share, metrics)
        (weight * share * loss).backward()


def _nft(
    policies: Policies,
    task: Task,
    trajectories: Sequence[Trajectory],
    advantage: Float[torch.Tensor, " B"],
    config: FlowConfig,
    step: int,
    share: float,
    metrics: Metrics,
) -> torch.Tensor:
    """DiffusionNFT on fresh (x_t, t): the noise is a function of the trajectory's seed and the step."""
    draws = config.noise_draws
    repeated = [trajectory for trajectory in trajectories for _ in range(draws)]
    x_0 = torch.stack([_flow_segment(trajectory).latent for trajectory in repeated])
    seeds = [derive_seed(t.seed, "nft", step, k) for t in trajectories for k in range(draws)]
    noise = normal_noise(seeds, x_0.shape[1:]).to(x_0)
    stratum = torch.arange(draws).repeat(len(trajectories))
    u = (stratum + uniform_noise(seeds, (1,))[:, 0]) / draws
    t = shift_time(u, policies.live.timestep_shift()).clamp(min=config.min_time).to(x_0)
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    v = policies.live.velocity(repeated, x_t, t)
    with torch.no_grad():
        v_old = policies.old.velocity(repeated, x_t, t)
        v_ref = policies.reference.velocity(repeated, x_t, t) if config.kl_coef else None
    q = reward_probability(advantage, config.advantage_max).repeat_interleave(draws).to(x_0)
    result = nft_loss(
        v, v_old, v_ref, x_t, t, x_0, q, beta=config.beta, kl_coef=config.kl_coef, advantage_max=config.advantage_max
    )
    metrics.add(f"loss/flow/{task}", result.policy.mean(), share)
    metrics.add(f"kl/flow/{task}", result.velocity_kl.mean(), share)
    metrics.add("distance/old", result.distance_to_old.mean(), share)
    return result.loss.mean()


def _flow_grpo(
    policies: Policies,
    task: Task,
    trajectories: Sequence[Trajectory],
    advantage: Float[torch.Tensor, " B"],
    config: FlowConfig,
    share: float,
    metrics: Metrics,
) -> torch.Tensor:
    """The clipped objective on the recorded steps, weighted so that all pull alike, plus the velocity regulariser."""
    segments = [_flow_segment(trajectory) for trajectory in trajectories]
    replayed = policies.live.logprobs(trajectories)
    logprobs = torch.stack([scored[-1].logprobs for scored in replayed])
    behavior = torch.stack([segment.behavior_logprobs for segment in segments]).to(logprobs)
    mask = torch.ones_like(logprobs, dtype=torch.bool)
    surrogate = clipped_surrogate(
        logprobs, behavior, advantage[:, None].to(logprobs), mask, clip_low=config.clip_low, clip_high=config.clip_high
    )
    weights = _level_weights(segments[0]) if config.step_weighting == "level" else torch.ones(logprobs.shape[1])
    loss = (surrogate.loss_terms * weights.to(logprobs)).mean()
    metrics.add(f"loss/flow/{task}", loss, share)
    metrics.add("ratio/flow", surrogate.ratio.mean(), share)
    metrics.add("clip_fraction/flow", surrogate.clipped.float().mean(), share)
    if config.kl_coef:
        divergence = torch.stack(
            [_velocity_kl(policies, trajectories, segments, w) for w in range(logprobs.shape[1])]
        ).mean()
        metrics.add(f"kl/flow/{task}", divergence, share)
        loss = loss + config.kl_coef * divergence
    return loss


def _velocity_kl(
    policies: Policies, trajectories: Sequence[Trajectory], segments: Sequence[FlowSegment], w: int
) -> torch.Tensor:
    x_t = torch.stack([segment.states[w] for segment in segments])
    t = segments[0].timesteps[segments[0].trained_steps[w]].expand(len(x_t))
    v = policies.live.velocity(trajectories, x_t, t)
    with torch.no_grad():
        v_ref = policies.reference.velocity(trajectories, x_t, t)
    return velocity_regularizer(v, v_ref).mean()


def _level_weights(segment: FlowSegment) -> Float[torch.Tensor, " W"]:
    """``step_weights`` of the trained steps; they depend on the times and the noise level alone."""
    zero = torch.zeros(1, 1, 1)
    steps = [
        STEPS[segment.sampler](zero, zero, segment.timesteps[i], segment.timesteps[i + 1], segment.noise_level)
        for i in segment.trained_steps
    ]
    return step_weights(
        torch.stack([step.std.reshape(()) for step in steps]),
        torch.stack([step.mean_gain.reshape(()) for step in steps]),
    )


def _flow_segment(trajectory: Trajectory) -> FlowSegment:
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    return segment
