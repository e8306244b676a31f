"""Training text: an importance-weighted objective on tokens, a divergence from the reference, an entropy bonus."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from lvrpo.algorithms import TOKEN_OBJECTIVES, entropy_bonus, k2, k3, reduce_tokens, truncated_weights
from lvrpo.config import Config
from lvrpo.policies.base import Policy
from lvrpo.training import objective
from lvrpo.training.objective import Batch, GroupAdvantages, Member, Objective
from lvrpo.types import Group, OutputKind, TextSegment, Trajectory

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

KL = {"k2": k2, "k3": k3}

ELSEWHERE: Mapping[str, str] = {
    "grpo": "is kind=clip, with reduction=trajectory in the paper",
    "dapo": "is kind=clip with clip_low=0.2, clip_high=0.28 and reduction=token: extend dapo.yaml",
    "dr_grpo": "is kind=clip with reduction=constant, and advantages.std=none: extend dr_grpo.yaml",
    "nft": "trains drawings, and this section is for text: set flow.kind",
}
"""Methods that are looked for here, and where they are."""


class TextConfig(Config):
    """How text segments are trained."""

    kind: Literal["clip", "gspo", "cispo", "dpo", "best_of"] = "clip"
    """clip: the clipped ratio of each token (GRPO, DAPO, Dr.GRPO by ``reduction`` and bounds); gspo: of the whole text
    (arXiv:2507.18071); cispo: capped weights (arXiv:2506.13585); dpo: the best against the worst text of a group
    (arXiv:2305.18290); best_of: imitate the best (arXiv:2304.06767)."""
    weight: float = Field(default=1.0, ge=0)
    lr: float = Field(default=1.0, gt=0)
    """Multiplier of the learning rates for the gradient of text. Where it differs from ``flow.lr`` the two kinds of
    segments are stepped in turn, each with moments of its own."""
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    importance_cap: float | None = Field(default=None, gt=0)
    """Where the program that sampled is not the one that trains: the ratio is taken to log-probs that the live policy
    gives at the start of the step, and min(these / those of the sampler, cap) weighs each token. None: they are one."""
    kl_coef: float = Field(default=0.05, ge=0)
    """clip, gspo, cispo: of the divergence from the reference."""
    kl: Literal["k2", "k3"] = "k3"
    """Its estimator; k2 has the divergence's own gradient, k3 a lower variance near the reference."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """clip, gspo, cispo: of the mean entropy of the tokens, which is raised."""
    reduction: Literal["token", "trajectory", "constant"] = "token"
    """token: one denominator for all tokens of a task (DAPO, which has one); trajectory: every text of a task counts
    alike (GRPO); constant: sums over tokens divided by rollout.max_new_tokens (Dr.GRPO)."""
    dpo_beta: float = Field(default=0.1, gt=0)
    """dpo: how far the reference may be left; smaller is further."""

    @field_validator("kind", mode="before")
    @classmethod
    def _not_elsewhere(cls, kind: object) -> object:
        if isinstance(kind, str) and kind in ELSEWHERE:
            raise ValueError(ELSEWHERE[kind])
        return kind


@dataclass(frozen=True)
class TokenGrid:
    """All text tokens of a batch of trajectories, padded to (B, L)."""

    logprobs: Float[torch.Tensor, "B L"]
    behavior: Float[torch.Tensor, "B L"]
    """Under the weights that sampled, by the program that sampled."""
    anchor: Float[torch.Tensor, "B L"]
    """What the ratio is taken to."""
    mask: Bool[torch.Tensor, "B L"]
    entropy: Float[torch.Tensor, "B L"]


class TextObjective(Objective):
    """What all have in common: a kind of segment and a section of the configuration."""

    kind: ClassVar[OutputKind] = "text"

    def __init__(self, config: TextConfig, max_new_tokens: int) -> None:
        self.config = config
        self.weight = config.weight
        self.max_new_tokens = max_new_tokens


class TokenObjective(TextObjective):
    """Policy gradient on the tokens of the valid members of every group with signal."""

    def choose(self, groups: Sequence[Group], advantages: GroupAdvantages) -> list[Member]:
        A, valid = advantages.values, advantages.valid
        return [
            Member(trajectory, float(A[p, g]))
            for p, group in enumerate(groups)
            if bool((A[p] != 0).any())
            for g, trajectory in enumerate(group.trajectories)
            if bool(valid[p, g]) and text_segments(trajectory)
        ]

    def size(self, members: Sequence[Member]) -> int:
        """Tokens or trajectories, whichever the reduction counts."""
        if self.config.reduction != "token":
            return len(members)
        return sum(len(segment.tokens) for member in members for segment in text_segments(member.trajectory))

    def loss(self, batch: Batch) -> torch.Tensor:
        config = self.config
        grid = token_grid(batch.policies.live, batch.trajectories)
        advantage = batch.advantages().to(grid.logprobs.device)[:, None]
        surrogate = TOKEN_OBJECTIVES[config.kind](
            grid.logprobs, grid.anchor, advantage, grid.mask, clip_low=config.clip_low, clip_high=config.clip_high
        )
        terms = surrogate.loss_terms
        if config.importance_cap is not None:
            weights = truncated_weights(grid.anchor, grid.behavior, grid.mask, cap=config.importance_cap)
            batch.log("importance/text", weights[grid.mask].mean())
            terms = weights * terms
        loss = self._reduced(terms, grid)
        batch.log(f"loss/text/{batch.task}", loss)
        batch.log("ratio/text", surrogate.ratio[grid.mask].mean())
        batch.log("clip_fraction/text", surrogate.clipped[grid.mask].float().mean())
        batch.log(f"entropy/{batch.task}", grid.entropy[grid.mask].mean())
        if config.kl_coef:
            with torch.no_grad():
                ref_logprobs = token_grid(batch.policies.reference, batch.trajectories).logprobs
            divergence = self._reduced(KL[config.kl](grid.logprobs, ref_logprobs), grid)
            batch.log(f"kl/text/{batch.task}", divergence)
            loss = loss + config.kl_coef * divergence
        if config.entropy_coef:
            constant = float(self.max_new_tokens)
            bonus = entropy_bonus(grid.entropy, grid.mask, config.reduction, constant=constant)
            loss = loss + config.entropy_coef * bonus
        return loss

    def _reduced(self, terms: Float[torch.Tensor, "B L"], grid: TokenGrid) -> torch.Tensor:
        return reduce_tokens(terms, grid.mask, self.config.reduction, constant=float(self.max_new_tokens))


def anchored(policy: Policy, groups: Sequence[Group]) -> list[Group]:
    """The groups with every text scored once more by ``policy``, which the coming updates start from."""
    trajectories = [t for group in groups for t in group.trajectories if text_segments(t)]
    scored: dict[int, Trajectory] = {}
    with torch.no_grad():
        size = objective.MEMBERS_AT_ONCE * objective.TEXTS_PER_DRAWING
        for start in range(0, len(trajectories), size):
            part = trajectories[start : start + size]
            for trajectory, rows in zip(part, policy.logprobs(part), strict=True):
                segments = tuple(
                    replace(s, trainer_logprobs=row.logprobs.cpu()) if isinstance(s, TextSegment) else s
                    for s, row in zip(trajectory.segments, rows, strict=True)
                )
                scored[id(trajectory)] = replace(trajectory, segments=segments)
    return [replace(group, trajectories=tuple(scored.get(id(t), t) for t in group.trajectories)) for group in groups]


def text_segments(trajectory: Trajectory) -> list[TextSegment]:
    """The texts of a trajectory, in order."""
    return [segment for segment in trajectory.segments if isinstance(segment, TextSegment)]


def token_grid(policy: Policy, trajectories: Sequence[Trajectory]) -> TokenGrid:
    """Replays the texts of the trajectories, each of which has one."""
    now, behavior, anchor, entropies = [], [], [], []
    for trajectory, replayed in zip(trajectories, policy.logprobs(trajectories), strict=True):
        texts = [
            (segment, scored)
            for segment, scored in zip(trajectory.segments, replayed, strict=True)
            if isinstance(segment, TextSegment)
        ]
        now.append(torch.cat([scored.logprobs for _, scored in texts]))
        behavior.append(torch.cat([segment.behavior_logprobs for segment, _ in texts]).to(now[-1].device))
        anchors = [s.behavior_logprobs if s.trainer_logprobs is None else s.trainer_logprobs for s, _ in texts]
        anchor.append(torch.cat(anchors).to(now[-1].device))
        entropies.append(torch.cat([scored.entropy for _, scored in texts if scored.entropy is not None]))
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(row), dtype=torch.bool, device=row.device) for row in now], batch_first=True)
    padded = [pad(rows, batch_first=True) for rows in (now, behavior, anchor, entropies)]
    return TokenGrid(padded[0], padded[1], padded[2], mask, padded[3])
