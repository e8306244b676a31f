"""A small random Janus and a small random Emu3, made once: as folders and as policies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvrpo.policies.emu3.create import Emu3Sizes, create_emu3
from lvrpo.policies.image_tokens import ImageTokenPolicy
from lvrpo.policies.janus.create import JanusSizes, create_janus
from lvrpo.policies.loading import load_policy
from lvrpo.types import Image, Prompt

pytest.importorskip("transformers")

TEXTS = ("a red circle above a blue square", "what color is it", "yes", "no")


@pytest.fixture(scope="session", params=["janus", "emu3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image_tokens") / request.param
    fresh = create_janus(JanusSizes(), TEXTS) if request.param == "janus" else create_emu3(Emu3Sizes(), TEXTS)
    fresh.save(path)
    return path


def load(folder: Path) -> ImageTokenPolicy:
    policy = load_policy(folder)
    assert isinstance(policy, ImageTokenPolicy)
    return policy


@pytest.fixture(scope="session")
def policy(folder: Path) -> ImageTokenPolicy:
    """Not to be trained or changed: tests that do load the folder."""
    return load(folder)


@pytest.fixture
def own(folder: Path) -> ImageTokenPolicy:
    """To be changed."""
    return load(folder)


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
        Prompt("u2", "understand", (make_picture(2, 20, 40), make_picture(3), "yes or no"), ("text",)),
        Prompt("g0", "generate", ("a red circle",), ("image",)),
        Prompt("g1", "generate", ("a red circle above a blue square",), ("image",)),
        Prompt("r0", "reason", ("a blue square",), ("text", "image")),
        Prompt("r1", "reason", (make_picture(4), "what color is it"), ("text",)),
    ]
