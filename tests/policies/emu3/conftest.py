"""A small random Emu3, made once: as a folder and as a policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvrpo.policies.emu3.create import Emu3Sizes, create_emu3
from lvrpo.policies.emu3.policy import Emu3Policy
from lvrpo.types import Image, Prompt

pytest.importorskip("transformers")

TEXTS = ("a red circle above a blue square", "what color is it", "yes", "no")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emu3") / "small"
    create_emu3(Emu3Sizes(), TEXTS).save(path)
    return path


@pytest.fixture(scope="session")
def emu3(folder: Path) -> Emu3Policy:
    """Not to be trained: tests that do load the folder."""
    return Emu3Policy.load(folder)


def make_picture(seed: int, height: int = 32, width: int = 32) -> Image:
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return (pixels * 255).round() / 255


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Of all tasks, of different lengths; two ask about one picture, one about two of other sizes."""
    shared = make_picture(1)
    return [
        Prompt("u0", "understand", (shared, "what color is it"), ("text",)),
        Prompt("u1", "understand", (shared, "is it a red circle above a square"), ("text",)),
        Prompt("u2", "understand", (make_picture(2, 20, 40), make_picture(3), "yes or no"), ("text",)),
        Prompt("g0", "generate", ("a red circle",), ("image",)),
        Prompt("g1", "generate", ("a red circle above a blue square",), ("image",)),
        Prompt("r0", "reason", ("a blue square",), ("text", "image")),
        Prompt("r1", "reason", (make_picture(4), "what color is it"), ("text",)),
    ]
