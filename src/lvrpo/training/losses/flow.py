"""Common parts of the losses on flows: member selection, and losses at fresh noise (forward process)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from pydantic import Field, model_validator

from lvrpo.algorithms import best_worst_mask, centered_advantages, flow_matching_loss, velocity_regularizer
from lvrpo.config import Config
from lvrpo.policies.base import FlowPolicy, require_method
from lvrpo.policies.flow import flow_segment
from lvrpo.sampling import derive_seed, normal_noise, shift_time, uniform_noise
from lvrpo.training.losses.base import (
    FrozenPolicy,
    GroupAdvantages,
    LossOutput,
    Member,
    Microbatch,
    Objective,
    kept_members,
)
from lvrpo.training.losses.tokens import LR_HINT
from lvrpo.types import Group, SegmentKind, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Float

TOKENS_ONLY_HINT = (
    "trains tokens, and a flow has none: set text.kind; tokens.kind or masked.kind for a policy that draws with tokens"
)


class FlowLossConfig(Config):
    """Options of all losses on flows."""

    hints: ClassVar[Mapping[str, str]] = {
        "lr": LR_HINT,
        **dict.fromkeys([f"kind={kind}" for kind in ("clip", "gspo", "cispo", "dapo", "dr_grpo")], TOKENS_ONLY_HINT),
        "kind=grpo": "is called flow_grpo",
        "keep": "is called {section}.top_bottom_k, or top_k with kind=best_of",
        "noise_draws": "is called {section}.timesteps_per_sample",
        "min_time": "is called {section}.t_min",
        "kind=grpo_guard": "is kind=flow_grpo with flow.ratio=guard",
    }
    weight: float = Field(default=1.0, ge=0)
    """Weight of this loss in the sum; 0 switches it off."""
    lr_scale: float = Field(default=1.0, gt=0, le=10)
    """Multiplier of the learning rates for flows; see ``text.lr_scale``."""


class ContrastConfig(FlowLossConfig):
    """Options of losses on the best and the worst images of a group."""

    top_bottom_k: int = Field(default=2, ge=1)
    """Number of best and number of worst members per group."""


class NoisingConfig(FlowLossConfig):
    """Options of losses at fresh noise."""

    timesteps_per_sample: int = Field(default=2, ge=1, le=1000)
    """Times per image, stratified over the sampler's grid."""
    t_min: float = Field(default=0.1, gt=0, lt=1)
    """Smallest time at which clean latents are noised."""


class FreshNoiseConfig(ContrastConfig, NoisingConfig):
    """Options of DiffusionNFT and AWM."""

    kl_coef: float = Field(default=2.0, ge=0)
    """Weight of the divergence from the reference, mean |v - v_ref|^2. DiffusionNFT is unstable without it: the
    prediction from pure noise drifts until every cell holds an object (docs/log.md)."""
    reference_guidance: float = Field(default=1.0, ge=1)
    """Guidance scale of the reference, which distills guidance into a single pass (CRD, arXiv:2603.14128); multiplies
    the guidance scale of the rollout."""
    unguided_kl_coef: float = Field(default=0.0, ge=0)
    """Weight of mean |v - v_ref|^2 without the text, which regularizes the unconditional branch of guidance."""
    advantage_max: float = Field(default=2.5, gt=0)
    """Advantages are clipped to this magnitude."""
    old_decay_rate: float = Field(default=0.05, ge=0)
    """The old policy's decay at step i is min(old_decay_rate i, old_decay_ceiling)."""
    old_decay_ceiling: float = Field(default=0.9, ge=0, lt=1)
    """Largest decay of the old policy."""

    @model_validator(mode="after")
    def _guidance_is_used(self) -> Self:
        if self.reference_guidance != 1 and not self.kl_coef:
            raise ValueError(f"reference_guidance={self.reference_guidance}: no effect with kl_coef=0: leave it out")
        return self


class FlowObjective(Objective):
    """Base of the objectives on flows."""

    kind: SegmentKind = "flow"

    def __init__(self, config: FlowLossConfig) -> None:
        self.config, self.weight = config, config.weight


class ContrastObjective(FlowObjective):
    """Trains on the best and the worst members of each group, with centered advantages."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__(config)
        self.top_bottom_k = config.top_bottom_k

    def select_members(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        keep = best_worst_mask(advantages.values, self.top_bottom_k, advantages.valid)
        return kept_members(groups, centered_advantages(advantages.values, keep), keep, "flow")


class FreshNoiseObjective(ContrastObjective):
    """Losses on fresh (x_t, t), relative to the old policy, with the guidance of the rollout."""

    samples_with = "old"
    purpose: ClassVar[str]
    """Part of the noise seed."""

    def __init__(self, config: FreshNoiseConfig) -> None:
        super().__init__(config)
        self.config = config

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        return ("old", "reference") if self.config.kl_coef or self.config.unguided_kl_coef else ("old",)

    def passes(self, trajectory: Trajectory) -> int:
        branches = 1 + (flow_segment(trajectory).guidance_scale != 1) + bool(self.config.unguided_kl_coef)
        return self.config.timesteps_per_sample * branches

    def reference_outputs(
        self, name: FrozenPolicy, policy: FlowPolicy, batch: Microbatch
    ) -> Float[torch.Tensor, "K B N C"]:
        """The velocity of the old policy; of the reference the guided and the unconditional one, if they are used."""
        noised, config = self._noised(policy, batch), self.config
        if name == "old":
            return noised.velocity(policy)[None]
        guided = [noised.velocity(policy, config.reference_guidance)] if config.kl_coef else []
        return torch.stack(guided + ([noised.unguided(policy)] if config.unguided_kl_coef else []))

    def _noised(self, policy: FlowPolicy, batch: Microbatch) -> Noised:
        seeds = [trajectory.seed for trajectory in batch.trajectories]
        return add_noise(policy, batch, self.config, self.purpose, seeds)

    def loss(self, policy: FlowPolicy, batch: Microbatch) -> LossOutput:
        config, noised = self.config, self._noised(policy, batch)
        v, v_old = noised.velocity(policy), batch.frozen["old"][0]
        loss, metrics = self._policy_loss(noised, v, v_old, batch)
        metrics[f"loss/flow/{batch.task}"] = loss.mean()
        metrics["distance/old"] = velocity_regularizer(v.detach(), v_old).mean()
        if config.kl_coef:
            divergence = velocity_regularizer(v, batch.frozen["reference"][0])
            metrics[f"kl/flow/{batch.task}"] = divergence.mean()
            loss = loss + config.kl_coef * divergence
        if config.unguided_kl_coef:
            divergence = velocity_regularizer(noised.unguided(policy), batch.frozen["reference"][-1])
            metrics[f"kl/flow_unguided/{batch.task}"] = divergence.mean()
            loss = loss + config.unguided_kl_coef * divergence
        return LossOutput(loss.mean(), metrics)

    @abstractmethod
    def _policy_loss(
        self, noised: Noised, v: Float[torch.Tensor, "B N C"], v_old: Float[torch.Tensor, "B N C"], batch: Microbatch
    ) -> tuple[Float[torch.Tensor, " B"], dict[str, torch.Tensor]]:
        """The policy term per image and time, and its metrics."""


@dataclass(frozen=True)
class Noised:
    """Noised images: B rows, ``timesteps_per_sample`` consecutive ones per image."""

    trajectories: Sequence[Trajectory]
    x_0: Float[torch.Tensor, "B N C"]
    noise: Float[torch.Tensor, "B N C"]
    t: Float[torch.Tensor, " B"]
    x_t: Float[torch.Tensor, "B N C"]

    def velocity(self, policy: FlowPolicy, guidance: float = 1.0) -> Float[torch.Tensor, "B N C"]:
        """The velocity with the guidance scale of the rollout times ``guidance``."""
        scale = flow_segment(self.trajectories[0]).guidance_scale * guidance
        return require_method(policy, "velocity").velocity(self.trajectories, self.x_t, self.t, scale)

    def unguided(self, policy: FlowPolicy) -> Float[torch.Tensor, "B N C"]:
        """The velocity without the text."""
        return require_method(policy, "velocity").velocity(self.trajectories, self.x_t, self.t, 0.0)

    def flow_loss(self, v: Float[torch.Tensor, "B N C"]) -> Float[torch.Tensor, " B"]:
        """The flow-matching loss of these velocities."""
        return flow_matching_loss(v, self.x_0, self.noise)


def add_noise(
    policy: FlowPolicy, batch: Microbatch, config: NoisingConfig, purpose: str, seeds: Sequence[int]
) -> Noised:
    """x_t of the batch's images at stratified random times.

    Noise and times are functions of seed, purpose and step; equal seeds share them.
    """
    draws = config.timesteps_per_sample
    repeated = [trajectory for trajectory in batch.trajectories for _ in range(draws)]
    x_0 = torch.stack([flow_segment(trajectory).latent for trajectory in repeated])
    each = [derive_seed(seed, purpose, batch.step, k) for seed in seeds for k in range(draws)]
    noise = normal_noise(each, x_0.shape[1:]).to(x_0)
    stratum = torch.arange(draws).repeat(len(seeds))
    u = (stratum + uniform_noise(each, (1,))[:, 0]) / draws
    t = shift_time(u, require_method(policy, "timestep_shift").timestep_shift()).clamp(min=config.t_min).to(x_0)
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    return Noised(repeated, x_0, noise, t, x_t)
