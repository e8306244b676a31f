from __future__ import annotations

import dataclasses
import functools
import math
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
from lvrpo.rewards.function import as_reward, reward
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.types import Group, Prompt, TextSegment, Trajectory

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


def test_a_function_of_all_outputs_is_called_once_with_lists() -> None:
    calls: list[int] = []

    def brightness(images: list[torch.Tensor], prompts: list[str], target: float = 0.5) -> torch.Tensor:
        calls.append(len(images))
        assert prompts == ["x"] * len(images)
        return -(torch.stack(images).mean(dim=(1, 2, 3)) - target).abs()

    built = reward(brightness)(target=0.75)
    assert (built.applies(DRAW), built.applies(ASK)) == (True, False)
    groups = [offline_group(DRAW, [[torch.full((3, 4, 4), v)] for v in row]) for row in ((0.25, 0.75), (math.nan, 1.0))]
    scores = built.score(groups, None)  # type: ignore[arg-type]
    assert calls == [3]
    assert scores.values[0].tolist() == [-0.5, 0]
    assert scores.values[1, 1] == -0.25
    assert scores.failures == {(1, 0): "the image holds values that are no numbers"}


def test_a_function_of_trl_gets_conversations_and_columns() -> None:
    def accuracy(completions: Any, solution: list[str], **kwargs: Any) -> list[float | None]:
        texts = [completion[0]["content"] for completion in completions]
        return [None if text == "?" else float(text == right) for text, right in zip(texts, solution, strict=True)]

    built = reward(accuracy)()
    assert built.judges == ("text",)
    asked = [dataclasses.replace(ASK, metadata=metadata) for metadata in ({"solution": "a"}, {"level": 1})]
    scores = built.score([offline_group(prompt, [["a"], ["b"], ["?"]]) for prompt in asked], None)  # type: ignore[arg-type]
    assert scores.values[0, :2].tolist() == [1, 0]
    assert scores.failures == {(0, 2): "the function gave no score"} | {
        (1, g): "its row has no value 'solution'" for g in range(3)
    }


def test_columns_reach_the_other_keyword_arguments() -> None:
    def level(texts: list[str], bonus: float = 1.0, **kwargs: Any) -> list[float]:
        assert set(kwargs) == {"level"}  # what the function names is an option
        return [bonus if found is None else found for found in kwargs["level"]]

    asked = [dataclasses.replace(ASK, metadata=metadata) for metadata in ({"level": 3.0, "bonus": 7}, {})]
    scores = reward(level)(bonus=2.0).score([offline_group(prompt, [["a"]]) for prompt in asked], None)  # type: ignore[arg-type]
    assert scores.values.tolist() == [[3.0], [2.0]]


def test_tokens_of_the_last_text_are_completion_ids() -> None:
    def longest(completion_ids: list[list[int]], limit: int = 2) -> list[float]:
        return [float(len(ids) - limit) for ids in completion_ids]

    segments = [TextSegment(torch.arange(n), torch.zeros(n), 1.0, "a", True) for n in (1, 4)]
    group = Group(ASK, tuple(Trajectory(ASK, i, (segment,), i) for i, segment in enumerate(segments)))
    assert reward(longest)(limit=3).score([group], None).values.tolist() == [[-2, 1]]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda texts: [1.0], "the function gave 1 scores for 2 outputs"),
        (lambda texts: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda texts: 1.0, "TypeError: 'float' object is not iterable"),
        (lambda texts: {"1": 1.0, "2": 0.5}, "the function gave a dict: return a list with a number for each output"),
        (lambda texts: {1.0, 0.5}, "the function gave a set: return a list with a number for each output"),
        (lambda texts: "12", "the function gave a str: return a list with a number for each output"),
        (lambda texts, prompts: ([1.0, 2.0], {}, {}), "the function gave 3 scores for 2 outputs"),
    ],
)
def test_a_failed_batch_masks_all_its_outputs(function: Callable[..., Any], reason: str) -> None:
    scores = reward(function)().score([offline_group(ASK, [["a"], ["b"]])], None)  # type: ignore[arg-type]
    assert scores.values.isnan().all()
    assert scores.failures == {(0, 0): reason, (0, 1): reason}


def test_a_wrong_option_of_a_function_of_lists_is_named() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'taget'"):
        reward(lambda images, target=0.5: [0.0 for _ in images])(taget=1)


def test_scores_beyond_float32_are_infinite_and_do_not_stop_the_run() -> None:
    groups = [offline_group(ASK, [["a"], ["b"]])]
    for function in (lambda texts: [1e40, 0.5], lambda text: 1e40 if text == "a" else 0.5):
        assert reward(function)().score(groups, None).values.tolist() == [[math.inf, 0.5]]  # type: ignore[arg-type]


class Scorer:
    """A scorer with a model of its own, as users write them."""

    def long(self, texts: list[str], least: int = 1) -> list[float]:
        return [float(len(text) > least) for text in texts]

    def __call__(self, text: str) -> float:
        return float(len(text))


@pytest.mark.parametrize(
    ("function", "name", "scores"),
    [
        (Scorer().long, "long", [0, 1]),
        (Scorer(), "Scorer", [1, 2]),
        (functools.partial(Scorer().long, least=2), "long", [0, 0]),
    ],
)
def test_methods_partials_and_callable_objects_are_reward_functions(
    function: Callable[..., Any], name: str, scores: list[float]
) -> None:
    built = as_reward(function)
    assert built.__name__ == name
    assert built().score([offline_group(ASK, [["a"], ["bb"]])], None).values.tolist() == [scores]


def by_place(solution: list[str], /, texts: list[str]) -> list[float]:
    return [0.0] * len(texts)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts, /: [0.0], "'<lambda>': 'texts' is given by its name: take the / after it out"),
        (lambda image, /, target=0.5: 0.0, "'image' is given by its name: take the / after it out"),
        (by_place, "'by_place': 'solution' is given by its name: take the / after it out"),
        (max, "'max': its parameters are not known: write a def that calls it"),
        (lambda **kwargs: 0.0, "takes nothing: write def"),
    ],
)
def test_parameters_that_cannot_be_given_by_name_are_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        reward(function)
    assert reward(lambda trajectory_of_mine, /: 1.0)().score([offline_group(ASK, [["a"]])], None).values[0, 0] == 1  # type: ignore[arg-type]
