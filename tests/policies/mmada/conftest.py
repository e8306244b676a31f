"""A small random MMaDA: as a folder and as a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import prompts_of_all_tasks

from lvrpo.policies.mmada.policy import MmadaPolicy
from lvrpo.types import Prompt

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder(family_folder: Callable[[str], Path]) -> Path:
    return family_folder("mmada")


@pytest.fixture(scope="session")
def mmada(folder: Path) -> MmadaPolicy:
    """Not to be trained: tests that do load the folder."""
    return MmadaPolicy.load(folder)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Without the one about two pictures, of which it reads one."""
    return [prompt for prompt in prompts_of_all_tasks() if prompt.id != "u2"]
