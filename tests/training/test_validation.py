from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from weight_sets import sets_of

from lvrpo.policies.base import Sampling
from lvrpo.sampling import derive_seed
from lvrpo.training.config import TrainConfig
from lvrpo.training.state import ValidationState
from lvrpo.training.validation import Validator, has_regressed
from lvrpo.types import Group, Prompt, TaskKind, TextSegment, Trajectory


class Answerer:
    """Answers right where it is told to, and notes how it was asked."""

    def __init__(self, right: set[str]) -> None:
        self.right = right
        self.calls: list[tuple[Sampling, list[int]]] = []

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        self.calls.append((sampling, list(seeds)))
        groups = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            text = prompt.answer if prompt.id in self.right else "no idea"
            segment = TextSegment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 0.0, text or "", True)
            groups.append(Group(prompt, (Trajectory(prompt, 0, (segment,), seed),)))
        return groups


def prompts(task: TaskKind, n: int) -> list[Prompt]:
    return [Prompt(f"{task}{i}", task, ("x",), ("text",), answer="red") for i in range(n)]


PROMPTS: dict[TaskKind, list[Prompt]] = {"understand": prompts("understand", 20), "reason": prompts("reason", 10)}


def right(understand: int, reason: int, start: int = 0) -> Any:
    """Weights that answer so many of each task right."""
    ids = {f"understand{(start + i) % 20}" for i in range(understand)} | {f"reason{i}" for i in range(reason)}
    return sets_of(ema=Answerer(ids))


@pytest.fixture
def validator() -> Validator:
    return Validator(PROMPTS, TrainConfig(seed=3))


def test_the_first_validation_is_the_best(validator: Validator) -> None:
    state = ValidationState()
    report = validator.validate(right(10, 5), state, 0)
    assert (report.verdict, report.regressed) == ("best", ())
    assert report.means == {"understand": 0.5, "reason": 0.5}
    assert state.best_scores["reason"] == [1.0] * 5 + [0.0] * 5


def test_verdicts_of_later_validations(validator: Validator) -> None:
    state = ValidationState()
    validator.validate(right(10, 5), state, 0)
    assert validator.validate(right(12, 5), state, 20).verdict == "best"
    assert state.best_step == 20
    assert validator.validate(right(8, 5), state, 40).verdict == "kept"
    assert state.best_step == 20
    assert validator.validate(right(12, 5), state, 60).verdict == "best"
    assert state.best_step == 60


def test_within_noise_the_later_validation_is_best_but_top_stays(validator: Validator) -> None:
    """The standard error of the mean of tasks is about .096 here; the top is (12/20 + 5/10) / 2 = .55."""
    state = ValidationState()
    validator.validate(right(12, 5), state, 0)
    assert validator.validate(right(11, 5), state, 20).verdict == "best"
    assert validator.validate(right(10, 5), state, 40).verdict == "best"
    assert (state.best_step, state.top) == (40, pytest.approx(0.55))
    assert (
        validator.validate(right(8, 5), state, 60).verdict == "kept"
    )  # .45 is near .5, the last best, but far from the top
    assert state.best_step == 40


def test_a_task_that_falls_is_named_though_the_mean_rises(validator: Validator) -> None:
    state = ValidationState()
    validator.validate(right(12, 0), state, 0)
    scores = dict(state.best_scores)
    report = validator.validate(right(4, 10), state, 20)
    assert sum(report.means.values()) > 0.6
    assert (report.verdict, report.regressed) == ("regressed", ("understand",))
    assert (state.best_step, state.best_scores) == (0, scores)


def test_a_task_that_is_lost_in_steps_within_noise_is_compared_with_the_initial_weights(validator: Validator) -> None:
    """Each fall is within noise of the best weights so far, which move with it, and the other task makes up for it."""
    state = ValidationState()
    validator.validate(right(12, 0), state, 0)
    initial = dict(state.best_scores)
    for step, (understand, reason) in enumerate([(9, 3), (6, 6)], 1):
        assert validator.validate(right(understand, reason), state, step).verdict == "best"
    report = validator.validate(right(3, 9), state, 3)
    assert (report.verdict, report.regressed) == ("regressed", ("understand",))
    assert state.initial_scores == initial
    state.initial_scores = {}  # of a checkpoint of an older version
    assert validator.validate(right(3, 9), state, 3).verdict == "best"


def test_scores_are_paired_prompt_by_prompt(validator: Validator) -> None:
    """The same means fall or not by whether the same prompts stay right."""
    nested, state = ValidationState(), ValidationState()
    validator.validate(right(12, 5), nested, 0)
    assert validator.validate(right(5, 5), nested, 20).verdict == "regressed"
    validator.validate(right(12, 5), state, 0)
    assert validator.validate(right(5, 5, start=9), state, 20).verdict == "kept"


@pytest.mark.parametrize(
    ("now", "before", "verdict"),
    [
        ([0, 0, 0, 0], [1, 1, 1, 1], True),
        ([1, 1, 1, 1], [1, 1, 1, 1], False),
        ([1, 1, 1, 1], [0, 0, 0, 0], False),
        ([0, 1, 1, 1], [1, 1, 1, 1], False),  # mean -1/4, standard error 1/4
        ([0, 0, 0, 1], [1, 1, 1, 1], False),  # mean -3/4, standard error 1/4: three of them reach 0
        ([0, 0, 0, 0, 1], [1, 1, 1, 1, 1], True),  # mean -4/5, standard error 1/5
        ([0, 0, 1, 1], [1, 1, 1, 1], False),  # mean -1/2, standard error .289
        ([0], [1], False),
    ],
)
def test_fell(now: list[float], before: list[float], verdict: bool) -> None:
    assert has_regressed(now, before) is verdict


def test_every_validation_uses_the_same_seeds_and_greedy_text(validator: Validator) -> None:
    policy = Answerer({"understand0", "reason0"})
    validator.score(sets_of(ema=policy))
    validator.score(sets_of(ema=policy))
    assert policy.calls[:2] == policy.calls[2:]
    sampling, seeds = policy.calls[0]
    assert (sampling.group_size, sampling.temperature, sampling.sampler) == (1, 0.0, "ode")
    assert seeds == [derive_seed(3, "guard", prompt.id) for prompt in PROMPTS["understand"]]


def test_validation_without_prompts_always_keeps_the_last_weights() -> None:
    validator, state = Validator({"generate": []}, TrainConfig()), ValidationState()
    for step in (0, 20, 40):
        report = validator.validate(right(0, 0), state, step)
        assert (report.verdict, dict(report.means), state.best_step) == ("no_data", {}, step)
