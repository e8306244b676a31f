"""A small random Emu3: as a folder and as a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import prompts_of_all_tasks

from lvrpo.policies.emu3.policy import Emu3Policy
from lvrpo.types import Prompt

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder(family_folder: Callable[[str], Path]) -> Path:
    return family_folder("emu3")


@pytest.fixture(scope="session")
def emu3(folder: Path) -> Emu3Policy:
    """Not to be trained: tests that do load the folder."""
    return Emu3Policy.load(folder)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return prompts_of_all_tasks()
