"""A small random Show-o: as a folder and as a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import make_picture, prompts_of_all_tasks

from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.types import Prompt

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder(family_folder: Callable[[str], Path]) -> Path:
    return family_folder("showo")


@pytest.fixture(scope="session")
def showo(folder: Path) -> ShowoPolicy:
    """Not to be trained: tests that do load the folder."""
    return ShowoPolicy.load(folder)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """The answer about two pictures is about one, which is all that it reads."""
    about_one = Prompt("u2", "understand", (make_picture(2, 20, 40), "yes or no"), ("text",))
    plain = Prompt("r2", "reason", ("what color is it",), ("text",))
    return [*(about_one if prompt.id == "u2" else prompt for prompt in prompts_of_all_tasks()), plain]
