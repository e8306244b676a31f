"""A small random Janus: as a folder and as a policy."""

from __future__ import annotations

import pytest
from families import family_fixtures, prompts_of_all_tasks

from lvrpo.types import Prompt

pytest.importorskip("transformers")

folder, janus = family_fixtures("janus")


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return prompts_of_all_tasks()
