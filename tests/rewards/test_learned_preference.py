from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.rewards.learned_preference import LearnedPreference
from lvrpo.rewards.preference_head import PreferenceHead
from lvrpo.rewards.table import RewardConfig, build_rewards
from lvrpo.types import Group, Parts, Prompt

ASK = Prompt("a", "understand", (torch.zeros(3, 8, 8), "what is it"), ("text",))


class Reader:
    """Features: length of the text, and 1."""

    def __init__(self, identity: str = "one") -> None:
        self.identity = identity
        self.read: list[tuple[Parts, str]] = []

    def text_states(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.read += zip(contexts, texts, strict=True)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])


def save(folder: str = "head", **changes: Any) -> str:
    values = {"weight": [2.0, 0.0], "mean": [3.0, 0.0], "deviation": [4.0, 1.0]}
    tensors = {name: torch.tensor(value) for name, value in values.items()}
    head = PreferenceHead(**{"policy": "Reader:one", **tensors, "tasks": ("understand",), "scale": 0.5, **changes})
    Path(folder).mkdir(exist_ok=True)
    head.save(Path(folder))
    return folder


def test_scores_are_log_odds_by_hand(group: Callable[..., Group]) -> None:
    """.5 * 2 * (length - 3) / 4."""
    reward, judge = LearnedPreference(save()), Reader()
    scores = reward.score([group(ASK, [["red"], [" a red cat "], [" "]])], judge)  # type: ignore[arg-type]
    assert scores.values[0, :2].tolist() == [0.0, 1.5]
    assert scores.failures == {(0, 2): "the answer is empty"}
    assert judge.read[1] == (ASK.parts, "a red cat")
    assert reward.judges == ("text",)


def test_another_judge_is_refused(group: Callable[..., Group]) -> None:
    reward = LearnedPreference(save())
    with pytest.raises(InputError, match=r"fitted on the features of Reader:one, but this run's judge is Reader:two"):
        reward.score([group(ASK, [["red"]])], Reader("two"))  # type: ignore[arg-type]


def test_a_folder_without_a_whole_head_is_one_line() -> None:
    with pytest.raises(InputError, match=r"head='nowhere': holds no config.json"):
        LearnedPreference("nowhere")
    with pytest.raises(InputError, match="options"):
        build_rewards([RewardConfig(name="learned_preference")])
    config = json.loads(Path(save("other"), "config.json").read_text())
    Path("other/config.json").write_text(json.dumps({**config, "features": "text_states/2"}))
    with pytest.raises(InputError, match="of features 'text_states/2', not"):
        LearnedPreference("other")
    Path(save("cut"), "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(InputError, match=r"cut/model\.safetensors: truncated or damaged .* make it with"):
        LearnedPreference("cut")
    with pytest.raises(InputError, match=r"config\.json: NaN is not JSON"):
        LearnedPreference(save("nan", scale=float("nan")))


def test_saved_and_read_it_is_the_same() -> None:
    head = PreferenceHead.load(save(measured={"pairs": 3}))
    assert (head.policy, head.scale, head.tasks, head.measured) == ("Reader:one", 0.5, ("understand",), {"pairs": 3})
    assert head.weight.tolist() == [2.0, 0.0]
