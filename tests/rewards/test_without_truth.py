"""Agreement, description and comparison back, and edits that keep the rest."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.rewards.agreement import Agreement
from lvrpo.rewards.base import Scores, offline_group
from lvrpo.rewards.caption_back import CaptionBack, word_f1
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.edit_consistency import EditConsistency
from lvrpo.rewards.table import (
    build_rewards,
    complete_texts,
    mask_batch_failures,
    score_groups,
    score_groups_unchecked,
)
from lvrpo.training.data_parallel import join_tables
from lvrpo.types import Group, Prompt, RewardTable

ASK = Prompt("q", "understand", (torch.zeros(3, 4, 4), "what ?"), ("text",), category="color")


def asked(name: str, *answers: str, category: str = "color") -> Group:
    return offline_group(replace(ASK, id=name, category=category), [[answer] for answer in answers])


# --- agreement ---


class Reader:
    """Gives texts probabilities per token, whatever the image."""

    def __init__(self, table: dict[str, float]) -> None:
        self.table = table
        self.asked: list[str] = []

    def text_logprob(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        assert all(context == ASK.parts for context in contexts)
        self.asked += texts
        return torch.tensor([self.table[text] for text in texts]).log()


def voted(group: Sequence[Group], votes: dict[str, float], **options: Any) -> Scores:
    return Agreement(**options).score(group, Reader(votes))  # type: ignore[arg-type]  # a double


def test_the_judge_outvotes_the_members() -> None:
    judge: Any = Reader({"red": 0.2, "blue": 0.5, "pink": 0.1})
    groups = [asked("a", "red", "red", "red", "blue"), asked("b", "pink", "red", "red", "pink")]
    scores = Agreement().score(groups, judge)
    assert scores.values.tolist() == [[0, 0, 0, 1], [0, 1, 1, 0]]
    assert not scores.failures
    assert judge.asked == ["red", "blue", "pink", "red"]  # each answer of a group once


def test_spellings_of_an_answer_share_its_votes() -> None:
    judge = Reader({"3": 0.25, "three": 0.2, "4": 0.4})
    scores = Agreement().score([asked("a", "three", "4", "3", "4")], judge)  # type: ignore[arg-type]
    assert scores.values.tolist() == [[1, 0, 1, 0]]  # .45 of .85


def test_an_unsure_judge_gives_no_score() -> None:
    judge = Reader({"red": 0.3, "blue": 0.2, "pink": 0.2})
    groups = [asked("a", "red", "blue", "pink")]
    assert set(Agreement().score(groups, judge).failures.values()) == {"the group has no majority"}  # type: ignore[arg-type]
    assert Agreement(least=0.4).score(groups, judge).values.tolist() == [[1, 0, 0]]  # type: ignore[arg-type]


def test_what_the_judge_has_no_number_for_has_no_vote() -> None:
    judge = Reader({"red": math.nan, "blue": 0.4, "pink": 0.0})
    scores = Agreement().score([asked("a", "red", "blue", "pink", "")], judge)  # type: ignore[arg-type]
    assert scores.values[0, 1] == 1
    assert scores.failures == {
        (0, 0): "the judge gave the answer no number",
        (0, 2): "the judge gave the answer no number",
        (0, 3): "the answer is empty",
    }
    none = Agreement().score([asked("a", "", "")], judge)  # type: ignore[arg-type]
    assert set(none.failures.values()) == {"the answer is empty"}


@given(
    st.lists(st.sampled_from(["red", "blue", "pink", ""]), min_size=1, max_size=6),
    st.lists(st.floats(0.01, 1), min_size=3, max_size=3),
    st.randoms(use_true_random=False),
)
def test_the_order_of_the_members_does_not_matter(answers: list[str], votes: list[float], order: Any) -> None:
    judge = Reader(dict(zip(("red", "blue", "pink"), votes, strict=True)))
    places = list(range(len(answers)))
    order.shuffle(places)
    one = Agreement().score([asked("a", *answers)], judge)  # type: ignore[arg-type]
    other = Agreement().score([asked("a", *(answers[i] for i in places))], judge)  # type: ignore[arg-type]
    assert torch.equal(one.values[0, places].nan_to_num(-1), other.values[0].nan_to_num(-1))
    assert {(0, g): one.failures[0, i] for g, i in enumerate(places) if (0, i) in one.failures} == other.failures


def test_ties_minorities_and_empty_answers_are_masked() -> None:
    groups = [
        asked("tie", "red", "blue", "red", "blue"),
        asked("few", "green", "green", "cyan", "pink"),
        asked("hole", "red", "", "red", "pink"),
    ]
    scores = voted(groups, {"red": 0.4, "blue": 0.4, "green": 0.3, "cyan": 0.2, "pink": 0.1}, least=0.6)
    assert {cell: reason for cell, reason in scores.failures.items() if cell[0] < 2} == {
        (p, g): "the group has no majority" for p in (0, 1) for g in range(4)
    }
    assert scores.failures[2, 1] == "the answer is empty"
    assert scores.values[2, [0, 2, 3]].tolist() == [1, 1, 0]


def table_of(groups: Sequence[Group], votes: dict[str, float], parts: int = 1, **options: Any) -> RewardTable:
    """Scores of all groups, of which each of ``parts`` processes has a part."""
    config = RewardConfig(name="agreement", clip=options.pop("clip", None))
    source, judge = ConfiguredReward(config, Agreement(**options)), cast("Any", Reader(votes))
    if parts == 1:
        return score_groups([source], groups, judge)
    own = [(rows, [groups[p] for p in rows]) for rows in (range(k, len(groups), parts) for k in range(parts))]
    table = join_tables([(rows, score_groups_unchecked([source], some, judge)) for rows, some in own], groups)
    return mask_batch_failures([source], [group.prompt for group in groups], complete_texts(groups), table)


@pytest.mark.parametrize("parts", [1, 3])
def test_one_answer_to_every_question_is_a_collapse(parts: int) -> None:
    same = [asked(f"s{i}", "no", "no", "no", "yes", category="exists") for i in range(8)]
    varied = [asked(f"v{i}", word, word, "red", word) for i, word in enumerate(("blue", "pink", "green", "cyan") * 2)]
    judge = {"no": 0.8, "yes": 0.1, "red": 0.1, **dict.fromkeys(("blue", "pink", "green", "cyan"), 0.6)}
    table = table_of([*same, *varied], judge, parts)
    assert set(table.reasons) == {(p, g, 0) for p in range(8) for g in range(4)}
    assert table.reasons[0, 0, 0] == "failed: agreement collapsed: the majorities of exists are all alike"
    assert not table.mask[:8].any()
    assert not table.scores[:8].any()
    assert table.mask[8:].all()
    assert table.scores[8, :, 0].tolist() == [1, 1, 0, 1]
    clipped = table_of([*same, *varied], judge, parts, clip=(0.2, 0.8))
    assert clipped.reasons == table.reasons
    assert not table_of(same, judge, parts, entropy_floor=0).reasons
    assert not table_of(same, judge, parts, floor_groups=9).reasons


# --- description and comparison back ---


class Describer:
    """Describes an image by its level."""

    def __init__(self, words: dict[float, list[str]]) -> None:
        self.words = words
        self.temperatures: set[float] = set()

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        self.temperatures.add(sampling.temperature)
        assert len(set(seeds)) == len(prompts)
        out = []
        for prompt in prompts:
            image = prompt.parts[0]
            assert isinstance(image, torch.Tensor)
            out.append(offline_group(prompt, [[text] for text in self.words[round(float(image.mean()), 2)]]))
        return out


def test_the_description_is_compared_with_the_prompt() -> None:
    prompt = Prompt("d", "generate", ("draw a red cat and a blue dog",), ("image",))
    outputs = [[torch.full((3, 4, 4), level)] for level in (0.1, 0.5, 0.9)]
    judge = Describer({0.1: ["a blue dog and a red cat"], 0.5: ["a red dog"], 0.9: [" "]})
    scores = CaptionBack().score([offline_group(prompt, outputs)], judge)  # type: ignore[arg-type]
    assert scores.values[0, :2].tolist() == pytest.approx([1, 2 * 2 / (2 + 4)])
    assert scores.failures == {(0, 2): "the judge described nothing"}
    assert judge.temperatures == {0.0}
    assert CaptionBack().applies(prompt)
    assert not CaptionBack().applies(replace(prompt, parts=("draw a picture",)))
    assert not CaptionBack().applies(replace(prompt, output=("text", "image")))


WORDS = st.lists(st.sampled_from("abcd")).map(Counter)


@given(WORDS, WORDS)
def test_word_f1_is_a_symmetric_share(one: Counter[str], two: Counter[str]) -> None:
    f1 = word_f1(one, two)
    assert f1 == word_f1(two, one)
    assert 0 <= f1 <= 1
    assert (f1 == 1) == (one == two and bool(one))


# --- edits ---

SOURCE = torch.zeros(3, 16, 16)
EDIT = Prompt("e", "edit", (SOURCE, "make it red"), ("image",))


def edited(*patches: tuple[int, int], by: float = 0.2) -> torch.Tensor:
    result = SOURCE.clone()
    for row, col in patches:
        result[:, 8 * row : 8 * row + 8, 8 * col : 8 * col + 8] += by
    return result


@pytest.mark.filterwarnings("ignore:edit_consistency")
def test_an_edit_keeps_the_rest_by_hand() -> None:
    outputs = [[SOURCE.clone()], [edited((0, 0))], [edited((0, 0), by=0.05)], [edited((0, 0), (1, 1))]]
    scores = EditConsistency().score([offline_group(EDIT, outputs)], None)  # type: ignore[arg-type]
    assert scores.values[0].tolist() == pytest.approx([0, 1, 0.5, math.exp(-0.2 / 3 / 0.1)])


@given(st.floats(0.01, 0.5))
def test_more_damage_never_scores_higher(damage: float) -> None:
    reward = EditConsistency()
    clean, hurt = edited((0, 0), by=0.9), edited((0, 0), by=0.9)
    hurt[:, 8:, 8:] += damage
    assert reward.pixel_score(SOURCE, hurt) < reward.pixel_score(SOURCE, clean)


@pytest.mark.filterwarnings("ignore:edit_consistency")
def test_a_result_of_another_size_is_masked() -> None:
    scores = EditConsistency().score([offline_group(EDIT, [[torch.zeros(3, 8, 8)]])], None)  # type: ignore[arg-type]
    assert scores.failures == {(0, 0): "an image of (3, 8, 8) for a source of (3, 16, 16)"}
    assert EditConsistency().applies(EDIT)
    assert not EditConsistency().applies(replace(EDIT, task="generate"))
    assert not EditConsistency().applies(replace(EDIT, parts=("make it red",)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("agreement", {"vote": "judge"}, "options.vote: unknown key"),
        ("agreement", {"least": 0}, "options.least=0: must be > 0"),
        ("agreement", {"entropy_floor": 2}, "options.entropy_floor=2: must be <= 1"),
        ("agreement", {"floor_groups": 1}, "options.floor_groups=1: must be >= 2"),
        ("caption_back", {"samples": 2}, "options.samples=2: was removed: one greedy description is compared"),
        ("edit_consistency", {"edited": 1}, "options.edited=1: must be < 1"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name=name, options=options)])
