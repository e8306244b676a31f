"""A model's own outputs against the truth: ``lvrpo audit --judge MODEL --samples MODEL``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.cli import main
from lvrpo.evaluation.sample_audit import REWARDS, VERIFIER_REWARD, audit_samples, sample_groups
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.base import Scores, offline_group
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import build_rewards
from lvrpo.types import Group, Prompt

Output = pytest.CaptureFixture[str]


class Length:
    """1 per character; the first output has no score, and one category none at all."""

    def applies(self, prompt: Prompt) -> bool:
        return prompt.category != "apart"

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        rows = [[float(len(t.text or "")) for t in group.trajectories] for group in groups]
        return Scores(torch.tensor(rows), {(0, 0): "away"})


def question(number: int, category: str, *texts: str) -> Group:
    prompt = Prompt(f"q{number}", "understand", (torch.zeros(3, 8, 8), "what ?"), ("text",), "red", (), category)
    return offline_group(prompt, [[text] for text in texts])


def test_scores_are_compared_with_the_truth() -> None:
    """Right is "red": in the first group it is the longest but one member has no score; in the second the shortest."""
    groups = [
        question(0, "color", "red", "a", "bb", "red"),
        question(1, "shape", "red", "green", "blue", "red"),
        question(2, "apart", "red", "a", "a", "red"),
    ]
    sources = [*build_rewards([VERIFIER_REWARD]), ConfiguredReward(RewardConfig(name="length"), Length())]
    audit = audit_samples(object(), object(), {"understand": groups}, sources)  # type: ignore[arg-type]
    found = audit.tasks["understand"]
    assert (found.groups, found.right) == (3, 0.5)
    assert found.missing == {"length": 1 / 8}
    (length,) = found.validity
    assert (length.name, length.verifier) == ("length", "success")
    assert {name: r.auc.score for name, r in length.categories.items()} == {"color": 1, "shape": 0}
    assert length.whole.auc.n == 2


def test_samples_are_a_function_of_policy_and_arguments(small_base: Path) -> None:
    policy = load_policy(small_base)
    assert policy.image_size is not None
    one, same, other = (sample_groups(policy, 1, seed, size=policy.image_size) for seed in (0, 0, 1))
    assert [len(groups) for groups in one.values()] == [6, 7, 5, 3]
    assert {len(group) for groups in one.values() for group in groups} == {8}
    assert "validation" in one["generate"][0].prompt.id

    def drawn(groups: dict[Any, list[Group]]) -> list[float]:
        return [float(t.image.sum()) for g in groups["generate"] for t in g.trajectories if t.image is not None]

    assert drawn(one) == drawn(same) != drawn(other)


def test_the_command_prints_and_writes_every_reward(small_base: Path, capfd: Output) -> None:
    counts = "{name: self_vqa, label: counts, options: {kinds: [count, total]}}"
    arguments = ["audit", "--judge", str(small_base), "--samples", str(small_base), "--n", "1", "--device", "cpu"]
    assert main([*arguments, "--also", f"[{counts}, self_vqa]", "--json", "samples.json"]) == 0
    out = capfd.readouterr().out
    assert "truth: scene_facts, success" in out
    found = json.loads(Path("samples.json").read_text())
    assert (found["n"], found["seed"], list(found["tasks"])) == (1, 0, ["understand", "generate", "edit", "reason"])
    drawings = [row["name"] for row in found["tasks"]["generate"]["validity"]]
    expected = {row.title for row in REWARDS} - {"agreement", "edit_consistency"} | {"counts"}
    assert set(drawings) == expected
    assert all(name in out for name in drawings)
    for row in found["tasks"]["generate"]["validity"]:
        assert row["whole"]["rank"]["n"] + row["whole"]["silent"] + row["whole"]["alike"] == 7
    assert main([*arguments, "--json", "samples.json"]) == 2
    assert "samples.json: exists already" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--samples", "tiny"], "--samples: belongs to --judge MODEL"),
        (["--judge", "tiny", "--also", "[{name: self_vqa"], "is not valid YAML: write NAME,NAME or '[{name: NAME"),
        (["--judge", "tiny", "--also", "[{label: x}]"], "--also[0].name: is missing"),
        (
            ["--judge", "tiny", "--also", "[self_vqa, {name: semantic, weight: 0}]"],
            "--also[1].weight: belongs to training",
        ),
        (["--judge", "tiny", "--also", "[3]"], "--also[0]: must be a section of 'key: value' lines"),
        (["--judge", "tiny", "--also", "[self_vqa, self_vqa]"], "two entries are called 'self_vqa'"),
        (["--judge", "tiny", "--also", "[{name: conservative_ensemble}]"], "was removed: give its members"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], message: str, capfd: Output) -> None:
    assert main(["audit", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
