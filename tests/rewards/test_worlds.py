"""A world of one's own: what rewards ask of it, by the name that a prompt carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.data.base import WORLD_METHODS, WORLDS, world_of
from lvrpo.data.scenes import DESCRIBE, ScenePrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.registry import allow_code, isolated_permissions, resolve
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.caption_back import CaptionBack
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.edit_consistency import EditConsistency
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.rewards.success import has_success, successes
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.rewards.verifiable_image import SceneFacts
from lvrpo.types import Fact, Group, Parts, Prompt

WORLD = '''
from lvrpo.types import Fact


class Levels:
    """Images are dark or light; "make it light" is its whole language."""

    def questions(self, text):
        return (Fact("level", "is it light", "yes"),) if text == "make it light" else ()

    def unchanged_questions(self, instruction):
        return (Fact("unchanged", "is it square", "yes"),)

    def unreadable(self, image):
        return "a tall image" if image.shape[1] > image.shape[2] else None

    def holds(self, facts, images):
        return [[float(image.mean()) > fact.check["above"] for fact in of] for of, image in zip(facts, images)]


class Broken(Levels):
    def holds(self, facts, images):
        raise RuntimeError("out of film")


class Mute:
    def questions(self, text):
        return ()
'''
LEVELS = "levels.py:Levels"
LIGHT = Fact("level", "is it light", "yes", {"above": 0.5})
DRAW = Prompt("d", "generate", ("make it light",), ("image",), facts=(LIGHT,), world=LEVELS)
IMAGES = [torch.full((3, 6, 6), level) for level in (0.2, 0.9)]


@pytest.fixture(autouse=True)
def consent() -> Iterator[None]:
    Path("levels.py").write_text(WORLD)
    with isolated_permissions():
        allow_code(["levels.py"])
        yield


class Judge:
    """As sure as a table says of a question about an image; log-probs."""

    def __init__(self, **sure: float) -> None:
        self.sure, self.asked = {name.replace("_", " "): value for name, value in sure.items()}, []

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.asked += [str(context[-1]) for context in contexts]
        return torch.tensor([self.sure[str(context[-1])] for context in contexts]).log()


def drawn(prompt: Prompt = DRAW) -> list[Group]:
    return [offline_group(prompt, [[image] for image in IMAGES])]


def test_its_verifier_says_what_is_right() -> None:
    tall = offline_group(replace(DRAW, id="t"), [[torch.ones(3, 8, 6)], [torch.ones(3, 6, 6)]])
    assert has_success(DRAW)
    assert successes([*drawn(), tall]) == [[0, 1], [0, 1]]
    scores = SceneFacts().score([*drawn(), tall], None)  # type: ignore[arg-type]  # nobody asks the judge
    assert scores.failures == {(1, 0): "a tall image"}
    assert scores.values[0].tolist() == [0, 1]


def test_worlds_are_checked_each_by_its_own() -> None:
    example = ScenePrompts().example("generate", 0)
    (right,) = example.outputs
    assert isinstance(right, torch.Tensor)
    scene = offline_group(example.prompt, [[right], [torch.zeros_like(right)]])
    assert successes([*drawn(), scene, *drawn()]) == [[0, 1], [1, 0], [0, 1]]


def test_its_grammar_splits() -> None:
    free = drawn(replace(DRAW, facts=()))
    split: dict[str, Any] = {"questions": {"by": "grammar"}}
    judge: Any = Judge(is_it_light=0.8)
    assert SelfVQA(**split).score(free, judge).values.tolist() == [[pytest.approx(0.8)] * 2]
    other = SelfVQA(**split).score(drawn(replace(DRAW, facts=(), parts=("make it red",))), judge)
    assert set(other.failures.values()) == {"the grammar does not know its words"}


def test_of_an_edit_it_asks_what_should_stay() -> None:
    edit = Prompt("e", "edit", (IMAGES[0], "make it light"), ("image",), world=LEVELS)
    judge: Any = Judge(is_it_light=0.5, is_it_square=0.9)
    scores = EditConsistency(questions={"by": "grammar"}, edited=0.5).score(drawn(edit), judge)
    assert set(judge.asked) == {"is it light", "is it square"}
    assert scores.values[0, 1].item() <= 0.45 + 1e-6


def test_a_world_that_fails_stops_where_success_is_counted_and_masks_a_reward() -> None:
    broken = drawn(replace(DRAW, world="levels.py:Broken"))
    with pytest.raises(
        ContractError, match=r"world levels.py:Broken: could not check an image: RuntimeError: out of film"
    ):
        successes(broken)
    table = score_groups(build_rewards([RewardConfig(name="scene_facts")]), broken, None)  # type: ignore[arg-type]
    assert set(table.reasons.values()) == {"failed: RuntimeError: out of film"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scene", "world 'scene': unknown: did you mean scenes?"),
        ("levels.py:Mute", "has no method 'unchanged_questions': a world has 'questions' and"),
        ("others.py:Levels", "if you trust it, add --allow-code"),
    ],
)
def test_a_wrong_name_is_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        successes(drawn(replace(DRAW, world=name)))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_world_of_the_table_has_the_methods() -> None:
    for name in WORLDS:
        assert all(callable(getattr(resolve("world", name, WORLDS), method)) for method in WORLD_METHODS)
        assert world_of(name) is world_of(name)


def test_a_drawing_is_described_in_words_that_the_built_in_world_trains() -> None:
    assert CaptionBack().instruction == DESCRIBE
