"""From a table of rewards to the advantages of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import gdpo_advantages, group_relative_advantages
from lvrpo.config import Config
from lvrpo.types import TASKS, RewardTable

if TYPE_CHECKING:
    from jaxtyping import Bool, Float


class AdvantageConfig(Config):
    """How a table of rewards becomes one advantage per trajectory."""

    kind: Literal["gdpo", "group_relative"] = "gdpo"
    """gdpo: each reward normalised in its group, then summed; group_relative: summed, then normalised."""
    std_floor: float = Field(default=0.01, ge=0)
    """Groups whose reward spreads less than this carry no signal."""
    clamp: float = Field(default=5.0, gt=0)


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
