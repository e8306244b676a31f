"""Small random models of three families, made once: as folders and as policies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_vlm import FAMILIES, create_vlm, without_videos

from lvrpo.policies.image_text_to_text import ImageTextToTextPolicy
from lvrpo.types import Image, Prompt

pytest.importorskip("transformers")


@pytest.fixture(scope="session", autouse=True)
def images_alone() -> Iterator[None]:
    """See ``without_videos``."""
    with without_videos():
        yield


@pytest.fixture(scope="session", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_vlm(request.param, tmp_path_factory.mktemp("vlm") / request.param)


@pytest.fixture(scope="session")
def vlm(folder: Path) -> ImageTextToTextPolicy:
    """Not to be trained: tests that do load the folder."""
    return ImageTextToTextPolicy.load(folder)


def make_image(seed: int, height: int = 24, width: int = 32) -> Image:
    pixels = torch.rand(3, height, width, generator=torch.Generator().manual_seed(seed))
    return (pixels * 255).round() / 255


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Of different lengths: two about one image, one about two images of other sizes, one about none."""
    shared = make_image(1)
    return [
        Prompt("u0", "understand", (shared, "what color is it"), ("text",)),
        Prompt("u1", "understand", (shared, "is it a red circle above a blue square, yes or no"), ("text",)),
        Prompt("u2", "understand", (make_image(2, 16, 16), "and", make_image(3, 40, 16), "yes or no"), ("text",)),
        Prompt("r0", "reason", ("a blue square",), ("text",)),
        Prompt("r1", "reason", (make_image(4), "what color is it"), ("text",)),
    ]
