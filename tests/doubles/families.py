"""Small random models of every family of models that lvrpo trains, and the shipped recipe of each at small numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from small_vlm import create_vlm

from lvrpo.policies.base import Policy
from lvrpo.policies.loading import load_policy
from lvrpo.types import Image, Prompt

TEXTS = ("a red circle above a blue square", "what color is it", "yes", "no", "USER: ASSISTANT:")
SHARED = (
    "device=cpu",
    "rollout.group_size=4",
    "rewards=[{name: 'spread:Spread'}]",
    "allow_code=[spread]",
    "optimizer={kind: adamw, adamw_lr: 1e-3, warmup_steps: 0}",
    "reference_eval_every=2",
    "steps=2",
)
"""For a reward that differs in every group."""


@dataclass(frozen=True)
class Family:
    """A family of models."""

    recipe: str
    make: Callable[[Path], None]
    """Writes a random model."""
    settings: tuple[str, ...]
    """Beside ``SHARED``; policy and tasks among them."""
    losses: frozenset[str]
    """Among the metrics of a step."""
    replays: tuple[str, ...]
    """Kinds of segments, as the step-0 contract calls them."""
    needs: tuple[str, ...] = ("transformers",)

    def overrides(self, folder: Path) -> list[str]:
        """The recipe's changes."""
        return [f"policy={folder}", *SHARED, *self.settings]


def _random(family: str, sizes: str) -> Callable[[Path], None]:
    """Writes a random model of the default sizes."""

    def make(place: Path) -> None:
        module = import_module(f"lvrpo.policies.{family}.create")
        getattr(module, f"create_{family}")(getattr(module, sizes)(), TEXTS).save(place)

    return make


def _sd3(place: Path) -> None:
    from lvrpo.policies.diffusers_flow.create import PipelineSizes, create_pipeline

    create_pipeline("sd3-tiny", PipelineSizes(), place)


def _qwen3_vl(place: Path) -> None:
    create_vlm("qwen3_vl", place)


DRAWS_AND_WRITES = (
    "data.prompts_per_step={generate: 2, understand: 1, edit: 0, reason: 3}",
    "rollout.max_new_tokens=4",
    "validation={every: 2, prompts: {generate: 1, understand: 1, reason: 1}}",
)
FAMILIES: dict[str, Family] = {
    "janus": Family(
        "janus_lvrpo",
        _random("janus", "JanusSizes"),
        DRAWS_AND_WRITES,
        frozenset({"loss/text/understand", "loss/tokens/generate", "loss/text/reason", "loss/tokens/reason"}),
        ("text", "image tokens"),
    ),
    "emu3": Family(
        "emu3",
        _random("emu3", "Emu3Sizes"),
        (*DRAWS_AND_WRITES, "adapter=null", "rollout.image_size=[32, 24]"),
        frozenset({"loss/text/understand", "loss/tokens/generate", "loss/text/reason", "loss/tokens/reason"}),
        ("text", "image tokens"),
    ),
    "showo": Family(
        "showo",
        _random("showo", "ShowoSizes"),
        (*DRAWS_AND_WRITES, "rollout.num_steps=3"),
        frozenset({"loss/text/understand", "loss/masked/generate", "loss/text/reason", "loss/masked/reason"}),
        ("text", "masked image tokens"),
    ),
    "mmada": Family(
        "mmada_8b",
        _random("mmada", "MmadaSizes"),
        (*DRAWS_AND_WRITES, "adapter=null", "rollout.num_steps=3", "limits.microbatch_size=null"),
        frozenset({"loss/text/understand", "loss/masked/generate", "loss/text/reason", "loss/masked/reason"}),
        ("text", "masked image tokens"),
    ),
    "showo2": Family(
        "showo2_1p5b",
        _random("showo2", "RandomShowo2"),
        (
            "data.prompts_per_step={generate: 2, understand: 2, edit: 0, reason: 1}",
            "rollout.max_new_tokens=4",
            "rollout.num_steps=3",
            "data.scenes.weights={reason/draw_answer: 0}",
            "validation={every: 2, prompts: {generate: 1, understand: 1}}",
        ),
        frozenset({"loss/text/understand", "loss/flow/generate", "loss/text/reason"}),
        ("text", "image"),
        ("transformers", "diffusers"),
    ),
    "qwen3_vl": Family(
        "qwen3_vl_2b",
        _qwen3_vl,
        (
            "data.prompts_per_step={generate: 0, understand: 2, edit: 0, reason: 2}",
            "data.scenes.size=32",
            "rollout.max_new_tokens=4",
            "validation={every: 2, prompts: {understand: 2, reason: 1}}",
        ),
        frozenset({"loss/text/understand", "loss/text/reason"}),
        ("text",),
    ),
    "sd3": Family(
        "sd35_medium",
        _sd3,
        (
            "adapter=null",
            "data.prompts_per_step={generate: 1, understand: 0, edit: 0, reason: 0}",
            "rollout.num_steps=3",
            "rollout.image_size=[32, 32]",
            "flow.top_bottom_k=2",
            "limits.gradient_checkpointing=false",
            "validation={every: 2, prompts: {generate: 1}}",
        ),
        frozenset({"loss/flow/generate", "kl/flow/generate", "ratio/flow"}),
        ("image",),
        ("transformers", "diffusers"),
    ),
}


def make_image(seed: int, height: int = 32, width: int = 32) -> Image:
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return (pixels * 255).round() / 255


def prompts_of_all_tasks() -> list[Prompt]:
    """Of different lengths; two ask about one image, one about two of other sizes. No edits."""
    shared = make_image(1)
    return [
        Prompt("u0", "understand", (shared, "what color is it"), ("text",)),
        Prompt("u1", "understand", (shared, "is it a red circle above a square"), ("text",)),
        Prompt("u2", "understand", (make_image(2, 20, 40), make_image(3), "yes or no"), ("text",)),
        Prompt("g0", "generate", ("a red circle",), ("image",)),
        Prompt("g1", "generate", ("a red circle above a blue square",), ("image",)),
        Prompt("r0", "reason", ("a blue square",), ("text", "image")),
        Prompt("r1", "reason", (make_image(4), "what color is it"), ("text",)),
    ]


def family_fixtures(name: str) -> tuple[Callable[..., Path], Callable[..., Policy]]:
    """The fixtures ``folder`` and its policy, which is not to be trained: tests that do load the folder."""

    @pytest.fixture(scope="session")
    def folder(family_folder: Callable[[str], Path]) -> Path:
        return family_folder(name)

    @pytest.fixture(scope="session")
    def policy(folder: Path) -> Policy:
        return load_policy(folder)

    return folder, policy
