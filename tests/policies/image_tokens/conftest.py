"""A small random Janus and a small random Emu3: as folders and as policies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from families import prompts_of_all_tasks

from lvrpo.policies.image_tokens import ImageTokenPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.types import Prompt

pytest.importorskip("transformers")


@pytest.fixture(scope="session", params=["janus", "emu3"])
def folder(request: pytest.FixtureRequest, family_folder: Callable[[str], Path]) -> Path:
    return family_folder(request.param)


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


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return prompts_of_all_tasks()
