from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.cli import main
from lvrpo.data.scenes import ScenePrompts
from lvrpo.errors import InputError
from lvrpo.evaluation.preference_fit import FitSettings, calibration_error, fit_preference
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.given import given_group
from lvrpo.rewards.learned_preference import LearnedPreference
from lvrpo.rewards.preference_head import PreferenceHead


class Words:
    """A policy whose features are the counts of two words in the text."""

    image_size = None
    identity = "words"

    def text_states(self, contexts: Sequence[Any], texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([[text.split().count(word) for word in ("good", "bad")] for text in texts]).float()


def write(rows: Sequence[dict[str, Any]], name: str = "pairs.jsonl") -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def worded(n: int = 60) -> list[dict[str, Any]]:
    """Better is what says good more often; bad is drowned out by chance."""
    return [{"prompt": f"q{i}", "better": "good good", "worse": "good" + " bad" * (i % 2)} for i in range(n)]


def test_the_head_finds_the_word_that_decides() -> None:
    fit = fit_preference(Words(), write(worded()))  # type: ignore[arg-type]
    assert (fit.accuracy.score, fit.train_accuracy) == (1, 1)
    assert fit.accuracy.n == fit.prompts[1] == 60 - fit.prompts[0]
    weight = fit.head.weight / fit.head.deviation
    assert weight[0] > weight.abs()[1]
    assert fit.head.policy == "Words:words"
    assert fit.head.measured["held_out_accuracy"]["score"] == 1


def test_a_coin_is_told_at_chance_and_calibrated_to_it() -> None:
    """The first says good, and wins every other time: nothing can be known."""
    rows = worded(400)
    for row in rows[::2]:
        row["better"], row["worse"] = row["worse"], row["better"]
    path = write(
        [
            {**row, "worse": row["worse"].replace(" bad", ""), "better": row["better"].replace(" bad", "")}
            for row in rows
        ]
    )
    fit = fit_preference(Words(), path, FitSettings(calibrate=True))  # type: ignore[arg-type]
    assert fit.accuracy.low < 0.5 < fit.accuracy.high
    assert fit.log_loss == pytest.approx(0.693, abs=0.02)


def test_ties_pull_scores_together() -> None:
    """Three wins and one tie of four: p = 7/8 is the best guess, log 7 apart, but for the penalty."""
    rows = [{"prompt": f"q{i}", "better": "good", "worse": "well", "tie": i % 4 == 0} for i in range(400)]
    half = fit_preference(Words(), write(rows), FitSettings(l2=0, seed=1))  # type: ignore[arg-type]
    scores = half.head.score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert float(scores[0] - scores[1]) == pytest.approx(1.946, abs=0.15)
    dropped = fit_preference(Words(), write(rows), FitSettings(ties="drop", l2=1e-4))  # type: ignore[arg-type]
    scores = dropped.head.score(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert float(scores[0] - scores[1]) > 3
    assert (half.counts.ties, half.counts.pairs, dropped.counts.pairs) == (100, 400, 300)


def test_calibration_error_by_hand() -> None:
    """p = .75 on four pairs of which two come true: .25."""
    margin = torch.full((4,), 3.0).log()
    assert calibration_error(margin, torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert calibration_error(-margin, torch.tensor([0.0, 0.0, 0.0, 1.0])) == pytest.approx(0.0, abs=1e-6)


def test_too_few_prompts_and_no_features_are_one_line() -> None:
    same = [{"prompt": "q", "better": "good", "worse": "bad"} for _ in range(50)]
    with pytest.raises(InputError, match="of 1 prompts in all: give more prompts"):
        fit_preference(Words(), write(same))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="object gives no features of its reading side"):
        fit_preference(object(), write(worded()))  # type: ignore[arg-type]


def test_right_drawings_of_the_built_in_world_are_told_from_corrupted_ones() -> None:
    """As documented: lvrpo data pairs, lvrpo fit-preference, and the head as a reward."""
    assert main(["data", "pairs", "--out", "pairs", "--n", "15"]) == 0
    assert main(["fit-preference", "pairs", "--out", "head", "--calibrate"]) == 0
    head = PreferenceHead.load("head")
    accuracy = head.measured["held_out_accuracy"]
    assert accuracy["low"] > 0.8
    assert accuracy["n"] > 30
    assert head.policy in Path("head/README.md").read_text()
    assert f"{accuracy['score']:.3f}" in Path("head/README.md").read_text()
    reward, judge = LearnedPreference("head"), load_policy("tiny").frozen()
    assert reward.judges == ("image",)
    source = ScenePrompts(split="test")
    right, other = (source.example("generate", i) for i in (0, 1))
    assert reward.applies(right.prompt)
    assert not reward.applies(source.prompt("understand", 0))
    scores = reward.score([given_group(right.prompt, [right.outputs, other.outputs])], judge).values
    assert scores[0, 0] > scores[0, 1]


def test_a_prompt_that_the_model_cannot_read_is_a_row_that_cannot_be_used() -> None:
    main(["data", "pairs", "--out", "pairs", "--n", "3"])
    lines = Path("pairs/pairs.jsonl").read_text().splitlines()
    row = json.loads(lines[0])
    Path("pairs/pairs.jsonl").write_text("\n".join([json.dumps({**row, "prompt": "an astronaut"}), *lines[1:]]))
    judge = load_policy("tiny").frozen()
    fit = fit_preference(judge, Path("pairs"))
    assert len(fit.counts.broken) == 1
    assert "astronaut" in fit.counts.broken[0]
    assert fit.counts.pairs == len(lines) - 1
    with pytest.raises(InputError, match="in 'an astronaut'"):
        fit_preference(judge, Path("pairs"), FitSettings(max_broken=0))
