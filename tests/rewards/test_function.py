from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.registry import allow_code
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.function import reward
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.types import Group, Prompt, Trajectory

DRAW = Prompt("d", "generate", ("x",), ("image",))
ASK = Prompt("q", "understand", ("x",), ("text",))
SOURCE = """
from lvrpo.rewards.function import reward

@reward(outputs=["image"])
def brightness(trajectory, target=0.5):
    return -abs(float(trajectory.image.mean()) - target)
"""


@pytest.fixture
def module() -> Iterator[str]:
    """A user's module, by import path."""
    made = types.ModuleType("my_rewards")
    exec(SOURCE, made.__dict__)
    sys.modules["my_rewards"] = made
    allow_code(["my_rewards"])
    yield "my_rewards:brightness"
    del sys.modules["my_rewards"]


def test_a_function_is_a_reward_in_ten_lines(module: str) -> None:
    assert len(SOURCE.splitlines()) <= 10
    sources = build_rewards([RewardConfig(name=module, label="bright", options={"target": 0.75})])
    groups = [
        offline_group(DRAW, [[torch.full((3, 4, 4), v)] for v in (0.25, 0.75)]),
        offline_group(ASK, [["a"], ["b"]]),
    ]
    table = score_groups(sources, groups, None)  # type: ignore[arg-type]
    assert table.names == ("bright",)
    assert table.scores[0, :, 0].tolist() == [-0.5, 0]
    assert table.mask[..., 0].tolist() == [[True, True], [False, False]]


def test_a_wrong_option_is_named(module: str) -> None:
    with pytest.raises(InputError, match=r"options \(taget\): got an unexpected keyword argument 'taget'"):
        build_rewards([RewardConfig(name=module, options={"taget": 1})])


def test_none_and_exceptions_mask_one_output() -> None:
    @reward(outputs=["text"], tasks=["understand"])
    def odd(trajectory: Trajectory) -> Any:
        return {"a": 0.5, "b": None, "c": float("nan")}[str(trajectory.text)]

    built = odd()
    result = built.score([offline_group(ASK, [["a"], ["b"], ["d"]])], None)  # type: ignore[arg-type]
    assert float(result.values[0, 0]) == 0.5
    assert result.failures == {(0, 1): "the function gave no score", (0, 2): "KeyError: 'd'"}
    assert built.applies(ASK)
    assert not built.applies(DRAW)
    assert not built.applies(Prompt("r", "reason", ("x",), ("text",)))
    assert built.judges == ("text",)


@pytest.mark.parametrize(
    "arguments", [{"outputs": []}, {"outputs": ["sound"]}, {"outputs": ["text"], "tasks": ["play"]}]
)
def test_an_unknown_output_or_task_is_refused(arguments: Any) -> None:
    with pytest.raises(InputError, match=r"must be of (text and image|understand, generate)"):
        reward(**arguments)


def test_the_examples_of_the_guide_run(group: Callable[..., Group], root: Path) -> None:
    guide = (root / "docs" / "reference" / "rewards.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        names: dict[str, Any] = {}
        exec(block, names)
        found |= names
    groups = [group(DRAW, [[torch.full((3, 16, 16), 0.25)], [torch.rand(3, 16, 16)]])]
    flat, noisy = found["jpeg_size"]().score(groups, None).values[0]  # no policy judges
    assert noisy < flat < 0
    assert found["brightness"](target=0.5).score(groups, None).values[0, 0] == -0.25
