"""How the prompts of a step are dealt among ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.policies.base import Sampling
from lvrpo.training.data_parallel import assign_to_ranks, estimated_tokens
from lvrpo.types import Prompt


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_every_item_is_dealt_once_and_none_is_moved_for_less(costs: list[float], ranks: int) -> None:
    dealt = assign_to_ranks(costs, ranks)
    assert sorted(i for own in dealt for i in own) == list(range(len(costs)))
    assert all(own == sorted(own) for own in dealt)
    loads = [sum(costs[i] for i in own) for own in dealt]
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0) + 1e-6 * max(loads)


@pytest.mark.parametrize(
    ("costs", "ranks", "dealt"),
    [
        ([1, 1, 1, 1, 1], 2, [[0, 2, 4], [1, 3]]),
        ([1, 1, 8, 1, 1, 1], 2, [[2], [0, 1, 3, 4, 5]]),
        ([3, 5, 4], 1, [[0, 1, 2]]),
        ([3], 3, [[0], [], []]),
        ([0, 0, 0], 2, [[0, 2], [1]]),
    ],
)
def test_shares_by_hand(costs: list[float], ranks: int, dealt: list[list[int]]) -> None:
    assert assign_to_ranks(costs, ranks) == dealt


def test_a_token_is_four_characters_or_a_patch_of_16_pixels() -> None:
    image = torch.zeros(3, 64, 32)
    sampling = Sampling(2, max_new_tokens=10, num_steps=5)
    asked = Prompt("a", "understand", (image, "x" * 8), ("text",))
    assert estimated_tokens([asked], sampling) == [8 + 2 + 10]
    edited = Prompt("a", "edit", (image, "x" * 8), ("image",))
    assert estimated_tokens([edited], sampling) == [8 + 2 + 5 * 8]
    assert estimated_tokens([edited], Sampling(2, num_steps=5, guidance_scale=2.0)) == [8 + 2 + 2 * 5 * 8]
    drawn = Prompt("a", "reason", ("x" * 8,), ("text", "image"))
    assert estimated_tokens([drawn], sampling) == [2 + 10 + 5 * 1024]
    small = Sampling(2, max_new_tokens=10, num_steps=5, image_size=(32, 32))
    assert estimated_tokens([drawn, edited], small) == [2 + 10 + 5 * 4, 8 + 2 + 5 * 8]
    assert estimated_tokens([], sampling) == []


def test_drawings_with_and_without_a_source_are_dealt_alike() -> None:
    """Of a policy whose images are small, whatever the number of images."""
    image = torch.zeros(3, 32, 32)
    drawn = [Prompt(f"g{i}", "generate", ("two red circles",), ("image",)) for i in range(33)]
    edited = [Prompt(f"e{i}", "edit", (image, "remove it"), ("image",)) for i in range(12)]
    dealt = assign_to_ranks(estimated_tokens([*drawn, *edited], Sampling(8, num_steps=8)), 2)
    assert sorted(map(len, dealt)) == [22, 23]
