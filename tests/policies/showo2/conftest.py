"""A small random Show-o2: as a folder and as a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lvrpo.policies.showo2.policy import Showo2Policy
from lvrpo.types import Prompt

pytest.importorskip("transformers")
pytest.importorskip("diffusers")


@pytest.fixture(scope="session")
def folder(family_folder: Callable[[str], Path]) -> Path:
    return family_folder("showo2")


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
