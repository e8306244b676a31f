from __future__ import annotations

from typing import Any

import pytest
import torch

from lvrpo.training.advantages import AdvantageConfig, compute_advantages
from lvrpo.types import RewardTable


def table(scores: list[Any], mask: list[Any] | None = None, weights: tuple[float, ...] = (1.0, 1.0)) -> RewardTable:
    values = torch.tensor(scores)
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.tensor(mask)
    tasks = ("understand", "generate")[: len(values)]
    return RewardTable(("a", "b"), torch.tensor(weights), values, valid, {}, tasks)


def test_advantages_of_a_table_by_hand() -> None:
    rewards = table([[[0.0, 0.30], [0.0, 0.31], [1.0, 0.30], [1.0, 0.31]]])
    config = AdvantageConfig.model_validate({"std_floor": 1e-4})
    expected = torch.tensor([[-1.41, -0.01, 0.01, 1.41]])
    torch.testing.assert_close(compute_advantages(rewards, config), expected, rtol=0, atol=0.02)
    summed = AdvantageConfig.model_validate({"kind": "group_relative"})
    expected = torch.tensor([[-1.01, -0.99, 0.99, 1.01]])
    torch.testing.assert_close(compute_advantages(rewards, summed), expected, rtol=0, atol=0.005)


def test_advantages_are_clamped_and_floored() -> None:
    rewards = table([[[1.0, 0.5], *[[0.0, 0.5]] * 63]], weights=(1.0, 0.0))
    for kind in ("gdpo", "group_relative"):
        A = compute_advantages(rewards, AdvantageConfig.model_validate({"kind": kind, "clamp": 2.0}))
        assert A.max() == 2.0
        flat = table([[[0.5, 0.1], [0.505, 0.1]]])
        assert not compute_advantages(flat, AdvantageConfig.model_validate({"kind": kind})).any()


@pytest.mark.parametrize("kind", ["gdpo", "group_relative"])
def test_a_failed_score_is_no_worse_than_a_mean_one(kind: str) -> None:
    """Every member got 1 from both rewards, but the second one failed on member 0."""
    rewards = table(
        [[[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]],
        [[[True, False], [True, True], [True, True], [True, True]]],
    )
    assert not compute_advantages(rewards, AdvantageConfig.model_validate({"kind": kind})).any()
