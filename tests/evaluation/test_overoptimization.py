"""The alarm sounds when a reward and a held-out score part, and hardly ever otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lvrpo.audit_records import Alarms, Window
from lvrpo.evaluation.recorded_groups import AdvantageSettings, RecordedGroups, RecordedRun, Validations, split_windows
from lvrpo.evaluation.reward_audit import ERROR, VALIDATION, detect_overoptimization

STEPS, P, G = 50, 6, 4


def course(rng: np.random.Generator, chances: Sequence[float]) -> np.ndarray:
    """0/1 scores (N, G) whose chance of 1 moves linearly through ``chances``."""
    chance = np.interp(np.linspace(0, 1, STEPS * P), np.linspace(0, 1, len(chances)), chances)
    return (rng.random((STEPS * P, G)) < chance[:, None]).astype(np.float32)


def alarms(
    reward: np.ndarray, held_out: np.ndarray | None = None, validations: Validations = (), **changes: Any
) -> Alarms:
    n = len(reward)
    nothing = np.full((n, G), np.nan, dtype=np.float32)
    groups = RecordedGroups(
        names=("reward",),
        weights=np.ones((n, 1), dtype=np.float32),
        step=np.repeat(np.arange(1, n // P + 1), P),
        task=np.full(n, "generate"),
        category=np.full(n, ""),
        scores=reward[:, :, None],
        applies=np.ones((n, 1), dtype=np.bool_),
        judged=np.ones((n, 1), dtype=np.bool_),
        success=nothing if held_out is None else held_out,
        traits=np.full((n, G, 6), np.nan, dtype=np.float32),
        text_diversity=nothing[:, 0],
        picture_diversity=nothing[:, 0],
        advantages=np.zeros((n, G), dtype=np.float32),
    )
    record = RecordedRun(groups, None, validations, AdvantageSettings(), max_failed=changes.get("max_failed", {}))
    return detect_overoptimization(record, changes.get("windows", split_windows(groups.step)))


def test_a_reward_that_is_gamed() -> None:
    rng = np.random.default_rng(0)
    found = alarms(course(rng, [0.3, 0.8]), course(rng, [0.6, 0.2]))
    (alarm,) = found.found
    assert (alarm.task, alarm.reward, alarm.scorer) == ("generate", "reward", "success")
    assert (alarm.before, alarm.after) == (Window(1, 10), Window(41, 50))
    assert alarm.reward_change.score == pytest.approx(0.4, abs=0.08)
    assert alarm.scorer_change.score == pytest.approx(-0.32, abs=0.08)
    assert (found.comparisons, found.confidence) == (4, 1 - 0.05 / 4)
    assert "generate: reward rose by 0." in alarm.words
    assert "while success fell by 0." in alarm.words
    assert alarm.words.endswith("from steps 1 to 10 to steps 41 to 50")


def test_a_fall_late_in_the_run_is_told_from_the_best_part() -> None:
    """Both rise at first, then the held-out score falls back to where it began."""
    rng = np.random.default_rng(1)
    (alarm,) = alarms(course(rng, [0.2, 0.5, 0.8]), course(rng, [0.3, 0.8, 0.3])).found
    assert alarm.before == Window(21, 30)


@pytest.mark.parametrize(
    ("reward", "held_out"),
    [
        ([0.3, 0.8], [0.3, 0.6]),  # both rise
        ([0.8, 0.3], [0.6, 0.2]),  # both fall
        ([0.8, 0.3], [0.2, 0.6]),  # the other way round
        ([0.5, 0.5], [0.6, 0.2]),  # only the held-out score falls
        ([0.3, 0.8], [0.5, 0.2, 0.5]),  # it fell and came back
    ],
)
def test_no_alarm(reward: list[float], held_out: list[float]) -> None:
    rng = np.random.default_rng(2)
    found = alarms(course(rng, reward), course(rng, held_out))
    assert not found.found
    assert found.comparisons == 4


@pytest.mark.parametrize("reward", [[0.5, 0.5], [0.2, 0.9]])
def test_a_held_out_score_that_does_not_move_is_rarely_called_fallen(reward: list[float]) -> None:
    """Over 400 runs; with a reward that surely rises, the chance is that of the fall alone."""
    sounded = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        sounded += bool(alarms(course(rng, reward), course(rng, [0.5, 0.5])).found)
    assert sounded <= 400 * ERROR


def test_the_guard_is_compared_prompt_by_prompt() -> None:
    """12 of 60 prompts are lost, in three looks, and none is gained: told only because the prompts are the same."""
    rng = np.random.default_rng(3)
    reward = course(rng, [0.3, 0.8])
    before = (np.arange(60) % 2).astype(np.float32)
    after = before * (np.arange(60) >= 24)
    validations = [(0, {"generate": before}), (20, {"generate": before}), (50, {"generate": after})]
    (alarm,) = alarms(reward, validations=validations).found
    assert (alarm.scorer, alarm.before, alarm.after) == (VALIDATION, Window(1, 10), Window(41, 50))
    assert alarm.scorer_change.score == pytest.approx(-0.2)
    assert "validation's held-out score fell by 0.200" in alarm.words
    shuffled = [*validations[:2], (50, {"generate": rng.permutation(after)})]
    assert not alarms(reward, validations=shuffled).found
    assert not alarms(
        reward, validations=[(step, {"edit": scores["generate"]}) for step, scores in validations]
    ).comparisons


def test_looks_after_the_last_recorded_step_count_as_its_part() -> None:
    rng = np.random.default_rng(4)
    validations = [(0, {"generate": np.ones(40, np.float32)}), (64, {"generate": np.zeros(40, np.float32)})]
    (alarm,) = alarms(course(rng, [0.3, 0.8]), validations=validations).found
    assert alarm.scorer_change.score == -1.0


def test_a_scorer_that_says_the_same_is_named_and_not_compared() -> None:
    reward = course(np.random.default_rng(5), [0.3, 0.8])
    found = alarms(reward, reward.copy())
    assert found.same == (("generate", "reward", "success"),)
    assert found.comparisons == 0


def test_a_short_run_is_not_judged() -> None:
    rng = np.random.default_rng(6)
    one, other = course(rng, [0.0, 1.0])[: 2 * P], course(rng, [1.0, 0.0])[: 2 * P]
    assert alarms(one, other).comparisons == 0
    found = alarms(one, other, windows=[Window(1, 2)])
    assert (found.found, found.comparisons) == ((), 0)


def test_scores_that_failed_more_often_than_they_may() -> None:
    reward = course(np.random.default_rng(7), [0.5, 0.5])
    dead = reward.copy()
    dead[48 * P :] = np.nan  # the last two of fifty steps: .2 of the last part, .04 of the run
    assert alarms(reward, max_failed={"reward": 0.0}).missing == ()
    (late,) = alarms(dead, max_failed={"reward": 0.1}).missing
    assert (late.task, late.reward, late.share) == ("generate", "reward", pytest.approx(0.2))
    assert late.words == "generate: 20% of the scores of reward failed in steps 41 to 50, 10% may"
    (whole,) = alarms(dead, max_failed={"reward": 0.03}).missing
    assert whole.words == "generate: 4% of the scores of reward failed in steps 1 to 50, 3% may"
    assert alarms(dead, max_failed={"reward": 0.2}).missing == ()
    assert alarms(dead).missing == ()  # a run of an older version does not say how many may
