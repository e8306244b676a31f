"""The clipped objective on recorded stochastic steps: Flow-GRPO (arXiv:2505.05470), MixGRPO (arXiv:2507.21802),
DanceGRPO (arXiv:2505.07818)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import (
    SurrogateLoss,
    clipped_surrogate,
    gaussian_kl,
    guard_surrogate,
    scaled_clip,
    velocity_regularizer,
)
from lvrpo.policies.base import FlowPolicy, require_method
from lvrpo.policies.flow import ReplayedFlow, flow_segment
from lvrpo.sampling import STEPS, step_weights
from lvrpo.training.losses.base import FrozenPolicy, LossOutput, Microbatch, recorded_passes
from lvrpo.training.losses.flow import ContrastConfig, ContrastObjective
from lvrpo.types import FlowSegment, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Float


class RecordedStepsConfig(ContrastConfig):
    """Options of Flow-GRPO, MixGRPO and DanceGRPO."""

    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the divergence from the reference."""
    kl: Literal["velocity", "gaussian"] = "velocity"
    """velocity: mean |v - v_ref|^2, unguided; gaussian: the exact KL of the recorded steps, reduced as by
    ``rollout.logprob_reduction``."""
    clip_low: float = Field(default=1e-4, gt=0, lt=1)
    """The ratio of a step is clipped below 1 - clip_low."""
    clip_high: float = Field(default=1e-4, gt=0)
    """Clip bounds of the ratio of one step for ``rollout.logprob_reduction``=mean; converted for sum."""
    ratio: Literal["plain", "guard"] = "plain"
    """guard: centered log-ratio with equal scale at all steps (GRPO-Guard, arXiv:2510.22319)."""
    step_weighting: Literal["level", "equal"] = "equal"
    """level: weights that give all steps the same gradient scale; equal: the last step dominates."""


class FlowGRPOConfig(RecordedStepsConfig):
    """Flow-GRPO, with the exact KL of its steps."""

    kind: Literal["flow_grpo"] = "flow_grpo"
    kl_coef: float = Field(default=0.004, ge=0)
    """.04 in the paper's code, whose variance lacks the factor -dt (about 1/10)."""
    kl: Literal["velocity", "gaussian"] = "gaussian"


class MixGRPOConfig(RecordedStepsConfig):
    """MixGRPO or DanceGRPO, which differ in their rollouts; without a KL term."""

    kind: Literal["mix_grpo", "dance_grpo"] = "mix_grpo"


class FlowGRPO(ContrastObjective):
    """The clipped objective on the recorded stochastic steps, plus a KL term."""

    config: RecordedStepsConfig

    def passes(self, trajectory: Trajectory) -> int:
        steps = len(flow_segment(trajectory).trained_steps)
        return recorded_passes(trajectory) + (steps if self.config.kl_coef and self.config.kl == "velocity" else 0)

    @property
    def frozen_policies(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",) if self.config.kl_coef else ()

    def reference_outputs(
        self, name: FrozenPolicy, policy: FlowPolicy, batch: Microbatch
    ) -> Float[torch.Tensor, "B W N C"]:
        """Velocities at the recorded x_t of the trained steps (kl=velocity), or means of the steps (kl=gaussian)."""
        if self.config.kl == "gaussian":
            return replay(policy, batch.trajectories).means
        steps = range(len(flow_segment(batch.trajectories[0]).trained_steps))
        return torch.stack([recorded_velocity(policy, batch.trajectories, w) for w in steps], dim=1)

    def loss(self, policy: FlowPolicy, batch: Microbatch) -> LossOutput:
        config = self.config
        segments = [flow_segment(trajectory) for trajectory in batch.trajectories]
        replayed = replay(policy, batch.trajectories)
        surrogate = self._surrogate(batch, segments, replayed)
        terms = surrogate.loss_terms
        if config.step_weighting == "level":
            terms = terms * level_weights(segments[0], self.config.ratio).to(terms)
        loss = terms.mean()
        metrics = {
            f"loss/flow/{batch.task}": loss,
            "ratio/flow": surrogate.ratio.mean(),
            "clip_fraction/flow": surrogate.clipped.float().mean(),
        }
        if config.kl_coef:
            divergence = self._divergence(policy, batch, replayed)
            metrics[f"kl/flow/{batch.task}"] = divergence
            loss = loss + config.kl_coef * divergence
        return LossOutput(loss, metrics)

    def _surrogate(self, batch: Microbatch, segments: Sequence[FlowSegment], replayed: ReplayedFlow) -> SurrogateLoss:
        logprobs, reduction = replayed.logprobs, segments[0].logprob_reduction
        behavior = torch.stack([segment.behavior_logprobs for segment in segments]).to(logprobs)
        advantage = batch.advantages()[:, None].to(logprobs)
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        clip = scaled_clip(self.config.clip_low, self.config.clip_high, segments[0].latent.numel(), reduction)
        bounds = {"clip_low": clip.low, "clip_high": clip.high}
        if self.config.ratio == "plain":
            return clipped_surrogate(logprobs, behavior, advantage, mask, **bounds)
        recorded = [segment.means for segment in segments if segment.means is not None]
        assert len(recorded) == len(segments)
        behavior_means = torch.stack(recorded).to(logprobs)
        drift = step_kl(replayed.means, behavior_means, replayed.stds, reduction)
        return guard_surrogate(logprobs, behavior, drift, replayed.stds, advantage, mask, **bounds)

    def _divergence(self, policy: FlowPolicy, batch: Microbatch, replayed: ReplayedFlow) -> torch.Tensor:
        ref = batch.frozen["reference"]
        if self.config.kl == "gaussian":
            reduction = flow_segment(batch.trajectories[0]).logprob_reduction
            return step_kl(replayed.means, ref, replayed.stds, reduction).mean()
        at_steps = [
            velocity_regularizer(recorded_velocity(policy, batch.trajectories, w), ref[:, w]).mean()
            for w in range(ref.shape[1])
        ]
        return torch.stack(at_steps).mean()


def replay(policy: FlowPolicy, trajectories: Sequence[Trajectory]) -> ReplayedFlow:
    """Replays the last segment of every trajectory, with its guidance."""
    scored = [rows[-1] for rows in policy.logprobs(trajectories)]
    assert all(row.means is not None and row.stds is not None for row in scored)
    return ReplayedFlow(
        torch.stack([row.logprobs for row in scored]),
        torch.stack([row.means for row in scored if row.means is not None]),
        torch.stack([row.stds for row in scored if row.stds is not None])[0],
    )


def step_kl(
    means: Float[torch.Tensor, "B W N C"],
    other: Float[torch.Tensor, "B W N C"],
    stds: Float[torch.Tensor, " W"],
    reduction: Literal["mean", "sum"],
) -> Float[torch.Tensor, "B W"]:
    """``gaussian_kl`` of every recorded step."""
    return torch.stack(
        [gaussian_kl(means[:, w], other[:, w], stds[w], reduction) for w in range(means.shape[1])], dim=1
    )


def recorded_velocity(policy: FlowPolicy, trajectories: Sequence[Trajectory], w: int) -> Float[torch.Tensor, "B N C"]:
    """The unguided velocity at the recorded x_t of trained step ``w``."""
    segments = [flow_segment(trajectory) for trajectory in trajectories]
    x_t = torch.stack([segment.states[w] for segment in segments]).to(segments[0].latent.device)
    t = segments[0].timesteps[segments[0].trained_steps[w]].expand(len(x_t))
    return require_method(policy, "velocity").velocity(trajectories, x_t, t)


def level_weights(segment: FlowSegment, ratio: Literal["plain", "guard"] = "plain") -> Float[torch.Tensor, " W"]:
    """``step_weights`` of the trained steps, a function of times and noise level.

    GRPO-Guard's ratio already contains the step's standard deviation.
    """
    zero = torch.zeros(1, 1, 1)
    steps = [
        STEPS[segment.sampler](zero, zero, segment.timesteps[i], segment.timesteps[i + 1], segment.noise_level)
        for i in segment.trained_steps
    ]
    stds = torch.stack([step.std.reshape(()) for step in steps])
    return step_weights(
        torch.ones_like(stds) if ratio == "guard" else stds,
        torch.stack([step.mean_gain.reshape(()) for step in steps]),
    )
