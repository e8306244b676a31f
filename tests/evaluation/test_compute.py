"""Counted operations against products worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lvrpo.evaluation.reproduce.compute import FlopCounter
from lvrpo.policies.base import Sampling
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.training.optimizer import Muon
from lvrpo.types import Prompt


def test_a_linear_layer_is_six_operations_a_weight_and_row() -> None:
    layer, x = torch.nn.Linear(5, 7, bias=False), torch.ones(3, 5, requires_grad=True)
    with FlopCounter() as counter:
        y = layer(x)
        forward = counter.now
        y.sum().backward()
    assert forward == 2 * 3 * 5 * 7
    assert counter.now == 3 * 2 * 3 * 5 * 7  # the gradients of rows and of weights cost as much each


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_counts_its_products(key_heads: int) -> None:
    B, H, L, S, E = 2, 4, 3, 5, 8
    q = torch.randn(B, H, L, E, requires_grad=True)
    k, v = (torch.randn(B, key_heads, S, E, requires_grad=True) for _ in range(2))
    with FlopCounter() as counter:
        out = functional.scaled_dot_product_attention(q, k, v, enable_gqa=key_heads < H)
        forward = counter.now
        out.sum().backward()
    product = 2 * B * H * L * S * E
    assert forward == 2 * product
    assert counter.now in (2 * product + 5 * product, 2 * product + 4 * product)  # fused: scores once more


def test_optimizers_are_left_out() -> None:
    weight = torch.nn.Parameter(torch.randn(6, 4))
    weight.grad = torch.randn(6, 4)
    with FlopCounter() as counter:
        Muon([weight], lr=0.1).step()
    assert counter.now == 0


def test_more_steps_are_more_operations() -> None:
    transformer = MoTConfig(width=32, depth=1, heads=2, key_heads=1, mlp_width=32)
    policy = TinyPolicy.from_vocabulary(
        TinyConfig(image_size=16, tower_width=16, transformer=transformer), ("red",), seed=0
    )
    prompts = [Prompt("one", "generate", ("red",), ("image",)), Prompt("two", "generate", ("red red",), ("image",))]

    def flops(num_steps: int) -> int:
        with FlopCounter() as counter:
            policy.sample(prompts, Sampling(group_size=3, num_steps=num_steps), [0, 1])
        return counter.now

    found = [flops(steps) for steps in (2, 4, 6)]
    assert found[2] - found[1] == found[1] - found[0] > 0
