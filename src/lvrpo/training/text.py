"""Training tokens: an importance-weighted objective on them, a divergence from the reference, an entropy bonus.

Text, image tokens and masked image tokens alike; ``training/drawn_tokens.py`` has the sections of the last two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import TOKEN_OBJECTIVES, entropy_bonus, k2, k3, reduce_tokens, truncated_weights
from lvrpo.config import KindConfig
from lvrpo.policies.base import Policy
from lvrpo.training import objective
from lvrpo.training.objective import FrozenPolicy, GroupAdvantages, LossOutput, Member, Microbatch, Objective
from lvrpo.types import Group, MaskedSegment, SegmentKind, TokenSegment, Trajectory, segments_through

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

KL = {"k2": k2, "k3": k3}

LR = (
    "was a multiplier of the learning rates: set optimizer.muon_lr and optimizer.adamw_lr, or the multipliers "
    "optimizer.expert_lr (by expert) and {section}.lr_scale"
)
"""Of ``lr`` in the section of a kind of segment."""
FLOW_ONLY = "trains a flow, and this section is for tokens: set flow.kind"


class TextConfig(KindConfig):
    """How text segments are trained."""

    hints: ClassVar[Mapping[str, str]] = {
        "lr": LR,
        "kind=clip": "is called grpo",
        **dict.fromkeys([f"kind={kind}" for kind in ("nft", "awm", "flow_grpo", "mix_grpo", "dance_grpo")], FLOW_ONLY),
    }
    defaults_of: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "dapo": {"clip_low": 0.2, "clip_high": 0.28, "reduction": "token", "kl_coef": 0.0},
        "dr_grpo": {"clip_low": 0.2, "clip_high": 0.2, "reduction": "constant", "kl_coef": 0.0},
    }
    kind: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo", "dpo", "best_of"] = "grpo"
    """grpo: the clipped ratio of each token (arXiv:2402.03300, there with clip_high=0.2, reduction=trajectory and
    kl_coef=0.04); dapo (arXiv:2503.14476), dr_grpo (arXiv:2503.20783; beside advantages.std=none): the same with their
    bounds, reduction and no KL where these are not given; gspo: of the whole text (arXiv:2507.18071); cispo: capped
    weights (arXiv:2506.13585); dpo: the best against the worst text of a group (arXiv:2305.18290); best_of: imitate the
    best (arXiv:2304.06767)."""
    weight: float = Field(default=1.0, ge=0)
    lr_scale: float = Field(default=1.0, gt=0, le=10)
    """Multiplier of the learning rates for the gradient of these segments. Where sections differ in it, their segments
    are stepped in turn, each rate with moments of its own."""
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    importance_cap: float | None = Field(default=None, gt=0)
    """Where the program that sampled is not the one that trains: the ratio is taken to log-probs that the policy
    gives at the start of the step, and min(these / those of the sampler, cap) weighs each token. None: they are one."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Of all but dpo and best_of: of the divergence from the reference."""
    kl: Literal["k2", "k3"] = "k3"
    """Its estimator; k2 has the divergence's own gradient, k3 a lower variance near the reference."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Of all but dpo and best_of: of the mean entropy of the tokens, which is raised."""
    reduction: Literal["token", "trajectory", "constant"] = "token"
    """token: one denominator for all tokens of a task (DAPO, which has one); trajectory: every text of a task counts
    alike (GRPO); constant: sums over tokens divided by rollout.max_new_tokens (Dr.GRPO)."""
    dpo_beta: float = Field(default=0.1, gt=0)
    """dpo: how far the reference may be left; smaller is further."""


@dataclass(frozen=True)
class TokenGrid:
    """All tokens of one kind of segment, padded to (B, L): a row per trajectory; of masked segments one per draw."""

    logprobs: Float[torch.Tensor, "B L"]
    behavior: Float[torch.Tensor, "B L"]
    """Under the weights that sampled, by the program that sampled."""
    anchor: Float[torch.Tensor, "B L"]
    """What the ratio is taken to."""
    mask: Bool[torch.Tensor, "B L"]
    entropy: Float[torch.Tensor, "B L"]


class TextObjective(Objective):
    """What all have in common: a kind of segment whose actions are tokens, and its section of the configuration."""

    def __init__(self, config: TextConfig, max_new_tokens: int, kind: SegmentKind = "text") -> None:
        self.config = config
        self.weight = config.weight
        self.max_new_tokens = max_new_tokens
        self.kind = kind


class TokenObjective(TextObjective):
    """Policy gradient on the tokens of the valid members of every group with signal."""

    def choose(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        A, valid = advantages.values, advantages.valid
        return [
            Member(trajectory, float(A[p, g]))
            for p, group in enumerate(groups)
            if bool((A[p] != 0).any())
            for g, trajectory in enumerate(group.trajectories)
            if bool(valid[p, g]) and token_segments(trajectory, self.kind)
        ]

    def size(self, members: Sequence[Member]) -> int:
        """Tokens or trajectories, whichever the reduction counts."""
        if self.config.reduction != "token":
            return len(members)
        return sum(token_count(member.trajectory, self.kind) for member in members)

    @property
    def compared_with(self) -> tuple[FrozenPolicy, ...]:
        return ("reference",) if self.config.kl_coef else ()

    def frozen_terms(self, name: FrozenPolicy, policy: Policy, batch: Microbatch) -> Float[torch.Tensor, "B L"]:
        return token_grid(policy, batch.trajectories, self.kind).logprobs

    def loss(self, policy: Policy, batch: Microbatch) -> LossOutput:
        config, kind = self.config, self.kind
        grid = token_grid(policy, batch.trajectories, kind)
        draws = len(grid.mask) // len(batch.members)
        advantage = batch.advantages().repeat_interleave(draws).to(grid.logprobs.device)[:, None]
        surrogate = TOKEN_OBJECTIVES[config.kind](
            grid.logprobs, grid.anchor, advantage, grid.mask, clip_low=config.clip_low, clip_high=config.clip_high
        )
        terms = surrogate.loss_terms
        metrics: dict[str, torch.Tensor] = {}
        if config.importance_cap is not None:
            weights = truncated_weights(grid.anchor, grid.behavior, grid.mask, cap=config.importance_cap)
            metrics[f"importance/{kind}"] = weights[grid.mask].mean()
            terms = weights * terms
        loss = self._reduced(terms, grid)
        metrics[f"loss/{kind}/{batch.task}"] = loss
        metrics[f"ratio/{kind}"] = surrogate.ratio[grid.mask].mean()
        metrics[f"clip_fraction/{kind}"] = surrogate.clipped[grid.mask].float().mean()
        entropy = "entropy" if kind == "text" else f"entropy/{kind}"
        metrics[f"{entropy}/{batch.task}"] = grid.entropy[grid.mask].mean()
        if config.kl_coef:
            divergence = self._reduced(KL[config.kl](grid.logprobs, batch.frozen["reference"]), grid)
            metrics[f"kl/{kind}/{batch.task}"] = divergence
            loss = loss + config.kl_coef * divergence
        if config.entropy_coef:
            bonus = entropy_bonus(grid.entropy, grid.mask, config.reduction, constant=self._constant(grid))
            loss = loss + config.entropy_coef * bonus
        return LossOutput(loss, metrics)

    def _reduced(self, terms: Float[torch.Tensor, "B L"], grid: TokenGrid) -> torch.Tensor:
        return reduce_tokens(terms, grid.mask, self.config.reduction, constant=self._constant(grid))

    def _constant(self, grid: TokenGrid) -> float:
        """The most tokens that a text may have; the tokens of a drawing, whose batch is of one size."""
        return float(self.max_new_tokens if self.kind == "text" else grid.mask.shape[1])


def anchored(policy: Policy, groups: Sequence[Group], kinds: Sequence[SegmentKind] = ("text",)) -> list[Group]:
    """The groups with every segment of these kinds scored once more by ``policy``, which the coming updates start
    from."""
    trajectories = [t for group in groups for t in group.trajectories if any(s.kind in kinds for s in t.segments)]
    scored: dict[int, Trajectory] = {}
    with torch.no_grad():
        size = objective.MEMBERS_AT_ONCE * objective.TEXTS_PER_DRAWING
        for start in range(0, len(trajectories), size):
            part = trajectories[start : start + size]
            for trajectory, rows in zip(part, policy.logprobs(part, kinds), strict=True):
                segments = list(trajectory.segments)
                for s, (segment, row) in enumerate(zip(segments_through(trajectory, kinds), rows, strict=True)):
                    if isinstance(segment, TokenSegment) and segment.kind in kinds:
                        segments[s] = replace(segment, trainer_logprobs=row.logprobs.cpu())
                scored[id(trajectory)] = replace(trajectory, segments=tuple(segments))
    return [replace(group, trajectories=tuple(scored.get(id(t), t) for t in group.trajectories)) for group in groups]


def token_segments(trajectory: Trajectory, kind: SegmentKind) -> list[TokenSegment]:
    """The segments of a kind whose actions are tokens, in order."""
    return [segment for segment in trajectory.segments if isinstance(segment, TokenSegment) and segment.kind == kind]


def token_count(trajectory: Trajectory, kind: SegmentKind) -> int:
    """How many tokens of a kind are scored; one that several draws mask counts in each."""
    return sum(int(_scored(segment).sum()) for segment in token_segments(trajectory, kind))


def token_grid(policy: Policy, trajectories: Sequence[Trajectory], kind: SegmentKind = "text") -> TokenGrid:
    """Replays the segments of a kind, of which each of the trajectories has one or more."""
    now, behavior, anchor, masks, entropies = [], [], [], [], []
    for trajectory, replayed in zip(trajectories, policy.logprobs(trajectories, [kind]), strict=True):
        found = [
            (segment, scored)
            for segment, scored in zip(segments_through(trajectory, [kind]), replayed, strict=True)
            if isinstance(segment, TokenSegment) and segment.kind == kind
        ]
        now += _rows([scored.logprobs for _, scored in found])
        device = now[-1].device
        behavior += _rows([segment.behavior_logprobs for segment, _ in found], device)
        anchors = [s.behavior_logprobs if s.trainer_logprobs is None else s.trainer_logprobs for s, _ in found]
        anchor += _rows(anchors, device)
        masks += _rows([_scored(segment) for segment, _ in found], device)
        entropies += _rows([scored.entropy for _, scored in found if scored.entropy is not None])
    padded = [torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (now, behavior, anchor, entropies)]
    mask = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return TokenGrid(padded[0], padded[1], padded[2], mask, padded[3])


def _scored(segment: TokenSegment) -> Bool[torch.Tensor, "R L"]:
    """Which log-probs of a segment count, a row per draw: all of them, unless it says otherwise."""
    if isinstance(segment, MaskedSegment):
        return segment.scored
    return torch.ones_like(segment.behavior_logprobs, dtype=torch.bool)[None]


def _rows(parts: Sequence[torch.Tensor], device: torch.device | None = None) -> list[torch.Tensor]:
    """The segments of a trajectory, each (L,) or (R, L), one after another: R rows."""
    return list(torch.cat([torch.atleast_2d(part) for part in parts], dim=1).to(device))
