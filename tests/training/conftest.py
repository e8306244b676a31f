"""A small random policy without zero-initialised layers, and prompts of all four tasks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gradients_only import differentiate

from lvrpo.policies.base import Sampling
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses.base import KINDS, GroupAdvantages
from lvrpo.training.policies import Policies
from lvrpo.types import Group, OutputKind, Prompt

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
    image = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1))
    return [
        Prompt("u0", "understand", (image, "what is it"), ("text",)),
        Prompt("u1", "understand", (image, "is it red"), ("text",)),
        Prompt("g0", "generate", ("red circle",), ("image",)),
        Prompt("g1", "generate", ("draw two blue circle",), ("image",)),
        Prompt("e0", "edit", (image, "make it red"), ("image",)),
        Prompt("r0", "reason", ("draw one",), ("text", "image")),
    ]


@pytest.fixture(scope="session")
def lively_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a policy that ``lively_policy`` makes."""
    folder = tmp_path_factory.mktemp("policies") / "lively"
    make_policy().save(folder)
    return folder


class Bench:
    """A policy with its sets of weights, which start alike, and what an update does to it."""

    def __init__(self) -> None:
        self.live = make_policy()
        self.policies, self.reference = Policies(self.live), self.live.make_reference()

    def config(self, **tree: Any) -> TrainConfig:
        """Only the policy terms: the divergences have coefficient 0 unless given."""
        for section, without in (("text", ("dpo", "best_of")), ("flow", ("dpo",))):
            given = tree.get(section, {})
            tree[section] = given if given.get("kind") in without else {"kl_coef": 0.0} | given
        if tree["flow"].get("kind") == "flow_grpo":
            tree["rollout"] = {"sampler": "flow_sde", "num_steps": 4, "window": {"kind": "full"}} | tree.get(
                "rollout", {}
            )
        return TrainConfig.model_validate(tree)

    def sample(self, prompts: list[Prompt], group_size: int = 4, **changes: Any) -> list[Group]:
        sampling = Sampling(
            group_size, max_new_tokens=5, num_steps=4, timestep_shift=1.0, sampler="flow_sde", window=(0, 1, 2)
        )
        return self.live.sample(prompts, replace(sampling, **changes), list(range(len(prompts))))

    def update(self, groups: list[Group], A: Any, config: TrainConfig, step: int = 0) -> dict[str, float]:
        """The metrics of an update that leaves no gradient behind."""
        metrics = differentiate(self.policies, groups, both(A), config, step)
        self.live.zero_grad(set_to_none=True)
        return metrics.means()

    def gradient(self, groups: list[Group], A: Any, config: TrainConfig, step: int = 0) -> torch.Tensor:
        """The gradient of an update as one long vector; 0 where a parameter has none."""
        self.live.zero_grad(set_to_none=True)
        differentiate(self.policies, groups, both(A), config, step)
        return self.taken()

    def taken(self) -> torch.Tensor:
        """The gradient that a backward pass left, which is cleared."""
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.live.parameters()]
        self.live.zero_grad(set_to_none=True)
        return torch.cat([row.flatten() for row in rows])

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.live.parameters()])

    def descend(self, gradient: torch.Tensor, length: float) -> None:
        """A plain step of the given length."""
        move = gradient * (length / gradient.norm())
        with torch.no_grad():
            for p, part in zip(
                self.live.parameters(), move.split([p.numel() for p in self.live.parameters()]), strict=True
            ):
                p.sub_(part.view_as(p))

    def nudge(self, size: float = 0.01) -> None:
        """Moves the live weights a little."""
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.live.parameters():
                p.add_(size * torch.randn(p.shape, generator=generator))


def both(A: Any) -> dict[OutputKind, GroupAdvantages]:
    """One advantage per trajectory, for whichever of its segments."""
    return dict.fromkeys(KINDS, GroupAdvantages.all_valid(torch.as_tensor(A, dtype=torch.float32)))


@pytest.fixture
def bench() -> Bench:
    return Bench()
