"""A small random policy without zero-initialised layers, and prompts of all four tasks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.types import Prompt

WORDS = ("what", "is", "it", "draw", "make", "red", "blue", "circle", "one", "two")


def make_policy(seed: int = 0) -> TinyPolicy:
    transformer = MoTConfig(width=32, depth=2, heads=2, key_heads=1, mlp_width=32)
    policy = TinyPolicy.from_vocabulary(TinyConfig(image_size=16, tower_width=16, transformer=transformer), WORDS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 * parameter.shape[-1] ** -0.5)
    return policy


@pytest.fixture
def lively_policy() -> Callable[..., TinyPolicy]:
    return make_policy


@pytest.fixture
def prompts() -> list[Prompt]:
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [
        Prompt("u0", "understand", (picture, "what is it"), ("text",)),
        Prompt("u1", "understand", (picture, "is it red"), ("text",)),
        Prompt("g0", "generate", ("red circle",), ("image",)),
        Prompt("g1", "generate", ("draw two blue circle",), ("image",)),
        Prompt("e0", "edit", (picture, "make it red"), ("image",)),
        Prompt("r0", "reason", ("draw one",), ("text", "image")),
    ]
