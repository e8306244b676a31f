from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lvrpo.data.scenes import Scene, SceneObject, ScenePrompts, ScenesConfig, render
from lvrpo.errors import InputError
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.success import has_success, successes
from lvrpo.rewards.table import build_rewards
from lvrpo.rewards.verifiable_image import SceneFacts, fact_table
from lvrpo.types import Fact, Group, Image, Prompt

RIGHT = Scene("white", (SceneObject("circle", "red", 0, 0), SceneObject("star", "blue", 2, 3)))
HALF = Scene("white", (SceneObject("circle", "red", 0, 0), SceneObject("star", "green", 2, 3)))
WRONG = Scene("black", ())
FACTS = (
    Fact("exists", "is there a circle ?", "yes", {"type": "exists", "shape": "circle", "present": True}),
    Fact("color", "what color is the star ?", "blue", {"type": "color", "shape": "star", "color": "blue"}),
    Fact("position", "is it left ?", "yes", {"type": "edge", "shape": "circle", "color": "red", "edge": "left"}),
    Fact("total", "how many ?", "two", {"type": "total", "count": 2}),
)
PROMPT = Prompt("g", "generate", ("a red circle and a blue star",), ("image",), facts=FACTS)
MakeGroup = Callable[..., Group]


@pytest.fixture
def drawn(group: MakeGroup) -> list[Group]:
    images = [render(scene) for scene in (RIGHT, HALF, WRONG)]
    return [group(PROMPT, [[p] for p in images]), group(replace(PROMPT, facts=FACTS[:1]), [[p] for p in images])]


def test_facts_of_rendered_scenes(drawn: list[Group]) -> None:
    rows = fact_table(drawn)
    assert rows[:3] == [[True] * 4, [True, False, True, True], [False] * 4]
    assert rows[3:] == [[True], [True], [False]]


@pytest.mark.parametrize(
    ("mode", "values"),
    [
        ("fraction", [[1, 0.75, 0], [1, 1, 0]]),
        ("gated", [[1, 0.75, 0], [1, 1, 0]]),
        ("all", [[1, 0, 0], [1, 1, 0]]),
        ("mixed", [[1, 0.375, 0], [1, 1, 0]]),
    ],
)
def test_scores(mode: Any, values: list[list[float]], drawn: list[Group], judge: Callable[..., Any]) -> None:
    scores = SceneFacts(mode=mode).score(drawn, judge({}))
    assert scores.values.tolist() == values
    assert not scores.failures


def test_filling_the_image_pays_in_no_mode_but_fraction(group: MakeGroup, judge: Callable[..., Any]) -> None:
    """One object right out of one, against everything that was asked and one object too many."""
    facts = (FACTS[0], FACTS[1], Fact("total", "how many ?", "two", {"type": "total", "count": 2}))
    crowded = Scene("white", (*RIGHT.objects, SceneObject("square", "green", 3, 0)))
    groups = [group(replace(PROMPT, facts=facts), [[render(HALF)], [render(crowded)]])]
    assert SceneFacts(mode="fraction").score(groups, judge({})).values.tolist() == [[pytest.approx(2 / 3)] * 2]
    assert SceneFacts(mode="gated").score(groups, judge({})).values.tolist() == [
        [pytest.approx(2 / 3), pytest.approx(1 / 3)]
    ]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match=r"options.mode=most: must be 'fraction', 'gated', 'all' or 'mixed'"):
        build_rewards([RewardConfig(name="scene_facts", options={"mode": "most"})])


def test_where_it_applies() -> None:
    unchecked = replace(PROMPT, facts=(*FACTS, Fact("question", "is it nice ?", "yes")))
    cases = (PROMPT, replace(PROMPT, output=("text",)), replace(PROMPT, facts=()), unchecked)
    assert [SceneFacts().applies(p) for p in cases] == [True, False, False, False]
    assert [has_success(p) for p in cases] == [True, False, False, False]
    assert has_success(Prompt("u", "understand", (), ("text",), answer="red"))
    assert has_success(replace(PROMPT, output=("text", "image"), answer="7"))


def test_the_world_judges_its_own_images_right(group: MakeGroup) -> None:
    source = ScenePrompts(ScenesConfig(), "validation", 0)
    groups, worlds = [], []
    for task in source.tasks:
        for i in range(12):
            example = source.example(task, i)
            groups.append(group(example.prompt, [example.outputs]))
            blank: list[str | Image] = [
                "nothing" if isinstance(o, str) else torch.zeros_like(o) for o in example.outputs
            ]
            worlds.append(group(example.prompt, [blank]))
    assert all(has_success(g.prompt) for g in groups)
    assert successes(groups) == [[1.0]] * len(groups)
    assert successes(worlds) == [[0.0]] * len(worlds)


def test_successes_of_thought_and_drawing_need_both(group: MakeGroup) -> None:
    prompt = replace(PROMPT, task="reason", output=("text", "image"), answer="7")
    right, wrong = render(RIGHT), render(WRONG)
    groups = [
        group(prompt, [["seven", right], ["seven", wrong], ["six", right], ["six", wrong]]),
        group(Prompt("u", "understand", (), ("text",), answer="red"), [["red"], ["blue"], ["a red"], [""]]),
        group(replace(prompt, answer=None), [["seven", right], ["six", wrong], ["x", right], ["x", right]]),
    ]
    assert successes(groups) == [[1, 0, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]]
    assert successes([]) == []
