from __future__ import annotations

import math

import pytest
import torch

from lvrpo.training.reward_metrics import noise_share
from lvrpo.types import RewardTable


def table(scores: list[list[float]], noise: list[list[float]], masked: tuple[int, int] | None = None) -> RewardTable:
    values = torch.tensor(scores)[..., None]
    mask = torch.ones_like(values, dtype=torch.bool)
    if masked is not None:
        mask[(*masked, 0)] = False
    tasks = ("understand",) * len(scores)
    return RewardTable(("r",), torch.ones(1), values, mask, {}, tasks, noise={"r": torch.tensor(noise)})


def test_the_share_by_hand() -> None:
    """Variances inside the groups 1 and 3; noise .5 and 1.5 on average."""
    both = table([[0.0, 2.0], [0.0, 12.0**0.5]], [[0.25, 0.75], [1.0, 2.0]])
    assert noise_share(both, 0, [0, 1]) == pytest.approx(2 / 4)
    assert noise_share(both, 0, [0]) == pytest.approx(0.5)


def test_groups_without_all_numbers_are_left_out() -> None:
    assert noise_share(table([[0.0, 2.0], [0.0, 9.0]], [[0.5, 0.5], [math.nan, 1.0]]), 0, [0, 1]) == pytest.approx(0.5)
    assert noise_share(table([[0.0, 2.0]], [[0.5, 0.5]], masked=(0, 1)), 0, [0]) is None
    assert noise_share(table([[1.0, 1.0]], [[0.5, 0.5]]), 0, [0]) is None
