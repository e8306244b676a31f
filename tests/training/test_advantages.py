from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from lvrpo.training.advantages import (
    AdvantageConfig,
    compute_advantages,
    segment_advantages,
    trajectory_advantages,
    trajectory_rewards,
)
from lvrpo.types import Group, OutputKind, Prompt, RewardTable, TaskKind

SUMS = ("grpo", "rloo", "trimmed", "win_rate")


def make_config(tree: dict[str, Any]) -> AdvantageConfig:
    return TypeAdapter(AdvantageConfig).validate_python(tree)


def table(scores: list[Any], mask: list[Any] | None = None, weights: tuple[float, ...] = (1.0, 1.0)) -> RewardTable:
    values = torch.tensor(scores)
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.tensor(mask)
    tasks = ("understand", "generate")[: len(values)]
    return RewardTable(("a", "b"), torch.tensor(weights), values, valid, {}, tasks)


def test_advantages_of_a_table_by_hand() -> None:
    rewards = table([[[0.0, 0.30], [0.0, 0.31], [1.0, 0.30], [1.0, 0.31]]])
    config = make_config({"std_floor": 1e-4})
    expected = torch.tensor([[-1.41, -0.01, 0.01, 1.41]])
    torch.testing.assert_close(compute_advantages(rewards, config).values, expected, rtol=0, atol=0.02)
    summed = make_config({"kind": "grpo"})
    expected = torch.tensor([[-1.01, -0.99, 0.99, 1.01]])
    torch.testing.assert_close(compute_advantages(rewards, summed).values, expected, rtol=0, atol=0.005)


def test_advantages_are_clamped_and_floored() -> None:
    rewards = table([[[1.0, 0.5], *[[0.0, 0.5]] * 63]], weights=(1.0, 0.0))
    for kind in ("gdpo", "grpo"):
        A = compute_advantages(rewards, make_config({"kind": kind, "clamp": 2.0})).values
        assert A.max() == 2.0
        flat = table([[[0.5, 0.1], [0.505, 0.1]]])
        assert not compute_advantages(flat, make_config({"kind": kind})).values.any()


@pytest.mark.parametrize("kind", ["gdpo", "grpo"])
def test_a_failed_score_is_no_worse_than_a_mean_one(kind: str) -> None:
    """Every member got 1 from both rewards, but the second one failed on member 0."""
    rewards = table(
        [[[1.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]],
        [[[True, False], [True, True], [True, True], [True, True]]],
    )
    assert not compute_advantages(rewards, make_config({"kind": kind})).values.any()


@pytest.mark.parametrize(
    ("kind", "valid"),
    [("gdpo", [True, True, False, True]), *((k, [False, True, False, True]) for k in SUMS)],
)
def test_a_member_without_the_scores_that_its_advantage_needs_is_not_valid(kind: str, valid: list[bool]) -> None:
    """Member 0 lacks one score, member 2 both; the third reward, which every member has, is only watched."""
    scores = torch.tensor([[[9.0, 1.0, 1.0], [1.0, 0.0, 0.0], [9.0, 9.0, 1.0], [0.0, 1.0, 0.0]]])
    mask = torch.tensor([[[False, True, True], [True, True, True], [False, False, True], [True, True, True]]])
    table = RewardTable(("a", "b", "c"), torch.tensor([1.0, 1.0, 0.0]), scores, mask, {}, ("generate",))
    A = compute_advantages(table, make_config({"kind": kind}))
    assert A.valid.tolist() == [valid]
    assert not A.values[~A.valid].any()


def single(scores: list[list[float]], tasks: tuple[TaskKind, ...] = ("understand", "generate")) -> RewardTable:
    """One reward of weight 1."""
    values = torch.tensor(scores)[..., None]
    mask = torch.ones_like(values, dtype=torch.bool)
    return RewardTable(("a",), torch.ones(1), values, mask, {}, tasks[: len(values)])


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"kind": "grpo", "std": "population"}, [-1.0, 1.0, -1.0, 1.0]),
        ({"kind": "grpo", "std": "sample"}, [-(0.75**0.5), 0.75**0.5, -(0.75**0.5), 0.75**0.5]),
        ({"kind": "grpo", "std": "none"}, [-2.0, 2.0, -2.0, 2.0]),
        ({"kind": "rloo"}, [-8 / 3, 8 / 3, -8 / 3, 8 / 3]),
        ({"kind": "win_rate", "std": "none"}, [-1 / 3, 1 / 3, -1 / 3, 1 / 3]),
    ],
    ids=str,
)
def test_choices_of_the_baseline_by_hand(choice: dict[str, Any], expected: list[float]) -> None:
    A = compute_advantages(single([[1.0, 5.0, 1.0, 5.0]]), make_config(choice))
    torch.testing.assert_close(A.values, torch.tensor([expected]), rtol=1e-3, atol=1e-4)


def test_trimming_measures_by_the_middle() -> None:
    A = compute_advantages(
        single([[0.0, 1.0, 2.0, 100.0]]), make_config({"kind": "trimmed", "trim": 0.25, "clamp": 1e3})
    )
    torch.testing.assert_close(A.values, torch.tensor([[-3.0, -1.0, 1.0, 197.0]]), rtol=1e-3, atol=1e-3)


def test_the_batch_std_is_that_of_each_task() -> None:
    table = single([[0.0, 2.0], [0.0, 200.0]])
    A = compute_advantages(table, make_config({"kind": "grpo", "std": "batch"}))
    torch.testing.assert_close(A.values, torch.tensor([[-1.0, 1.0], [-1.0, 1.0]]), rtol=1e-3, atol=1e-3)


def test_a_reward_that_hardly_spreads_wins_nothing() -> None:
    scores = torch.tensor([[[0.0, 0.500], [0.0, 0.501], [1.0, 0.502], [1.0, 0.503]]])
    table = RewardTable(("a", "b"), torch.ones(2), scores, torch.ones_like(scores, dtype=torch.bool), {}, ("generate",))
    A = compute_advantages(table, make_config({"kind": "win_rate", "std": "none"}))
    torch.testing.assert_close(A.values, torch.tensor([[-1 / 3, -1 / 3, 1 / 3, 1 / 3]]), rtol=1e-3, atol=1e-4)


def test_a_masked_member_neither_wins_nor_loses() -> None:
    table = single([[3.0, 1.0, 2.0, 9.0]])
    table.mask[0, 3] = False
    A = compute_advantages(table, make_config({"kind": "win_rate", "std": "none"}))
    torch.testing.assert_close(A.values, torch.tensor([[0.5, -0.5, 0.0, 0.0]]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"kind": "gdpo", "std": "batch"}, "should be 'population' or 'sample'"),
        ({"kind": "rloo", "std": "none"}, "Extra inputs"),
        ({"kind": "gdpo", "joint": ["generate", "understand"]}, "Extra inputs"),
        ({"kind": "grpo", "joint": ["generate", "understand"], "stages": "per_segment"}, "use stages=shared"),
        ({"kind": "trimmed", "trim": 0.5}, "less than 0.5"),
    ],
    ids=str,
)
def test_choices_that_do_not_fit(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_config(choice)


def group(task: TaskKind, *output: OutputKind) -> Group:
    return Group(Prompt("id", task, (), output), ())


def staged() -> tuple[RewardTable, list[Group]]:
    """A thought that was right in members 0 and 1, an image right in members 0 and 2; and an answer."""
    thought, drawing = [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]
    scores = torch.stack([torch.tensor([thought, thought]), torch.tensor([drawing, drawing])], dim=2)
    mask = torch.tensor([[[True, True]] * 4, [[True, False]] * 4])
    judges: dict[str, tuple[OutputKind, ...]] = {"answer": ("text",), "facts": ("image",)}
    table = RewardTable(("answer", "facts"), torch.ones(2), scores, mask, {}, ("reason", "reason"), judges)
    return table, [group("reason", "text", "image"), group("reason", "text")]


def test_each_segment_has_the_advantage_of_what_judges_it() -> None:
    table, groups = staged()
    config = make_config({"kind": "grpo", "stages": "per_segment"})
    A = segment_advantages(table, groups, config)
    up, alternating = [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]
    torch.testing.assert_close(A["text"].values, torch.tensor([up, up]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(A["image"].values, torch.tensor([alternating, [0.0] * 4]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(trajectory_advantages(A, groups), torch.tensor([alternating, up]), rtol=1e-3, atol=1e-3)
    assert A["image"].valid.tolist() == [[True] * 4, [False] * 4]
    judged = trajectory_rewards(table, groups, config)
    assert judged is not None
    assert judged.tolist() == [[False, True], [True, True]]


def test_shared_stages_give_all_segments_the_trajectory_advantage() -> None:
    table, groups = staged()
    A = segment_advantages(table, groups, make_config({"kind": "grpo", "std": "none"}))
    assert A["text"] is A["image"]
    assert trajectory_rewards(table, groups, make_config({})) is None
    torch.testing.assert_close(A["text"].values[0], torch.tensor([1.0, 0.0, 0.0, -1.0]))


def test_a_reward_that_judges_both_counts_in_both() -> None:
    table, groups = staged()
    table = RewardTable(*[getattr(table, f) for f in ("names", "weights", "scores", "mask", "reasons", "tasks")])
    A = segment_advantages(table, groups, make_config({"kind": "grpo", "std": "none", "stages": "per_segment"}))
    assert torch.equal(A["text"].values[0], A["image"].values[0])
    assert not A["image"].values[1].any()


def test_a_joint_member_needs_both_scores() -> None:
    table = single([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], ("understand", "generate"))
    table.mask[0, 2] = table.mask[1, 1] = False
    A = compute_advantages(table, make_config({"kind": "grpo", "joint": ("generate", "understand")}))
    assert A.valid.tolist() == [[True, False, False]] * 2


def test_joint_groups_share_the_sum_of_their_rewards() -> None:
    table = single([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]], ("understand", "edit", "generate"))
    table.scores[2] *= 3
    A = compute_advantages(table, make_config({"kind": "grpo", "std": "none", "joint": ("generate", "understand")}))
    torch.testing.assert_close(A.values, torch.tensor([[-1.0, 1.0], [0.0, 0.0], [-1.0, 1.0]]))


@pytest.mark.parametrize("kind", ["gdpo", "grpo", "rloo", "trimmed"])
def test_a_reward_with_a_scale_of_its_own(kind: str) -> None:
    """Normalised in its group, the small reward outweighs the large one that keeps its size."""
    scores = torch.tensor([[[0.001, 3.0], [0.002, 2.0], [0.003, 1.0], [0.004, 0.0]]]) * torch.tensor([1.0, 0.1])
    table = RewardTable(("small", "large"), torch.ones(2), scores, scores > -1, {}, ("generate",))
    config = make_config({"kind": kind, "std_floor": 1e-5})
    own = replace(table, normalize={"small": "group", "large": "none"})
    A = compute_advantages(own, config).values[0]
    assert A[3] > 0 > A[0]
    if kind != "gdpo":
        assert compute_advantages(table, config).values[0, 3] < 0
