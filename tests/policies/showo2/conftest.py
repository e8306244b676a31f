"""A small random Show-o2: as a folder and as a policy."""

from __future__ import annotations

import pytest
import torch
from families import family_fixtures

from lvrpo.types import Prompt

pytest.importorskip("transformers")
pytest.importorskip("diffusers")

folder, showo2 = family_fixtures("showo2")


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Of all tasks, of different lengths; two ask about one image."""
    shared = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [
        Prompt("draw", "generate", ("a red circle above a blue square",), ("image",)),
        Prompt("short", "generate", ("a star",), ("image",)),
        Prompt("color", "understand", (shared, "what color is it"), ("text",)),
        Prompt("count", "understand", (shared, "how many circles are there in this image"), ("text",)),
        Prompt("sum", "reason", ("3 + 4",), ("text",)),
    ]
