"""How well an output is done: right or wrong where that can be told, else what the run's own rewards give it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lvrpo.errors import ContractError
from lvrpo.policies.base import Policy
from lvrpo.rewards.success import scorable, successes
from lvrpo.rewards.table import NOT_APPLICABLE, RewardSource, score_groups
from lvrpo.types import Group, Prompt

Metric = Literal["success", "reward"]
"""success: 1 or 0; reward: the weighted mean of the run's trained rewards, in their own units."""


@dataclass(frozen=True)
class HeldOutScorer:
    """Scores outputs of held-out prompts, for validation and for every evaluation."""

    rewards: tuple[RewardSource, ...] = ()
    """Those of the run; the ones that are only watched are not used, nor those that compare members of a group."""

    def metric(self, prompt: Prompt) -> Metric | None:
        """How outputs of a prompt are scored; None: there is nothing to score them with."""
        if scorable(prompt):
            return "success"
        return "reward" if self._trained(prompt) else None

    def scores(self, groups: Sequence[Group], judge: Policy | None = None) -> list[list[float]]:
        """Per group and member its score, nan where a reward failed; ``judge``: a frozen policy, for the rewards.

        Raises ContractError, with the reason, where every score failed.

        A reward counts with its configured weight, w_k: sum_k w_k r_k / sum_k w_k over those that score the prompt.
        """
        right = [p for p, group in enumerate(groups) if scorable(group.prompt)]
        found = dict(zip(right, successes([groups[p] for p in right]), strict=True))
        rest = [p for p in range(len(groups)) if p not in found]
        if rest:
            found |= dict(zip(rest, self._rewarded([groups[p] for p in rest], judge), strict=True))
        return [found[p] for p in range(len(groups))]

    def _trained(self, prompt: Prompt) -> list[RewardSource]:
        return [r for r in self.rewards if r.config.weight and not r.relative and r.scores(prompt)]

    def _rewarded(self, groups: Sequence[Group], judge: Policy | None) -> list[list[float]]:
        sources = [r for r in self.rewards if r.config.weight and not r.relative]
        if judge is None or not all(self._trained(group.prompt) for group in groups):
            raise ContractError("a held-out prompt without an answer: nothing scores its outputs")
        table = score_groups(sources, groups, judge)
        applies = torch.tensor([[r.scores(group.prompt) for r in sources] for group in groups])[:, None]
        weights = torch.tensor([r.config.weight for r in sources]) * applies
        failed = next((why for why in table.reasons.values() if why != NOT_APPLICABLE), "")
        if not table.mask.any():
            raise ContractError(f"no reward could score the {len(groups)} held-out outputs: {failed}")
        scores = (table.scores * weights).sum(dim=-1) / weights.sum(dim=-1)
        return torch.where((table.mask | ~applies).all(dim=-1), scores, math.nan).tolist()


SUCCESS_ONLY = HeldOutScorer()
"""Scores right and wrong alone."""
