"""A small random Janus: as a folder and as a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import prompts_of_all_tasks

from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.types import Prompt

pytest.importorskip("transformers")


@pytest.fixture(scope="session")
def folder(family_folder: Callable[[str], Path]) -> Path:
    return family_folder("janus")


@pytest.fixture(scope="session")
def janus(folder: Path) -> JanusPolicy:
    """Not to be trained: tests that do load the folder."""
    return JanusPolicy.load(folder)


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return prompts_of_all_tasks()
