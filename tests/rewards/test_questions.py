from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.rewards.base import judge_fingerprint, override_fingerprint
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.rewards.questions import QuestionConfig, QuestionGenerator, kind_of, parse_questions
from lvrpo.rewards.self_vqa import SelfVQA
from lvrpo.rewards.table import build_rewards
from lvrpo.types import Fact, Group, Image, Prompt, TextSegment, Trajectory

CUBE = Prompt("cube", "generate", ("a red cube beside three birds",), ("image",))
WRITTEN = "is there a red cube? yes\nhow many birds are there? 3"


class Writer:
    """A policy that writes what it is told, and answers by a table as the fake judge does."""

    identity = "1"

    def __init__(self, says: str, ended: bool = True, table: dict[tuple[str, str], float] | None = None) -> None:
        self.says, self.ended, self.table = says, ended, table or {}
        self.asked: list[Prompt] = []

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        self.asked += prompts
        assert (sampling.group_size, sampling.temperature, len(seeds)) == (1, 0.0, len(prompts))
        segment = TextSegment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 0.0, self.says, self.ended)
        return [Group(p, (Trajectory(p, 0, (segment,), seed=0),)) for p in prompts]

    def text_logprob(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        rows = zip(contexts, texts, strict=True)
        return torch.tensor([self.table[context[-1], text] for context, text in rows]).log()


def generator(tmp_path: Path, **options: Any) -> QuestionGenerator:
    return QuestionGenerator(QuestionConfig.model_validate({"cache": str(tmp_path / "cache")} | options))


def image(level: float) -> Image:
    return torch.full((3, 8, 8), level)


def test_questions_are_read_from_lines() -> None:
    text = """Here are the questions:
1. Is there a red cube? Yes
- how many birds are there? 3.
**Q3:** What color is the cube? **A:** Red
Q: is the bird left of the cube?
A: no
* What is written on the sign? "OPEN LATE"
Is it nice? I would say that this really depends on taste.
is there a red cube?
how many? , .
What color is the cube? red
are they two? yes
are they two? no
Done! yes"""
    assert parse_questions(text) == [
        ("Is there a red cube?", "yes"),
        ("how many birds are there?", "3"),
        ("What color is the cube?", "red"),
        ("is the bird left of the cube?", "no"),
        ("What is written on the sign?", "open late"),
    ]
    assert parse_questions("no question in it") == parse_questions("") == []


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("How many birds are there?", "count"),
        ("what colour is it?", "color"),
        ("is the bird left of the cube?", "position"),
        ("What does the sign say?", "text"),
        ("is there a red cube?", "exists"),
        ("what animal is it?", "question"),
    ],
)
def test_kinds_are_those_of_a_gate(question: str, kind: str) -> None:
    assert kind_of(question) == kind


def test_the_policy_splits_a_prompt_once(tmp_path: Path) -> None:
    writer = Writer("<think>hm? yes</think>" + WRITTEN)
    expected = (Fact("exists", "is there a red cube?", "yes"), Fact("count", "how many birds are there?", "3"))
    assert generator(tmp_path, template="split {prompt} {x}").questions([CUBE, CUBE], writer) == [expected] * 2
    (asked,) = writer.asked
    assert asked.parts == ("split a red cube beside three birds {x}",)
    assert asked.output == ("text",)
    again = Writer("")
    assert generator(tmp_path, template="split {prompt} {x}").questions([CUBE], again) == [expected]
    assert not again.asked


def test_what_is_kept_belongs_to_prompt_template_and_writer(tmp_path: Path) -> None:
    generator(tmp_path).questions([CUBE], Writer(WRITTEN))
    other_weights, other_prompt = Writer(WRITTEN), Prompt("cube", "generate", ("a blue cube",), ("image",))
    other_weights.identity = "2"
    edit = Prompt("cube", "edit", (image(0), *CUBE.parts), ("image",))
    for options, writer, prompt in (
        ({}, other_weights, CUBE),
        ({}, Writer(WRITTEN), other_prompt),
        ({}, Writer(WRITTEN), edit),
        ({"template": "{prompt}"}, Writer(WRITTEN), CUBE),
        ({"max_new_tokens": 9}, Writer(WRITTEN), CUBE),
    ):
        generator(tmp_path, **options).questions([prompt], writer)
        assert len(writer.asked) == 1
    writer = Writer(WRITTEN)
    assert generator(tmp_path, limit=1).questions([CUBE], writer)[0] == (Fact("exists", "is there a red cube?", "yes"),)
    assert not writer.asked


def test_what_other_weights_write_in_the_place_of_the_judge_is_not_kept(tmp_path: Path) -> None:
    """As where judge drift is measured: the judge could write no questions, the trained weights can."""
    judge, trained = Writer("nothing to ask"), Writer(WRITTEN)
    (failed,) = generator(tmp_path).questions([CUBE], judge)
    with override_fingerprint(judge_fingerprint(judge)):
        assert len(generator(tmp_path).questions([CUBE], trained)[0]) == 2
    assert generator(tmp_path).questions([CUBE], judge) == [failed]


@pytest.mark.parametrize(
    ("says", "ended", "reason"),
    [
        (WRITTEN, False, "no questions: the questions were cut off at 512 tokens"),
        (" ", True, "no questions: nothing was written"),
        ("red\nred red", True, 'no questions: none can be read in "red red red"'),
    ],
)
def test_a_split_that_failed_is_told_and_tried_again(says: str, ended: bool, reason: str, tmp_path: Path) -> None:
    assert generator(tmp_path).questions([CUBE], Writer(says, ended)) == [NoAnswer(reason)]
    assert len(generator(tmp_path).questions([CUBE], Writer(WRITTEN))[0]) == 2


def test_an_endpoint_splits_a_prompt_once(tmp_path: Path, server: Any) -> None:
    server.replies = [(503, ""), WRITTEN]
    options = {"by": "endpoint", "endpoint": server.options()}
    nobody = Writer("")
    found = generator(tmp_path, **options).questions([CUBE], nobody)
    assert len(server.bodies) == 2
    assert "a red cube beside three birds" in server.bodies[0]["messages"][0]["content"][0]["text"]
    assert generator(tmp_path, **options).questions([CUBE], nobody) == found
    assert len(server.bodies) == 2
    named = f"questions by judge-1 at {server.url}, temperature 0.0, 256 tokens"
    assert SelfVQA(questions=options).judged_by == named
    generator(tmp_path, by="endpoint", endpoint=server.options(model="judge-2")).questions([CUBE], nobody)
    assert len(server.bodies) == 3
    assert not nobody.asked


def test_no_key_is_kept(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "hidden-word")
    server.replies = [WRITTEN]
    options = {"by": "endpoint", "endpoint": server.options(key_env="JUDGE_KEY")}
    generator(tmp_path, **options).questions([CUBE], Writer(""))
    assert server.keys == ["Bearer hidden-word"]
    kept = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(kept) == 1
    assert "hidden-word" not in kept[0]


def test_self_vqa_judges_free_text_in_both_orders(group: Callable[..., Group], tmp_path: Path) -> None:
    table = {
        ("is there a red cube? Answer yes or no.", "yes"): 0.6,
        ("is there a red cube? Answer yes or no.", "no"): 0.2,
        ("is there a red cube? Answer no or yes.", "yes"): 0.1,
        ("is there a red cube? Answer no or yes.", "no"): 0.3,
        ("how many birds are there?", "3"): 0.8,
        ("dark?", "deep"): 0.25,
    }
    reward = SelfVQA(questions={"cache": str(tmp_path)})
    known = Prompt("b", "generate", ("x",), ("image",), facts=(Fact("question", "dark?", "deep"),))
    assert reward.applies(CUBE)
    groups = [group(CUBE, [[image(0.5)]]), group(known, [[image(0.5)]])]
    scores = reward.score(groups, Writer(WRITTEN, table=table))
    assert not scores.failures
    assert scores.values.flatten().tolist() == pytest.approx([((0.75 + 0.25) / 2 + 0.8) / 2, 0.25])
    assert not SelfVQA().applies(CUBE)
    assert not reward.applies(Prompt("c", "understand", (image(0), "what ?"), ("text",)))
    assert not reward.applies(Prompt("c", "generate", (" ",), ("image",)))


def test_a_prompt_without_questions_is_masked_alone(group: Callable[..., Group], tmp_path: Path) -> None:
    known = Prompt("b", "generate", ("x",), ("image",), facts=(Fact("question", "dark?", "deep"),))
    groups = [group(CUBE, [[image(0.5)]] * 2), group(known, [[image(0.5)]] * 2)]
    scores = SelfVQA(questions={"cache": str(tmp_path)}).score(groups, Writer("?", table={("dark?", "deep"): 0.25}))
    assert scores.values[1].tolist() == [0.25, 0.25]
    assert scores.values[0].isnan().all()
    assert scores.failures == {(0, g): 'no questions: none can be read in "?"' for g in range(2)}


def test_only_questions_of_the_named_kinds_are_asked(group: Callable[..., Group], tmp_path: Path) -> None:
    writer = Writer(WRITTEN, table={("how many birds are there?", "3"): 0.8})
    groups = [group(CUBE, [[image(0.5)]])]
    options = {"cache": str(tmp_path / "cache")}
    scores = SelfVQA(kinds=["count"], questions=options).score(groups, writer)
    assert scores.values.item() == pytest.approx(0.8)
    scores = SelfVQA(kinds=["digit"], questions=options).score(groups, writer)
    assert dict(scores.failures) == {(0, 0): "none of its questions is of a kind that is asked"}


def test_the_tiny_policy_writes_what_no_questions_can_be_read_in(group: Callable[..., Group], tmp_path: Path) -> None:
    sizes = MoTConfig(width=32, depth=1, heads=2, key_heads=2, mlp_width=32)
    config = TinyConfig(image_size=16, tower_width=16, transformer=sizes)
    policy: Policy = TinyPolicy.from_vocabulary(config, ("draw", "a", "red", "circle"))
    groups = [group(Prompt("p", "generate", ("draw a red circle",), ("image",)), [[torch.zeros(3, 16, 16)]])]
    for length in (6, 1):
        split = {"cache": str(tmp_path), "template": "{prompt}", "max_new_tokens": length}
        scores = SelfVQA(questions=split, choices="{question} {first} {second}").score(groups, policy)
        assert scores.failures[0, 0].startswith("no questions: ")
    with pytest.raises(InputError, match="not among the"):
        SelfVQA(questions={"cache": str(tmp_path)}).score(groups, policy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "split it"}, r"self_vqa.options.questions: template: must hold \{prompt\}"),
        ({"edit_template": ""}, "edit_template: must hold"),
        ({"by": "endpoint"}, "belong together"),
        ({"endpoint": {"base_url": "http://x/v1", "model": "m"}}, "belong together"),
        ({"by": "polcy"}, "self_vqa.options.questions.by=.*did you mean policy"),
        (
            {"by": "endpoint", "endpoint": {"base_url": "http://x/v1"}},
            "self_vqa.options.questions.endpoint.model: is missing",
        ),
        ({"tempalte": "x"}, "self_vqa.options.questions.tempalte: unknown key: did you mean questions.template"),
        ("policy", "must be a section"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        build_rewards([RewardConfig(name="self_vqa", options={"questions": options})])
    assert "\n" not in str(caught.value)


def test_the_file_holds_what_was_written(tmp_path: Path) -> None:
    generator(tmp_path).questions([CUBE], Writer(WRITTEN))
    (path,) = (p for p in tmp_path.rglob("*.json"))
    assert json.loads(path.read_text())["text"] == WRITTEN
