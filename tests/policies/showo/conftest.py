"""A small random Show-o: as a folder and as a policy."""

from __future__ import annotations

import pytest
from families import family_fixtures, make_image, prompts_of_all_tasks

from lvrpo.types import Prompt

pytest.importorskip("transformers")

folder, showo = family_fixtures("showo")


@pytest.fixture(scope="session")
def prompts() -> list[Prompt]:
    """The answer about two images is about one, which is all that it reads."""
    about_one = Prompt("u2", "understand", (make_image(2, 20, 40), "yes or no"), ("text",))
    plain = Prompt("r2", "reason", ("what color is it",), ("text",))
    return [*(about_one if prompt.id == "u2" else prompt for prompt in prompts_of_all_tasks()), plain]
