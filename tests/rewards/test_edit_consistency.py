"""Edits: the region that may change, what is asked of source and result, and what happens where neither is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.data.scenes import ScenePrompts
from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.edit_consistency import EditConsistency
from lvrpo.rewards.questions import UNCHANGED
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.rewards.table import build_rewards
from lvrpo.types import Fact, Group, Parts, Prompt, TextSegment, Trajectory

SIDE = 16
SOURCE = torch.full((3, SIDE, SIDE), 0.5)
REGION = torch.zeros(SIDE, SIDE, dtype=torch.bool)
REGION[:8, :8] = True
CHANGE = Fact("color", "what color is the star?", "red")
STAY = Fact(UNCHANGED, "is there a cube?", "yes")
DOUBTFUL = Fact(UNCHANGED, "is there a bird?", "yes")
BARE = Prompt("e", "edit", (SOURCE, "make the star red"), ("image",), edited=REGION)
ASKED = replace(BARE, facts=(CHANGE, STAY, DOUBTFUL))


def edited(top: int, left: int, by: float, size: int = 8) -> torch.Tensor:
    result = SOURCE.clone()
    result[:, top : top + size, left : left + size] += by
    return result


class Reader:
    """Answers by (level of the image's corner in tenths, question), and writes what it is told."""

    identity = "1"

    def __init__(self, table: dict[tuple[int, str], float], writes: Sequence[str] = ()) -> None:
        self.table, self.writes = table, list(writes)
        self.calls: list[int] = []
        self.shown: list[Parts] = []

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.calls.append(len(texts))
        found = []
        for (image, question), answer in zip(contexts, texts, strict=True):
            assert isinstance(image, torch.Tensor)
            words = str(question).split("?")[0] + "?"
            right = self.table[round(10 * float(image[0, 0, 0])), words]
            found.append(1 - right if answer == "no" else right)
        return torch.tensor(found).log()

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        assert sampling.temperature == 0.0
        self.shown += [prompt.parts for prompt in prompts]
        out = []
        for prompt in prompts:
            text = TextSegment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 0.0, self.writes.pop(0), True)
            out.append(Group(prompt, (Trajectory(prompt, 0, (text,), seed=0),)))
        return out


def scores(reward: EditConsistency, prompt: Prompt, judge: Any, *results: torch.Tensor) -> Any:
    return reward.score([offline_group(prompt, [[result] for result in results])], judge)


# --- pixels ---


def test_pixels_outside_a_known_region_by_hand() -> None:
    reward = EditConsistency(ask=False)
    outside = edited(0, 0, 0.4)
    outside[:, 8:, 8:] += 0.2
    part = edited(0, 0, 0.4)
    part[:, 8:10, 8:] += 0.2  # a quarter of one of three patches: d = .2 / 2
    found = scores(reward, BARE, None, edited(0, 0, 0.4), edited(0, 0, 0.05), SOURCE.clone(), outside, part).values[0]
    assert found.tolist() == pytest.approx([1, 0.5, 0, math.exp(-0.2 / 3 / 0.1), math.exp(-0.1 / 3 / 0.1)])


def test_damage_that_a_guess_forgives_is_seen_where_the_region_is_known() -> None:
    """One patch of four may change for a guess, whichever it is."""
    wrong = edited(8, 8, 0.4)
    reward = EditConsistency(ask=False)
    assert reward.pixel_score(SOURCE, wrong) == 1
    assert reward.pixel_score(SOURCE, wrong, REGION) == 0
    assert reward.pixel_score(SOURCE, edited(0, 0, 0.4), REGION) == reward.pixel_score(SOURCE, edited(0, 0, 0.4)) == 1


def test_a_patch_that_the_region_cuts_counts_for_what_lies_outside() -> None:
    region = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    region[:4, :8] = True
    result = edited(0, 0, 0.3)  # half of the first patch lies outside
    damage = (32 * 0.3) / (256 - 32)
    assert EditConsistency(ask=False).pixel_score(SOURCE, result, region) == pytest.approx(math.exp(-damage / 0.1))
    everywhere = torch.ones_like(region)
    assert EditConsistency(ask=False).pixel_score(SOURCE, result, everywhere) == 1


def test_a_guess_is_said_once_and_only_where_nothing_is_known() -> None:
    reward = EditConsistency(ask=False)
    scores(reward, BARE, None, SOURCE)  # a warning would be an error
    with pytest.warns(UserWarning, match=r"not known of 1 of 1 prompts \(first e\): taken to be the 25% of patches"):
        scores(reward, replace(BARE, edited=None), None, SOURCE)
    scores(reward, replace(BARE, edited=None), None, SOURCE)


def test_a_region_of_another_size_is_masked() -> None:
    found = scores(EditConsistency(ask=False), replace(BARE, edited=REGION[:8]), None, SOURCE)
    assert found.failures == {(0, 0): "a region of (8, 16) for a source of (3, 16, 16)"}


@pytest.mark.parametrize("category", ["recolor", "add", "remove", "move", "replace"])
def test_the_built_in_world_knows_where_an_edit_may_change(category: str) -> None:
    """The clean result leaves whatever lies outside as it was, and bystanders do."""
    source = ScenePrompts(split="train")
    examples = [source.example("edit", i) for i in range(60)]
    reward = EditConsistency(ask=False)
    for example in (e for e in examples if e.prompt.category == category):
        before, after = example.prompt.parts[0], example.outputs[0]
        region = example.prompt.edited
        assert isinstance(before, torch.Tensor)
        assert isinstance(after, torch.Tensor)
        assert region is not None
        assert torch.equal(before[:, ~region], after[:, ~region])
        assert not torch.equal(before, after)
        assert 0 < int(region.sum()) < region.numel()
        assert reward.pixel_score(before, after, region) > 0.5 > reward.pixel_score(before, before, region)
        for fact in example.prompt.facts:  # bystanders lie outside
            for kept in fact.check.get("objects", ()):
                assert not region[8 * kept["row"], 8 * kept["col"]]


# --- questions ---

SEES = {
    (5, CHANGE.question): 0.1,
    (5, STAY.question): 0.9,
    (5, DOUBTFUL.question): 0.6,
    (9, CHANGE.question): 0.8,
    (9, STAY.question): 0.7,
    (9, DOUBTFUL.question): 0.2,
    (7, CHANGE.question): 0.5,
    (7, STAY.question): 0.3,
    (7, DOUBTFUL.question): 0.9,
}
"""Sources have the level .5, results .9 and .7."""


def test_what_should_stay_counts_where_the_judge_saw_it_in_the_source() -> None:
    judge, results = Reader(SEES), (edited(0, 0, 0.4), edited(0, 0, 0.2))
    found = scores(EditConsistency(), ASKED, judge, *results)
    assert found.values[0].tolist() == pytest.approx([0.8 * 0.7, 0.5 * 0.3])
    assert judge.calls == [2, 4]  # the source once for the group, then two questions of each result
    both = scores(EditConsistency(sure=0.5), ASKED, Reader(SEES), *results).values[0].tolist()
    assert both == pytest.approx([0.8 * (0.7 + 0.2) / 2, 0.5 * (0.3 + 0.9) / 2])


def test_an_edit_of_which_the_judge_sees_nothing_that_stays_is_masked() -> None:
    found = scores(EditConsistency(), replace(ASKED, facts=(CHANGE, DOUBTFUL)), Reader(SEES), edited(0, 0, 0.4))
    assert found.failures == {(0, 0): "of 1 questions about what should stay the judge is sure of none"}
    alone = scores(EditConsistency(), replace(ASKED, facts=(CHANGE,)), Reader(SEES), edited(0, 0, 0.4))
    assert not alone.failures  # nothing that stays was named
    assert alone.values.item() == pytest.approx(0.8)


@pytest.mark.parametrize("said", [math.nan, 2.0])
def test_a_judge_that_says_nothing_of_the_source_masks_the_group(said: float) -> None:
    broken = {**SEES, (5, STAY.question): said}
    found = scores(EditConsistency(), ASKED, Reader(broken), edited(0, 0, 0.4), edited(0, 0, 0.2))
    assert {reason.split(":")[0] for reason in found.failures.values()} == {"of the source"}
    assert len(found.failures) == 2


def test_prompts_that_say_nothing_are_judged_by_pixels_beside_others() -> None:
    groups = [offline_group(prompt, [[edited(0, 0, 0.05)]]) for prompt in (BARE, ASKED)]
    judge = Reader(SEES | {(6, q): 1.0 for q in (CHANGE.question, STAY.question)})
    values = EditConsistency().score(groups, judge).values  # type: ignore[arg-type]  # a double
    assert values.flatten().tolist() == pytest.approx([0.5, 0.5])


# --- free text ---

ABOUT_CHANGE = "what color is the star? red"
ABOUT_REST = "is there a cube? yes\nis there a bird? yes\nWhat color is the star? blue"
SPLIT_SEES = {key: value for key, value in SEES.items() if key[1] != DOUBTFUL.question} | {
    (5, DOUBTFUL.question): 0.4,
}


def test_free_text_is_asked_what_should_be_and_what_should_stay(tmp_path: Path) -> None:
    judge = Reader(SPLIT_SEES, [ABOUT_CHANGE, ABOUT_REST])
    reward = EditConsistency(questions={"cache": str(tmp_path)})
    found = scores(reward, BARE, judge, edited(0, 0, 0.4), edited(0, 0, 0.2))
    assert not found.failures
    assert found.values[0].tolist() == pytest.approx([0.8 * 0.7, 0.5 * 0.3])
    first, second = judge.shown
    assert len(first) == 1
    assert second[0] is SOURCE
    assert all("make the star red" in str(parts[-1]) for parts in judge.shown)
    again = scores(reward, replace(BARE, id="other"), judge, edited(0, 0, 0.4))  # nothing is written twice
    assert again.values.item() == pytest.approx(0.56)
    other = replace(BARE, parts=(SOURCE + 0.01, BARE.parts[1]))
    judge.writes = [ABOUT_REST]
    scores(reward, other, judge, edited(0, 0, 0.4))  # another source: its rest is asked about anew
    assert not judge.writes


def test_self_vqa_asks_the_same_questions(tmp_path: Path) -> None:
    group = offline_group(BARE, [[edited(0, 0, 0.4)]])
    judge = Reader(SPLIT_SEES, [ABOUT_CHANGE, ABOUT_REST])
    values = SelfVQA(questions={"cache": str(tmp_path)}).score([group], judge).values  # type: ignore[arg-type]
    assert values.item() == pytest.approx((0.8 + 0.7) / 2)
    alone = SelfVQA(questions={"cache": str(tmp_path), "stay_template": None})
    assert alone.score([group], judge).values.item() == pytest.approx(0.8)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rest", "sees", "reason"),
    [
        ("nothing", {}, 'no questions about what should stay: none can be read in "nothing"'),
        ("What color is the star? blue", {}, "no questions about what should stay: all are about what changes"),
        (
            "is there a cube? yes",
            {(5, STAY.question): 0.5},
            "of 1 questions about what should stay the judge is sure of none",
        ),
        (
            "is there a cube? yes",
            {(5, STAY.question): math.nan},
            "of the source: the judge gave nan for a log-prob",
        ),
    ],
)
def test_an_edit_without_questions_about_the_rest_is_masked(
    rest: str, sees: dict[tuple[int, str], float], reason: str, tmp_path: Path
) -> None:
    for reward in (EditConsistency(questions={"cache": str(tmp_path)}), SelfVQA(questions={"cache": str(tmp_path)})):
        judge = Reader(SPLIT_SEES | sees, [ABOUT_CHANGE, rest])
        group = offline_group(BARE, [[edited(0, 0, 0.4)], [edited(0, 0, 0.2)]])
        found = reward.score([group], judge)  # type: ignore[arg-type]  # a double
        assert dict(found.failures) == {(0, 0): reason, (0, 1): reason}
        for file in tmp_path.rglob("*.json"):
            file.unlink()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ask": False, "sure": 0.5}, "ask=false: asks no questions: leave out sure, choices and questions"),
        ({"ask": False, "questions": {}}, "ask=false: asks no questions"),
        ({"sure": 1.0}, "edit_consistency.options.sure=1.0: must be < 1"),
        ({"questions": {"stay_template": "x"}}, r"stay_template: must hold \{prompt\}"),
        ({"questions": {"stay_template": None, "sure": 0.5}}, r"sure=0.5: applies to questions about what should stay"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name="edit_consistency", options=options)])
