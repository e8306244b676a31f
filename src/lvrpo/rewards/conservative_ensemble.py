"""A conservative reward: several judges of one output, and less where they disagree."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Literal

import torch
from pydantic import Field, field_validator

from lvrpo.algorithms import normalize_rewards
from lvrpo.algorithms.advantages import NormalizeChoice
from lvrpo.config import Config, NonNegative
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import SIDES, Scores, Side, join_judges
from lvrpo.rewards.row import RewardConfig, RewardSource
from lvrpo.rewards.table import NOT_APPLICABLE, build_rewards, score_groups
from lvrpo.types import Group, OutputKind, Prompt, RewardTable

MEMBER_FIELDS = ("name", "label", "options", "clip", "judge")
"""Fields of a member; weights, tasks and schedules belong to the row of the ensemble."""


class ConservativeEnsemble(Config):
    """Mean of an ensemble of rewards minus ``k`` times their standard deviation.

        r = mean_m s_m - k std_m s_m,

    the std over members (population). An output that one judge is fooled by, and the others are not, gains little: the
    ensemble's remedy against over-optimisation (arXiv:2310.02743, "worst case" and "uncertainty weighted").

    Members that do not apply to a prompt are left out there; an output that any of the others failed to score has no
    score.

    ``Scores.noise`` is that of the members to first order, var r = sum_m (dr / ds_m)^2 var s_m with dr / ds_m = 1 / M -
    k (s_m - mean) / (M std): their errors taken as independent, the scale of the group as exact.

    Range: that of the members; about +- 2 for ``scale: group``.
    Differs from the paper: members are judges of different kinds, not reward models of different seeds.
    """

    members: tuple[RewardConfig, ...] = Field(min_length=2)
    """Rows as in the table, with name, options, and ``judge`` for another model's weights."""
    k: NonNegative = 1.0
    """Standard deviations that are subtracted from the mean."""
    scale: Literal["group", "raw"] = "group"
    """group: each member is brought to deviation 1 in the group first, as rewards of different units must be; raw:
    members are compared as they are, for one reward by several judges."""

    @field_validator("members")
    @classmethod
    def _without_weights(cls, members: tuple[RewardConfig, ...]) -> tuple[RewardConfig, ...]:
        for i, member in enumerate(members):
            if other := sorted(member.model_fields_set - set(MEMBER_FIELDS)):
                raise ValueError(f"{i}.{other[0]}: not here: a member has {', '.join(MEMBER_FIELDS)}")
        return members

    @cached_property
    def sources(self) -> list[RewardSource]:
        """The members; raises InputError, as ``build_rewards``, where one cannot be made."""
        labels = [member.label or f"{i} {member.name}" for i, member in enumerate(self.members)]
        rows = zip(self.members, labels, strict=True)
        return build_rewards([member.model_copy(update={"label": label}) for member, label in rows])

    @property
    def judged_by(self) -> str:
        named = [(source.config.title, source.judged_by) for source in self.sources]
        return join_judges(*(f"{title}: {who}" for title, who in named if who))

    @property
    def sides(self) -> tuple[Side, ...]:
        asked = {side for source in self.sources for side in source.sides}
        return tuple(side for side in SIDES if side in asked)

    @property
    def judges(self) -> tuple[OutputKind, ...]:
        judged = {kind for source in self.sources for kind in source.judges}
        return tuple(kind for kind in ("text", "image") if kind in judged)

    def applies(self, prompt: Prompt) -> bool:
        return any(source.scores(prompt) for source in self.sources)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        table = score_groups(self.sources, groups, judge)
        scores, mask = table.scores, table.mask
        if self.scale == "group":
            one = torch.zeros(len(groups), dtype=torch.int64)
            scales: list[NormalizeChoice | None] = ["group"] * len(self.sources)
            scores = normalize_rewards(scores, mask, one, scales)
        mean, std = _moments(scores, mask, 2)
        failures = {
            (p, g): f"{table.names[k]}: {reason.removeprefix('failed: ')}"
            for (p, g, k), reason in table.reasons.items()
            if reason != NOT_APPLICABLE
        }
        return Scores((mean - self.k * std)[..., 0], failures, self._noise(table, scores, mean, std))

    def _noise(
        self, table: RewardTable, scores: torch.Tensor, mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor | None:
        """float32 (P, G); None where no member leaves anything to chance."""
        if not table.noise:
            return None
        none = torch.zeros(table.scores.shape[:2])
        noise = torch.stack([table.noise.get(name, none) for name in table.names], dim=2)
        if self.scale == "group":
            _, before = _moments(table.scores, table.mask, 1)
            _, after = _moments(scores, table.mask, 1)
            noise = noise * torch.where(before > 0, after / before, 0.0).square()
        # where the members agree the std has no slope
        slopes = torch.where(std > 0, 1 - self.k * (scores - mean) / std, 1.0) / table.mask.sum(dim=2, keepdim=True)
        return torch.where(table.mask, slopes.square() * noise, 0.0).sum(dim=2)


def _moments(values: torch.Tensor, mask: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and population std of the valid ones along an axis, which is kept."""
    count = mask.sum(dim=dim, keepdim=True)
    mean = torch.where(mask, values, 0.0).sum(dim=dim, keepdim=True) / count
    spread = torch.where(mask, (values - mean).square(), 0.0).sum(dim=dim, keepdim=True) / count
    return mean, spread.sqrt()
