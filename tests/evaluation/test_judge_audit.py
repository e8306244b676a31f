from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.cli import main
from lvrpo.data.scenes.grammar import UNDERSTAND
from lvrpo.evaluation.judge_audit import REWARDS, MinimalPair, audit_judge, minimal_pairs
from lvrpo.rewards.base import Scores, offline_group
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.success import has_success, successes
from lvrpo.rewards.table import build_rewards
from lvrpo.rewards.verifiable_image import SceneFacts
from lvrpo.types import Group, Image, Prompt


@pytest.fixture(scope="module")
def cases() -> list[MinimalPair]:
    return minimal_pairs(4)


def test_cases_are_a_function_of_their_arguments(cases: list[MinimalPair]) -> None:
    again, other = minimal_pairs(4), minimal_pairs(4, seed=1)
    assert [(c.kind, c.error, c.cluster) for c in again] == [(c.kind, c.error, c.cluster) for c in cases]
    assert [said(c) for c in again] == [said(c) for c in cases]
    assert [said(c) for c in other] != [said(c) for c in cases]


def said(case: MinimalPair) -> tuple[str | None, ...]:
    return tuple(t.text for t in case.group.trajectories)


def test_every_kind_is_tried(cases: list[MinimalPair]) -> None:
    kinds = {(case.output, case.kind) for case in cases}
    assert {kind for output, kind in kinds if output == "text"} == {*UNDERSTAND, "caption"}
    wanted = {"prompt", "instruction", "thought", "color", "exists", "total", "count", "position", "digit", "unchanged"}
    assert wanted <= {kind for output, kind in kinds if output == "image"}
    assert {"color", "shape", "missing", "extra", "binding", "position", "digit"} <= {
        case.error for case in cases if case.kind == "prompt"
    }


def test_right_is_right_and_wrong_is_wrong(cases: list[MinimalPair]) -> None:
    facts = [c.group for c in cases if c.group.prompt.facts]
    assert successes(facts) == [[1.0, 0.0]] * len(facts)
    answered = [c.group for c in cases if c.output == "text" and has_success(c.group.prompt)]
    assert answered
    assert successes(answered) == [[1.0, 0.0]] * len(answered)
    for case in cases:
        right, wrong = case.group.trajectories
        assert right.text != wrong.text or not torch.equal(present(right.image), present(wrong.image))


def present(image: Image | None) -> Image:
    assert image is not None
    return image


def test_the_verifier_as_a_judge_is_perfect_and_a_constant_is_at_chance(cases: list[MinimalPair]) -> None:
    class Constant:
        def applies(self, prompt: Prompt) -> bool:
            return True

        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            return Scores(torch.ones(len(groups), len(groups[0])))

    class Sometimes(Constant):
        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            values = torch.tensor([[1.0, math.nan if p % 2 else 0.0] for p in range(len(groups))])
            return Scores(values, {(0, 0): "asleep"})

    made = {"verifier": SceneFacts(), "constant": Constant(), "sometimes": Sometimes()}
    sources = [ConfiguredReward(RewardConfig(name=name), reward) for name, reward in made.items()]
    audit = audit_judge(Blind(), cases, sources)  # type: ignore[arg-type]  # nobody asks the judge
    assert audit.judge == "Blind"
    for row in audit.rows:
        if row.reward != "sometimes":
            assert row.auc.score == (1.0 if row.reward == "verifier" else 0.5)
            assert row.failed == 0
    captions = audit.find("sometimes", "text", "caption")
    assert captions is not None
    assert captions.failed > 0
    assert captions.auc.n + captions.failed == sum(case.kind == "caption" for case in cases)


class Blind:
    pass


def test_a_judge_that_knows_the_right_texts_tells_them_all(cases: list[MinimalPair]) -> None:
    """Answers and captions are tried by how likely the judge finds them."""
    right = {(id(c.group.prompt.parts[0]), c.group.trajectories[0].text) for c in cases if c.kind == "caption"}

    class Knows:
        def text_logprob(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
            pairs = zip(contexts, texts, strict=True)
            return torch.tensor([-1.0 if (id(context[0]), text) in right else -2.0 for context, text in pairs])

    captions = [case for case in cases if case.kind == "caption"]
    audit = audit_judge(Knows(), captions, build_rewards(list(REWARDS)))  # type: ignore[arg-type]  # a double
    assert {row.reward for row in audit.rows} == {"knowledge"}
    assert {(row.output, row.auc.score) for row in audit.rows} == {("text", 1.0)}


def test_given_groups_can_be_scored_only() -> None:
    group = offline_group(Prompt("r", "reason", ("x",), ("text", "image")), [["7", torch.zeros(3, 8, 8)]])
    (member,) = group.trajectories
    assert member.text == "7"
    assert present(member.image).shape == (3, 8, 8)


def test_the_command_tries_every_reward(small_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "audit",
        "--judge",
        str(small_base),
        "--n",
        "1",
        "--device",
        "cpu",
        "--also",
        "[{name: self_vqa, label: plain}]",
    ]
    assert main([*arguments, "--json", "all.json"]) == 0
    out = capfd.readouterr().out
    assert "images with one fact corrupted" in out
    rows = json.loads(Path("all.json").read_text())["rows"]
    assert {row["reward"] for row in rows} == {"self_vqa", "edit_consistency", "caption_back", "knowledge", "plain"}
    assert {row["kind"] for row in rows if row["output"] == "text"} == {*UNDERSTAND, "caption"}
    assert all(name in out for name in ("self_vqa", "knowledge", "plain"))
    assert main([*arguments, "--json", "all.json"]) == 2
    assert "all.json: exists already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN is missing: give a run directory, or --judge MODEL"),
        (["run", "--judge", "tiny"], "run: a run and --judge tiny: give one of the two"),
        (["run", "--n", "3"], "--n: belongs to --judge MODEL"),
        (["--judge", "tiny", "--also", "self_vqu"], "did you mean self_vqa?"),
        (["--judge", "tinny"], "did you mean tiny?"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
