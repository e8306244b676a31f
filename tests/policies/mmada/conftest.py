"""A small random MMaDA: as a folder and as a policy."""

from __future__ import annotations

import pytest
from families import family_fixtures, prompts_of_all_tasks

from lvrpo.types import Prompt

pytest.importorskip("transformers")

folder, mmada = family_fixtures("mmada")


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """Without the one about two images, of which it reads one."""
    return [prompt for prompt in prompts_of_all_tasks() if prompt.id != "u2"]
