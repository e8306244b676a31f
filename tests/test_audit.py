"""``lvrpo audit`` as a user meets it: from a run with rewards of known shares to the table and the page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lvrpo.cli import main

Output = pytest.CaptureFixture[str]

REWARDS = """
import torch
from lvrpo.rewards.base import Scores

class ByMember:
    def __init__(self, low, high, of):
        self.low, self.high, self.of = low, high, of

    def applies(self, prompt):
        return True

    def score(self, groups, judge):
        ones = [[(t.member // 2 if self.of == "pair" else t.member % 2) for t in g.trajectories] for g in groups]
        return Scores(self.low + (self.high - self.low) * torch.tensor(ones))

class LaterAway(ByMember):
    calls = 0

    def score(self, groups, judge):
        self.calls += 1
        away = {(p, 0): "away" for p in range(len(groups))} if self.calls > 1 else {}
        return Scores(super().score(groups, judge).values, away)
"""
BINARY = "{name: 'audited:ByMember', label: binary, options: {low: 0.0, high: 1.0, of: pair}}"
CONTINUOUS = "{name: 'audited:ByMember', label: continuous, options: {low: 0.30, high: 0.31, of: one}}"
WATCHED = "{name: 'audited:ByMember', label: watched, weight: 0, options: {low: 1.0, high: 0.0, of: one}}"
SMALL = (
    "steps=3",
    "device=cpu",
    "data.prompts_per_step={generate: 4, understand: 4, edit: 0, reason: 0}",
    "rollout={group_size: 4, num_steps: 3}",
    "validation={every: 2, prompts: {generate: 2, understand: 4}}",
    "reference_eval_every=2",
)


@pytest.fixture(scope="module")
def trained(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Call it with rewards, a name and changes: a finished run."""
    folder = tmp_path_factory.mktemp("audited")
    (folder / "audited.py").write_text(REWARDS)

    def train(rewards: list[str], name: str, *changes: str, code: int = 0) -> Path:
        given = [f"policy={small_base}", f"rewards=[{', '.join(rewards)}]", "allow_code=[audited]", *SMALL, *changes]
        assert main(["train", "quickstart", *given, "--out", str(folder / name), "--no-evaluate"]) == code
        return folder / name

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield train


@pytest.fixture(scope="module")
def gdpo(trained: Any) -> Path:
    """A run of three rewards. Never change it."""
    return trained([BINARY, CONTINUOUS, WATCHED], "gdpo", "advantages={kind: gdpo, std_floor: 0.0001}")


@pytest.fixture
def run(gdpo: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(gdpo, "run"))


def audit(run: Path, capfd: Output) -> tuple[dict[str, Any], str]:
    capfd.readouterr()
    assert main(["audit", str(run), "--json", f"{run.name}.json"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    return json.loads(Path(f"{run.name}.json").read_text()), output.out


def shares(audit: dict[str, Any], task: str, key: str) -> dict[str, float]:
    return {s["name"]: s[key] for s in audit["tasks"][task]["scorers"] if s[key] is not None}


def test_a_binary_and_a_continuous_reward_under_both_formulas(trained: Any, gdpo: Path, capfd: Output) -> None:
    """Under gdpo each causes its configured share within 10 %; summed, the continuous one causes under 5 %."""
    summed = trained([BINARY, CONTINUOUS], "summed", "advantages={kind: grpo, std_floor: 0.0001}")
    (of_gdpo, printed), (of_sum, _) = audit(gdpo, capfd), audit(summed, capfd)
    for task in ("understand", "generate"):
        assert shares(of_gdpo, task, "configured_share") == {"binary": 0.5, "continuous": 0.5}
        for found, key in ((of_gdpo, "share"), (of_sum, "other_share")):
            assert shares(found, task, key) == pytest.approx({"binary": 0.5, "continuous": 0.5}, rel=0.1)
        for found, key in ((of_sum, "share"), (of_gdpo, "other_share")):
            assert shares(found, task, key)["continuous"] < 0.05
        assert of_gdpo["tasks"][task]["with_signal"] == 1.0
        watched = next(s for s in of_gdpo["tasks"][task]["scorers"] if s["name"] == "watched")
        assert watched["correlations"]["continuous"]["value"] == pytest.approx(-1)
    assert (of_gdpo["formula"], of_sum["formula"]) == ("gdpo", "grpo")
    assert (of_gdpo["recorded"], of_gdpo["steps"]) == (3, {"first": 1, "last": 3})
    lines = printed.splitlines()
    assert lines[0] == f"{gdpo}: steps 1 to 3, all on record; advantages: gdpo"
    assert any(line.split()[:5] == ["binary", "1", ".51", ".50", "1.00"] for line in lines)
    assert any(line.split()[:3] == ["watched", "held", "out"] for line in lines)
    assert "Questions: correlation inside groups" in printed
    assert "tokens written" in printed
    assert "\x1b[" not in printed


def test_a_reward_that_fails_is_shown_as_missing(trained: Any, capfd: Output) -> None:
    """It answers while the contract looks, and then loses one member of four."""
    away = BINARY.replace("ByMember", "LaterAway")
    run = trained([CONTINUOUS, away], "run", "advantages.std_floor=0.0001", code=3)  # done, and not well
    found, printed = audit(run, capfd)
    assert shares(found, "generate", "missing") == {"continuous": 0, "binary": 0.25, "success": 0}
    assert any(line.split()[:2] == ["binary", "1"] and line.split()[-1] == ".25" for line in printed.splitlines())
    assert "alarm: generate: 25% of the scores of binary failed in steps 1 to 3, 10% may" in printed


def test_the_page_of_a_run_shows_its_audit(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    for words in (
        'id="audit"',
        "What the rewards did",
        "Generation: continuous",
        "Steps 1 to 3, all on record",
        "if summed",
        "Whether rewards rank outputs as the truth does",
    ):
        assert words in page
    (run / "audit.json").unlink()
    (run / "report.html").unlink()
    assert main(["audit", str(run)]) == 0
    assert not (run / "audit.json").exists()
    assert main(["report", str(run)]) == 0
    assert (run / "audit.json").exists()
    assert 'id="audit"' in (run / "report.html").read_text(encoding="utf-8")


def test_a_run_that_goes_on_is_audited_too(run: Path, capfd: Output) -> None:
    for name in ("step_000003", "step_000002", "control_000003", "validation_000003"):
        (run / "scores" / f"{name}.npz").unlink()
    found, printed = audit(run, capfd)
    assert found["steps"] == {"first": 1, "last": 1}
    assert found["tasks"]["generate"]["scorers"][0]["mean"]["difference"]["score"] is None
    assert "alarm: no comparison: the run is too short" in printed
