"""Training drawings: DiffusionNFT on fresh noise, or the clipped objective on recorded stochastic steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import (
    best_worst_mask,
    centered_advantages,
    clipped_surrogate,
    nft_loss,
    reward_probability,
    velocity_regularizer,
)
from lvrpo.config import Config
from lvrpo.sampling import STEPS, derive_seed, normal_noise, shift_time, step_weights, uniform_noise
from lvrpo.training.objective import Batch, Member, Objective, flow_segment
from lvrpo.types import FlowSegment, Group, OutputKind

if TYPE_CHECKING:
    from jaxtyping import Float


class FlowConfig(Config):
    """How drawn segments are trained."""

    kind: Literal["nft", "grpo"] = "nft"
    """nft: DiffusionNFT on fresh noise (arXiv:2509.16117); grpo: the clipped objective on recorded stochastic steps."""
    weight: float = Field(default=1.0, ge=0)
    kl_coef: float = Field(default=2.0, ge=0)
    """Of mean |v - v_ref|^2. Without it nothing holds DiffusionNFT: the contrast of good and bad drawings moves the
    prediction from pure noise without end, until every cell holds an object (docs/log.md)."""
    keep: int = Field(default=2, ge=1)
    """The best and the worst ``keep`` members of each group are trained."""
    beta: float = Field(default=0.5, gt=0)
    advantage_max: float = Field(default=2.5, gt=0)
    """nft: larger advantages count as this; clipping unbalances a group, so it is rarely reached."""
    noise_draws: int = Field(default=2, ge=1)
    """nft: times per picture, one in each equal part of the sampler's grid."""
    min_time: float = Field(default=0.1, gt=0, lt=1)
    old_decay_rate: float = Field(default=0.05, ge=0)
    old_decay_ceiling: float = Field(default=0.9, ge=0, lt=1)
    clip_low: float = Field(default=1e-3, gt=0)
    clip_high: float = Field(default=1e-3, gt=0)
    """grpo: bounds of the ratio of one step, in the units of ``rollout.logprob_reduction``."""
    step_weighting: Literal["level", "equal"] = "level"
    """grpo: level gives every step a gradient of one scale; with equal, the last drowns the first."""


class FlowObjective(Objective):
    """What the two have in common: the best and the worst drawings of each group, with centered advantages."""

    kind: ClassVar[OutputKind] = "image"

    def __init__(self, config: FlowConfig) -> None:
        self.config = config
        self.weight = config.weight

    def choose(self, groups: Sequence[Group], A: Float[torch.Tensor, "P G"]) -> list[Member]:
        keep = best_worst_mask(A, self.config.keep)
        A = centered_advantages(A, keep)
        return [
            Member(group.trajectories[g], float(A[p, g]))
            for p, group in enumerate(groups)
            if "image" in group.prompt.output
            for g in keep[p].nonzero()[:, 0].tolist()
        ]


class NFT(FlowObjective):
    """DiffusionNFT on fresh (x_t, t): the noise is a function of the trajectory's seed and the step."""

    samples_with = "old"

    def loss(self, batch: Batch) -> torch.Tensor:
        config, policies, draws = self.config, batch.policies, self.config.noise_draws
        repeated = [trajectory for trajectory in batch.trajectories for _ in range(draws)]
        x_0 = torch.stack([flow_segment(trajectory).latent for trajectory in repeated])
        seeds = [derive_seed(t.seed, "nft", batch.step, k) for t in batch.trajectories for k in range(draws)]
        noise = normal_noise(seeds, x_0.shape[1:]).to(x_0)
        stratum = torch.arange(draws).repeat(len(batch.members))
        u = (stratum + uniform_noise(seeds, (1,))[:, 0]) / draws
        t = shift_time(u, policies.live.timestep_shift()).clamp(min=config.min_time).to(x_0)
        x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
        v = policies.live.velocity(repeated, x_t, t)
        with torch.no_grad():
            v_old = policies.old.velocity(repeated, x_t, t)
            v_ref = policies.reference.velocity(repeated, x_t, t) if config.kl_coef else None
        q = reward_probability(batch.advantages(), config.advantage_max).repeat_interleave(draws).to(x_0)
        kl_coef, advantage_max = config.kl_coef, config.advantage_max
        result = nft_loss(
            v, v_old, v_ref, x_t, t, x_0, q, beta=config.beta, kl_coef=kl_coef, advantage_max=advantage_max
        )
        batch.log(f"loss/flow/{batch.task}", result.policy.mean())
        batch.log(f"kl/flow/{batch.task}", result.velocity_kl.mean())
        batch.log("distance/old", result.distance_to_old.mean())
        return result.loss.mean()


class FlowGRPO(FlowObjective):
    """The clipped objective on the recorded steps, weighted so that all pull alike, plus the velocity regulariser."""

    def loss(self, batch: Batch) -> torch.Tensor:
        config = self.config
        segments = [flow_segment(trajectory) for trajectory in batch.trajectories]
        replayed = batch.policies.live.logprobs(batch.trajectories)
        logprobs = torch.stack([scored[-1].logprobs for scored in replayed])
        behavior = torch.stack([segment.behavior_logprobs for segment in segments]).to(logprobs)
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        advantage = batch.advantages()[:, None].to(logprobs)
        surrogate = clipped_surrogate(
            logprobs, behavior, advantage, mask, clip_low=config.clip_low, clip_high=config.clip_high
        )
        weights = level_weights(segments[0]) if config.step_weighting == "level" else torch.ones(logprobs.shape[1])
        loss = (surrogate.loss_terms * weights.to(logprobs)).mean()
        batch.log(f"loss/flow/{batch.task}", loss)
        batch.log("ratio/flow", surrogate.ratio.mean())
        batch.log("clip_fraction/flow", surrogate.clipped.float().mean())
        if config.kl_coef:
            divergence = torch.stack([velocity_kl(batch, segments, w) for w in range(logprobs.shape[1])]).mean()
            batch.log(f"kl/flow/{batch.task}", divergence)
            loss = loss + config.kl_coef * divergence
        return loss


FLOW_OBJECTIVES: Mapping[str, type[FlowObjective]] = {"nft": NFT, "grpo": FlowGRPO}


def velocity_kl(batch: Batch, segments: Sequence[FlowSegment], w: int) -> torch.Tensor:
    """mean |v - v_ref|^2 at the recorded states before trained step ``w``."""
    x_t = torch.stack([segment.states[w] for segment in segments])
    t = segments[0].timesteps[segments[0].trained_steps[w]].expand(len(x_t))
    v = batch.policies.live.velocity(batch.trajectories, x_t, t)
    with torch.no_grad():
        v_ref = batch.policies.reference.velocity(batch.trajectories, x_t, t)
    return velocity_regularizer(v, v_ref).mean()


def level_weights(segment: FlowSegment) -> Float[torch.Tensor, " W"]:
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
