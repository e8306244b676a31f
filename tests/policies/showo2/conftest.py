"""A small random Show-o2, made once: as a folder and as a policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lvrpo.policies.showo2.policy import Showo2Policy
from lvrpo.types import Prompt

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

TEXTS = ("a red circle above a blue square", "what color is it", "yes", "no")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lvrpo.policies.showo2.create import RandomShowo2, create_showo2

    path = tmp_path_factory.mktemp("showo2") / "small"
    create_showo2(RandomShowo2(), TEXTS).save(path)
    return path


@pytest.fixture(scope="session")
def showo2(folder: Path) -> Showo2Policy:
    """Not to be trained: tests that do load the folder."""
    return Showo2Policy.load(folder)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Of all tasks, of different lengths; two ask about one picture."""
    shared = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [
        Prompt("draw", "generate", ("a red circle above a blue square",), ("image",)),
        Prompt("short", "generate", ("a star",), ("image",)),
        Prompt("color", "understand", (shared, "what color is it"), ("text",)),
        Prompt("count", "understand", (shared, "how many circles are there in this picture"), ("text",)),
        Prompt("sum", "reason", ("3 + 4",), ("text",)),
    ]
