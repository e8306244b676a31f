from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.data.scenes import ScenePrompts
from lvrpo.errors import InputError
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.published import Instruction, Knowledge, follows_rules, text_rules
from lvrpo.rewards.table import build_rewards
from lvrpo.types import Fact, Group, Image, Prompt, TextSegment

COUNT, COLOR = Fact("count", "how many ?", "3"), Fact("color", "color ?", "red")
DRAW = Prompt("d", "generate", ("three red birds",), ("image",), facts=(COUNT, COLOR))
ASK = Prompt("q", "understand", (torch.full((3, 8, 8), 0.25), "what is it ?"), ("text",))


def image(level: float) -> Image:
    return torch.full((3, 8, 8), level)


TABLE = {
    (0.25, "how many ?", "3"): 0.9,
    (0.25, "color ?", "red"): 0.6,
    (0.75, "how many ?", "3"): 0.9,
    (0.75, "color ?", "red"): 0.4,
    (0.25, "what is it ?", "bird"): 0.3,
}


def test_a_drawing_keeps_to_all_constraints_or_not(group: Callable[..., Group], judge: Callable[..., Any]) -> None:
    groups = [group(DRAW, [[image(0.25)], [image(0.75)]])]
    assert Instruction().score(groups, judge(TABLE)).values.tolist() == [[1.0, 0.0]]
    assert Instruction(above=0.7).score(groups, judge(TABLE)).values.tolist() == [[0.0, 0.0]]
    assert Instruction(kinds=["count", "total"]).score(groups, judge(TABLE)).values.tolist() == [[1.0, 1.0]]
    assert not Instruction(kinds=["position"]).applies(DRAW)


def test_a_judge_without_an_answer_is_no_broken_constraint(
    group: Callable[..., Group], judge: Callable[..., Any]
) -> None:
    broken = judge(TABLE | {(0.25, "color ?", "red"): math.nan})
    scores = Instruction().score([group(DRAW, [[image(0.25)], [image(0.75)], [image(math.nan)]])], broken)
    assert scores.values[0].isnan().tolist() == [True, False, True]
    assert scores.failures == {
        (0, 0): "the judge gave nan for a log-prob",
        (0, 2): "the image holds values that are no numbers",
    }


def test_the_verifier_checks_the_chosen_kinds(group: Callable[..., Group], judge: Callable[..., Any]) -> None:
    source = ScenePrompts(split="test")
    example = next(source.example("generate", i) for i in range(50) if len(source.prompt("generate", i).facts) > 1)
    right = example.outputs[0]
    blank = torch.ones_like(right)
    reward = Instruction(by="verifier")
    assert reward.applies(example.prompt)
    scores = reward.score([group(example.prompt, [[right], [blank], [right * math.nan]])], judge({}))
    assert scores.values[0, :2].tolist() == [1.0, 0.0]
    assert scores.failures == {(0, 2): "the image holds values that are no numbers"}
    kind = example.prompt.facts[0].kind
    assert Instruction(by="verifier", kinds=[kind]).applies(example.prompt)
    assert not Instruction(by="verifier", kinds=["unheard"]).applies(example.prompt)
    assert not reward.applies(DRAW)


@pytest.mark.parametrize(
    ("text", "rules", "kept"),
    [
        ("one two three", {"max_words": 3, "min_words": 3}, True),
        ("one two three", {"max_words": 2}, False),
        ("one two", {"min_words": 3}, False),
        ("\\boxed{3}", {"form": "boxed"}, True),
        ("3", {"form": "boxed"}, False),
        ("a\nb", {"form": "a.b"}, True),
        ("a b c", {"form": "a.b"}, False),
        ("A Red   cube.", {"include": ["red cube"]}, True),
        ("a reddish cube", {"include": ["red"]}, False),
        ("it is c++ (new)", {"include": ["C++", "(new)"]}, True),
        ("a red cube", {"include": ["red"], "exclude": ["cube"]}, False),
        ("", {}, True),
    ],
)
def test_rules_of_texts(text: str, rules: dict[str, Any], kept: bool) -> None:
    assert follows_rules(text, text_rules(rules, "rules")) == kept


def test_a_text_keeps_to_the_rules_of_the_run_and_of_its_row(
    group: Callable[..., Group], judge: Callable[..., Any]
) -> None:
    own = replace(ASK, id="own", rules={"max_words": 3, "include": ["bird"]})
    reward = Instruction(rules={"max_words": 1})
    groups = [group(ASK, [["bird"], ["a bird"]]), group(own, [["a bird"], ["a red cube"]])]
    assert reward.score(groups, judge({})).values.tolist() == [[1, 0], [1, 0]]
    assert Instruction().applies(own)
    assert not Instruction().applies(ASK)
    with pytest.raises(InputError, match=r"prompt 'own': rules.most: unknown rule: the rules are min_words, max_words"):
        reward.score([group(replace(own, rules={"most": 3}), [["a"]])], judge({}))


def test_drawings_and_texts_of_one_step(group: Callable[..., Group], judge: Callable[..., Any]) -> None:
    groups = [group(ASK, [["a bird"], [" "]]), group(DRAW, [[image(0.25)], [image(0.75)]])]
    scores = Instruction(rules={"min_words": 1}).score(groups, judge(TABLE))
    assert scores.values.tolist() == [[1, 0], [1, 0]]


def cut_off(group: Group) -> Group:
    def cut(segment: Any) -> Any:
        return replace(segment, ended=False) if isinstance(segment, TextSegment) else segment

    return Group(group.prompt, tuple(replace(t, segments=tuple(map(cut, t.segments))) for t in group.trajectories))


def test_a_text_that_was_cut_off_is_masked(group: Callable[..., Group], judge: Callable[..., Any]) -> None:
    groups = [cut_off(group(ASK, [["bird"]]))]
    reason = "the text was cut off at the length limit"
    assert dict(Instruction(rules={"max_words": 1}).score(groups, judge({})).failures) == {(0, 0): reason}
    assert Instruction(rules={"max_words": 1}, cut_off="score").score(groups, judge({})).values.item() == 1
    assert dict(Knowledge().score(groups, judge(TABLE)).failures) == {(0, 0): reason}


def test_knowledge_is_the_confidence_of_the_reader(group: Callable[..., Group], judge: Callable[..., Any]) -> None:
    groups = [group(ASK, [["bird"], [""]]), group(DRAW, [[image(0.25)], [image(0.75)]])]
    scores = Knowledge().score(groups, judge(TABLE))
    assert scores.values[0, 0] == pytest.approx(0.3)
    assert scores.values[1].tolist() == pytest.approx([0.75, 0.65])
    assert scores.failures == {(0, 1): "the answer is empty"}
    reward = Knowledge()
    assert reward.applies(ASK)
    assert reward.applies(DRAW)
    assert not reward.applies(replace(DRAW, facts=()))
    assert not reward.applies(Prompt("t", "reason", ("1 + 1",), ("text",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "eye"}, "options.by=eye: must be 'vqa' or 'verifier'"),
        ({"by": "verifier", "questions": {}}, "asks no questions"),
        ({"above": 1}, "options.above=1: must be < 1"),
        ({"kinds": "count"}, "options.kinds=count: must be a list"),
        ({"rules": {"words": 3}}, "options: rules.words: unknown rule: the rules are min_words, max_words, form"),
        ({"rules": {"max_words": 0}}, "options: rules.max_words: Input should be greater"),
        ({"rules": {"max_words": 1, "min_words": 2}}, "options: rules: min_words=2 is above max_words=1"),
        ({"rules": {"form": "("}}, "is no regular expression"),
        ({"rules": {"include": [" "]}}, "one is blank"),
        ({"cut_off": "drop"}, "options.cut_off=drop: must be 'mask' or 'score'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_rewards([RewardConfig(name="instruction", options=options)])
    assert "\n" not in str(caught.value)


def test_rules_come_from_rows(tmp_path: Path) -> None:
    from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts

    path = tmp_path / "rows.jsonl"
    path.write_text('{"task": "reason", "prompt": "why?", "rules": {"max_words": 5, "include": ["so"]}}\n')
    (prompt,) = JsonlPrompts(JsonlConfig(train=path)).prompts("reason", 1)
    assert prompt.rules == {"max_words": 5, "include": ["so"]}
    for row, message in (
        ('{"task": "reason", "prompt": "x", "rules": {"max_wrds": 5}}', "unknown field 'rules.max_wrds': did you mean"),
        ('{"task": "reason", "prompt": "x", "rules": {"max_words": 0}}', "field 'rules.max_words' is 0"),
        ('{"task": "reason", "prompt": "x", "rules": {"form": "("}}', "is no regular expression"),
        ('{"task": "generate", "prompt": "x", "rules": {"max_words": 5}}', "field 'rules' is about texts"),
    ):
        path.write_text(row)
        with pytest.raises(InputError, match=message):
            JsonlPrompts(JsonlConfig(train=path))
