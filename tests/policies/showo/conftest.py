"""A small random Show-o, made once: as a folder and as a policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvrpo.policies.showo.create import ShowoSizes, create_showo
from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.types import Image, Prompt

pytest.importorskip("transformers")

TEXTS = ("a red circle above a blue square", "what color is it", "yes", "no", "USER: ASSISTANT:")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("showo") / "small"
    create_showo(ShowoSizes(), TEXTS).save(path)
    return path


@pytest.fixture(scope="session")
def showo(folder: Path) -> ShowoPolicy:
    """Not to be trained: tests that do load the folder."""
    return ShowoPolicy.load(folder)


def make_picture(seed: int, height: int = 32, width: int = 32) -> Image:
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return (pixels * 255).round() / 255


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Of all tasks, of different lengths; two ask about one picture."""
    shared = make_picture(1)
    return [
        Prompt("u0", "understand", (shared, "what color is it"), ("text",)),
        Prompt("u1", "understand", (shared, "is it a red circle above a square"), ("text",)),
        Prompt("u2", "understand", (make_picture(2, 20, 40), "yes or no"), ("text",)),
        Prompt("g0", "generate", ("a red circle",), ("image",)),
        Prompt("g1", "generate", ("a red circle above a blue square",), ("image",)),
        Prompt("r0", "reason", ("a blue square",), ("text", "image")),
        Prompt("r1", "reason", (make_picture(4), "what color is it"), ("text",)),
        Prompt("r2", "reason", ("what color is it",), ("text",)),
    ]
