"""A small random Emu3: as a folder and as a policy."""

from __future__ import annotations

import pytest
from families import family_fixtures, prompts_of_all_tasks

from lvrpo.types import Prompt

pytest.importorskip("transformers")

folder, emu3 = family_fixtures("emu3")


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    return prompts_of_all_tasks()
