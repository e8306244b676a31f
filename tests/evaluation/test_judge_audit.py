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
from lvrpo.errors import InputError
from lvrpo.evaluation.judge_audit import Scorer, audit_judge, mutual_scorers
from lvrpo.evaluation.judge_cases import JudgeCase, judge_cases
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.gate import read_gate
from lvrpo.rewards.given import given_group
from lvrpo.rewards.identity import judge_identity
from lvrpo.rewards.scene_facts import SceneFacts
from lvrpo.rewards.success import scorable, successes
from lvrpo.types import Group, Image, Prompt


@pytest.fixture(scope="module")
def cases() -> list[JudgeCase]:
    return judge_cases(4)


def test_cases_are_a_function_of_their_arguments(cases: list[JudgeCase]) -> None:
    again, other = judge_cases(4), judge_cases(4, seed=1)
    assert [(c.kind, c.error, c.cluster) for c in again] == [(c.kind, c.error, c.cluster) for c in cases]
    assert [said(c) for c in again] == [said(c) for c in cases]
    assert [said(c) for c in other] != [said(c) for c in cases]


def said(case: JudgeCase) -> tuple[str | None, ...]:
    return tuple(t.text for t in case.group.trajectories)


def test_every_kind_is_tried(cases: list[JudgeCase]) -> None:
    kinds = {(case.side, case.kind) for case in cases}
    assert {kind for side, kind in kinds if side == "draw"} == {*UNDERSTAND, "caption"}
    wanted = {"prompt", "instruction", "thought", "color", "exists", "total", "count", "position", "digit", "unchanged"}
    assert wanted <= {kind for side, kind in kinds if side == "read"}
    assert {"color", "shape", "missing", "extra", "binding", "position", "digit"} <= {
        case.error for case in cases if case.kind == "prompt"
    }


def test_right_is_right_and_wrong_is_wrong(cases: list[JudgeCase]) -> None:
    facts = [c.group for c in cases if c.group.prompt.facts]
    assert successes(facts) == [[1.0, 0.0]] * len(facts)
    answered = [c.group for c in cases if c.side == "draw" and scorable(c.group.prompt)]
    assert answered
    assert successes(answered) == [[1.0, 0.0]] * len(answered)
    for case in cases:
        right, wrong = case.group.trajectories
        assert right.text != wrong.text or not torch.equal(picture(right.image), picture(wrong.image))


def picture(image: Image | None) -> Image:
    assert image is not None
    return image


def test_the_verifier_as_a_judge_is_perfect_and_a_constant_is_at_chance(cases: list[JudgeCase]) -> None:
    class Constant:
        def applies(self, prompt: Prompt) -> bool:
            return True

        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            return Scores(torch.ones(len(groups), len(groups[0])))

    class Sometimes(Constant):
        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            values = torch.tensor([[1.0, math.nan if p % 2 else 0.0] for p in range(len(groups))])
            return Scores(values, {(0, 0): "asleep"})

    scorers = {"verifier": Scorer(SceneFacts()), "constant": Scorer(Constant()), "sometimes": Scorer(Sometimes())}
    audit = audit_judge(Blind(), cases, scorers)  # type: ignore[arg-type]  # nobody asks the judge
    assert audit.judge == "Blind"
    for row in audit.rows:
        if row.scorer != "sometimes":
            assert row.auc.score == (1.0 if row.scorer == "verifier" else 0.5)
            assert row.failed == 0
    captions = audit.find("sometimes", "draw", "caption")
    assert captions is not None
    assert captions.failed > 0
    assert captions.auc.n + captions.failed == sum(case.kind == "caption" for case in cases)
    gate = audit.gate({"read": "verifier", "draw": "constant"}, draws=4, threshold=0.6)
    assert gate.admits("read", "color")
    assert not gate.admits("draw", "color")
    assert not gate.admits("read", "unheard of")
    with pytest.raises(InputError, match="scorer 'verifier': judged nothing of side 'draw'"):
        audit.gate({"draw": "verifier"}, 4, 0.6)


class Blind:
    pass


def test_the_reading_side_is_tried_on_pictures_and_the_drawing_side_on_texts(cases: list[JudgeCase]) -> None:
    asked = []

    class Listener:
        def text_logprob(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
            asked.append("read")
            return torch.zeros(len(texts))

        def image_logprob(self, contexts: Sequence[Any], images: Any, draws: int, seeds: Any, **_: Any) -> torch.Tensor:
            asked.append(str(draws))
            return torch.zeros(len(contexts), draws)

    audit = audit_judge(Listener(), cases[:5] + cases[-5:], mutual_scorers([1, 3]))  # type: ignore[arg-type]
    assert asked == ["read", "1", "3"]
    assert {(row.scorer, row.side) for row in audit.rows} == {
        ("mutual", "read"),
        ("1 draw", "draw"),
        ("3 draws", "draw"),
    }


def test_given_groups_can_be_scored_only() -> None:
    group = given_group(Prompt("r", "reason", ("x",), ("text", "image")), [["7", torch.zeros(3, 8, 8)]])
    (member,) = group.trajectories
    assert member.text == "7"
    assert picture(member.image).shape == (3, 8, 8)


def test_the_command_writes_a_gate_that_the_reward_reads(small_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "audit",
        "--judge",
        str(small_base),
        "--n",
        "1",
        "--draws",
        "1",
        "--device",
        "cpu",
        "--also",
        "own_vqa",
    ]
    assert main([*arguments, "--gate", "gate.json", "--json", "all.json"]) == 0
    out = capfd.readouterr().out
    assert "reading side, of pictures: may reward" in out
    assert "reward own_vqa" in out
    gate = read_gate("gate.json")
    assert gate.judge == judge_identity(load_policy(small_base).frozen())
    assert (gate.draws, gate.threshold) == (1, 0.6)
    assert set(gate.measured["draw"]) == {*UNDERSTAND, "caption"}
    assert json.loads(Path("all.json").read_text())["rows"]
    assert main([*arguments, "--gate", "gate.json"]) == 2
    assert "gate.json: exists already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "RUN is missing: give a run directory, or --judge MODEL"),
        (["run", "--judge", "tiny"], "run: a run and --judge tiny: give one of the two"),
        (["run", "--gate", "x.json"], "--gate: belongs to --judge MODEL"),
        (["--judge", "tiny", "--draws", "4,1"], "4,1: write rising numbers"),
        (["--judge", "tiny", "--draws", "0"], "0: must be >= 1"),
        (["--judge", "tiny", "--times", ".9,.3"], "needs 0 < LOW < HIGH <= 1"),
        (["--judge", "tiny", "--times", "1"], "write LOW,HIGH"),
        (["--judge", "tiny", "--threshold", ".4"], "must be at least .5"),
        (["--judge", "tiny", "--also", "own_vqu"], "did you mean own_vqa?"),
        (["--judge", "tinny"], "did you mean tiny?"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
