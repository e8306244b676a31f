"""Training drawings: DiffusionNFT on fresh noise, or the clipped objective on recorded stochastic steps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import (
    SurrogateLoss,
    best_worst_mask,
    centered_advantages,
    clipped_surrogate,
    flow_matching_loss,
    gaussian_kl,
    guard_surrogate,
    nft_loss,
    reward_probability,
    scaled_clip,
    velocity_regularizer,
)
from lvrpo.config import KindConfig
from lvrpo.policies.base import Policy
from lvrpo.sampling import STEPS, derive_seed, normal_noise, shift_time, step_weights, uniform_noise
from lvrpo.training.objective import (
    FrozenPolicy,
    GroupAdvantages,
    LossOutput,
    Member,
    Microbatch,
    Objective,
    flow_segment,
    has_kind,
    recorded_passes,
)
from lvrpo.training.text import LR
from lvrpo.types import FlowSegment, Group, SegmentKind, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Float

TEXT_ONLY = (
    "trains tokens, and a flow has none: set text.kind; tokens.kind or masked.kind for a policy that draws with tokens"
)

PUBLISHED: Mapping[str, object] = {"clip_low": 1e-4, "clip_high": 1e-4, "step_weighting": "equal"}
"""What Flow-GRPO, MixGRPO and DanceGRPO have in common."""


class FlowConfig(KindConfig):
    """How segments drawn by a flow are trained."""

    hints: ClassVar[Mapping[str, str]] = {
        "lr": LR,
        **dict.fromkeys([f"kind={kind}" for kind in ("clip", "gspo", "cispo", "dapo", "dr_grpo")], TEXT_ONLY),
        "kind=grpo": "is called flow_grpo",
        "kind=grpo_guard": "is kind=flow_grpo with flow.ratio=guard",
    }
    defaults_of: ClassVar[Mapping[str, Mapping[str, object]]] = {
        # .04 in the paper's code, which leaves the step's -dt (about 1/10) out of the variance
        "flow_grpo": {**PUBLISHED, "kl": "gaussian", "kl_coef": 0.004},
        "mix_grpo": {**PUBLISHED, "kl_coef": 0.0},
        "dance_grpo": {**PUBLISHED, "kl_coef": 0.0},
    }
    kind: Literal["nft", "awm", "flow_grpo", "mix_grpo", "dance_grpo", "dpo", "best_of"] = "nft"
    """nft: DiffusionNFT on fresh noise (arXiv:2509.16117); awm: the clipped objective, the flow-matching loss in the
    place of the log-prob (arXiv:2509.25050); flow_grpo: the clipped objective on recorded stochastic steps
    (arXiv:2505.05470); mix_grpo (arXiv:2507.21802), dance_grpo (arXiv:2505.07818): the same, for their rollouts and
    without a divergence; all three with the bounds and the equal weights of steps of the papers, where these are not
    given; dpo: the best against the worst drawing of a group (arXiv:2311.12908); best_of: imitate the best
    (arXiv:2304.06767)."""
    weight: float = Field(default=1.0, ge=0)
    lr_scale: float = Field(default=1.0, gt=0, le=10)
    """Multiplier of the learning rates for the gradient of flows; see ``text.lr_scale``."""
    kl_coef: float = Field(default=2.0, ge=0)
    """nft, *_grpo, best_of: of the divergence from the reference. Without it nothing holds DiffusionNFT: the contrast
    of good and bad drawings moves the prediction from pure noise without end, until every cell holds an object
    (docs/log.md)."""
    kl: Literal["velocity", "gaussian"] = "velocity"
    """velocity: mean |v - v_ref|^2, unguided; gaussian (*_grpo): the exact divergence of the recorded steps, reduced as
    ``rollout.logprob_reduction``."""
    reference_guidance: float = Field(default=1.0, ge=1)
    """nft, awm: the reference is guided at this scale, so that one pass learns what guidance adds at sampling
    (CRD, arXiv:2603.14128). On top of the guidance of the rollout, if that is guided itself."""
    unguided_kl_coef: float = Field(default=0.0, ge=0)
    """nft, awm: of mean |v - v_ref|^2 without the text, which holds the branch that guidance leads away from."""
    keep: int = Field(default=2, ge=1)
    """nft, awm, *_grpo: of each group the best and the worst ``keep`` are trained; best_of: so many are imitated."""
    beta: float = Field(default=0.5, gt=0)
    advantage_max: float = Field(default=2.5, gt=0)
    """nft: larger advantages count as this; clipping unbalances a group, so it is rarely reached."""
    noise_draws: int = Field(default=2, ge=1, le=1000)
    """nft, awm, dpo, best_of: times per picture, one in each equal part of the sampler's grid."""
    min_time: float = Field(default=0.1, gt=0, lt=1)
    old_decay_rate: float = Field(default=0.05, ge=0)
    old_decay_ceiling: float = Field(default=0.9, ge=0, lt=1)
    clip_low: float = Field(default=1e-3, gt=0, lt=1)
    clip_high: float = Field(default=1e-3, gt=0)
    """*_grpo: bounds of the ratio of one step for log-probs that are means over the dimensions; widened to match where
    ``rollout.logprob_reduction`` is sum."""
    ratio: Literal["plain", "guard"] = "plain"
    """*_grpo: guard centers the log-ratio and levels its scale over the steps (GRPO-Guard, arXiv:2510.22319)."""
    step_weighting: Literal["level", "equal"] = "level"
    """*_grpo: level gives every step a gradient of one scale; with equal, the last drowns the first."""
    dpo_beta: float = Field(default=100.0, gt=0)
    """dpo: how far the reference may be left; smaller is further."""

    @property
    def recorded(self) -> bool:
        """Whether the recorded stochastic steps are trained; else velocities at fresh noise."""
        return self.kind in ("flow_grpo", "mix_grpo", "dance_grpo")


class FlowObjective(Objective):
    """What all have in common: a kind of segment and a section of the configuration."""

    kind: SegmentKind = "flow"

    def __init__(self, config: FlowConfig) -> None:
        self.config = config
        self.weight = config.weight

    def passes(self, trajectory: Trajectory) -> int:
        return self.config.noise_draws


class ContrastObjective(FlowObjective):
    """The best and the worst drawings of each group, with centered advantages."""

    def choose(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        keep = best_worst_mask(advantages.values, self.config.keep, advantages.valid)
        A = centered_advantages(advantages.values, keep)
        return [
            Member(group.trajectories[g], float(A[p, g]))
            for p, group in enumerate(groups)
            if has_kind(group, "flow")
            for g in keep[p].nonzero()[:, 0].tolist()
        ]


class FreshNoiseObjective(ContrastObjective):
    """Losses on fresh (x_t, t), compared with what the weights that sampled say there; guided as the rollout was."""

    samples_with = "old"
    purpose: ClassVar[str]
    """Names the noise."""

    @property
    def compared_with(self) -> tuple[FrozenPolicy, ...]:
        return ("old", "reference") if self.config.kl_coef or self.config.unguided_kl_coef else ("old",)

    def passes(self, trajectory: Trajectory) -> int:
        branches = 1 + (flow_segment(trajectory).guidance_scale != 1) + bool(self.config.unguided_kl_coef)
        return self.config.noise_draws * branches

    def frozen_terms(self, name: FrozenPolicy, policy: Policy, batch: Microbatch) -> Float[torch.Tensor, "K B N C"]:
        """Of the old policy its velocity as sampled; of the reference the guided one and that without the text, as far
        as they are used."""
        noised, config = self._noised(policy, batch), self.config
        if name == "old":
            return noised.velocity(policy)[None]
        guided = [noised.velocity(policy, config.reference_guidance)] if config.kl_coef else []
        return torch.stack(guided + ([noised.unguided(policy)] if config.unguided_kl_coef else []))

    def _noised(self, policy: Policy, batch: Microbatch) -> Noised:
        seeds = [trajectory.seed for trajectory in batch.trajectories]
        return add_noise(policy, batch, self.config, self.purpose, seeds)

    def loss(self, policy: Policy, batch: Microbatch) -> LossOutput:
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
        """The term that the rewards drive, per drawing and time, and what there is to log of it."""


class NFT(FreshNoiseObjective):
    """DiffusionNFT (arXiv:2509.16117)."""

    purpose = "nft"

    def _policy_loss(
        self, noised: Noised, v: Float[torch.Tensor, "B N C"], v_old: Float[torch.Tensor, "B N C"], batch: Microbatch
    ) -> tuple[Float[torch.Tensor, " B"], dict[str, torch.Tensor]]:
        config = self.config
        q = reward_probability(batch.advantages(), config.advantage_max).repeat_interleave(config.noise_draws)
        state = noised.x_t, noised.t, noised.x_0, q.to(noised.x_0)
        return nft_loss(v, v_old, None, *state, beta=config.beta, advantage_max=config.advantage_max).policy, {}


class AWM(FreshNoiseObjective):
    """Advantage-weighted matching (arXiv:2509.25050): -|v - (noise - x_0)|^2 in the place of a log-prob, clipped."""

    purpose = "awm"

    def _policy_loss(
        self, noised: Noised, v: Float[torch.Tensor, "B N C"], v_old: Float[torch.Tensor, "B N C"], batch: Microbatch
    ) -> tuple[Float[torch.Tensor, " B"], dict[str, torch.Tensor]]:
        config = self.config
        logprobs, behavior = -noised.flow_loss(v)[:, None], -noised.flow_loss(v_old)[:, None]
        A = batch.advantages().clamp(-config.advantage_max, config.advantage_max)
        A = A.repeat_interleave(config.noise_draws)[:, None].to(logprobs)
        surrogate = clipped_surrogate(
            logprobs,
            behavior,
            A,
            torch.ones_like(logprobs, dtype=torch.bool),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        return surrogate.loss_terms[:, 0], {"clip_fraction/flow": surrogate.clipped.float().mean()}


class FlowGRPO(ContrastObjective):
    """The clipped objective on the recorded steps, weighted so that all pull alike, plus a divergence."""

    def passes(self, trajectory: Trajectory) -> int:
        steps = len(flow_segment(trajectory).trained_steps)
        return recorded_passes(trajectory) + (steps if self.config.kl_coef and self.config.kl == "velocity" else 0)

    @property
    def compared_with(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",) if self.config.kl_coef else ()

    def frozen_terms(self, name: FrozenPolicy, policy: Policy, batch: Microbatch) -> Float[torch.Tensor, "B W N C"]:
        """Velocities at the recorded states before the trained steps, or the means of these steps."""
        if self.config.kl == "gaussian":
            return replay(policy, batch.trajectories).means
        steps = range(len(flow_segment(batch.trajectories[0]).trained_steps))
        return torch.stack([recorded_velocity(policy, batch.trajectories, w) for w in steps], dim=1)

    def loss(self, policy: Policy, batch: Microbatch) -> LossOutput:
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

    def _surrogate(self, batch: Microbatch, segments: Sequence[FlowSegment], replayed: ReplayedSteps) -> SurrogateLoss:
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

    def _divergence(self, policy: Policy, batch: Microbatch, replayed: ReplayedSteps) -> torch.Tensor:
        ref = batch.frozen["reference"]
        if self.config.kl == "gaussian":
            reduction = flow_segment(batch.trajectories[0]).logprob_reduction
            return step_kl(replayed.means, ref, replayed.stds, reduction).mean()
        at_steps = [
            velocity_regularizer(recorded_velocity(policy, batch.trajectories, w), ref[:, w]).mean()
            for w in range(ref.shape[1])
        ]
        return torch.stack(at_steps).mean()


@dataclass(frozen=True)
class Noised:
    """Drawings at fresh times, every one ``noise_draws`` times in a row; B in all."""

    trajectories: Sequence[Trajectory]
    x_0: Float[torch.Tensor, "B N C"]
    noise: Float[torch.Tensor, "B N C"]
    t: Float[torch.Tensor, " B"]
    x_t: Float[torch.Tensor, "B N C"]

    def velocity(self, policy: Policy, guidance: float = 1.0) -> Float[torch.Tensor, "B N C"]:
        """What ``policy`` says there, guided as the drawings were, times ``guidance``."""
        scale = flow_segment(self.trajectories[0]).guidance_scale * guidance
        return policy.velocity(self.trajectories, self.x_t, self.t, scale)

    def unguided(self, policy: Policy) -> Float[torch.Tensor, "B N C"]:
        """The same without the text."""
        return policy.velocity(self.trajectories, self.x_t, self.t, 0.0)

    def flow_loss(self, v: Float[torch.Tensor, "B N C"]) -> Float[torch.Tensor, " B"]:
        """The flow-matching loss of these velocities."""
        return flow_matching_loss(v, self.x_0, self.noise)


def add_noise(policy: Policy, batch: Microbatch, config: FlowConfig, purpose: str, seeds: Sequence[int]) -> Noised:
    """x_t of the batch's drawings at one time in each equal part of the policy's grid.

    Noise and times are functions of the drawing's seed, the purpose and the step; equal seeds share them.
    """
    draws = config.noise_draws
    repeated = [trajectory for trajectory in batch.trajectories for _ in range(draws)]
    x_0 = torch.stack([flow_segment(trajectory).latent for trajectory in repeated])
    each = [derive_seed(seed, purpose, batch.step, k) for seed in seeds for k in range(draws)]
    noise = normal_noise(each, x_0.shape[1:]).to(x_0)
    stratum = torch.arange(draws).repeat(len(seeds))
    u = (stratum + uniform_noise(each, (1,))[:, 0]) / draws
    t = shift_time(u, policy.timestep_shift()).clamp(min=config.min_time).to(x_0)
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    return Noised(repeated, x_0, noise, t, x_t)


@dataclass(frozen=True)
class ReplayedSteps:
    """The recorded steps of a batch of drawings under some weights; W trained steps."""

    logprobs: Float[torch.Tensor, "B W"]
    means: Float[torch.Tensor, "B W N C"]
    stds: Float[torch.Tensor, " W"]


def replay(policy: Policy, trajectories: Sequence[Trajectory]) -> ReplayedSteps:
    """The last segment of every trajectory, with the guidance that sampled it."""
    scored = [rows[-1] for rows in policy.logprobs(trajectories)]
    assert all(row.means is not None and row.stds is not None for row in scored)
    return ReplayedSteps(
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


def recorded_velocity(policy: Policy, trajectories: Sequence[Trajectory], w: int) -> Float[torch.Tensor, "B N C"]:
    """What ``policy`` says, unguided, at the recorded states before trained step ``w``."""
    segments = [flow_segment(trajectory) for trajectory in trajectories]
    x_t = torch.stack([segment.states[w] for segment in segments]).to(segments[0].latent.device)
    t = segments[0].timesteps[segments[0].trained_steps[w]].expand(len(x_t))
    return policy.velocity(trajectories, x_t, t)


def level_weights(segment: FlowSegment, ratio: Literal["plain", "guard"] = "plain") -> Float[torch.Tensor, " W"]:
    """``step_weights`` of the trained steps; they depend on the times and the noise level alone.

    GRPO-Guard's ratio is scaled by the step's deviation already.
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
