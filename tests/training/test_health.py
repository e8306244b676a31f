"""Whether a run is well, from its metrics alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lvrpo.rewards.base import offline_group
from lvrpo.training.config import TrainConfig
from lvrpo.training.health import Finding, Health, answer_entropies, assess
from lvrpo.types import Group, Prompt

LIMITS = {"facts": 0.1, "agreement": 0.9}


def rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"step": step, **change} for step, change in enumerate(changes)]


def kinds(health: Health) -> list[str]:
    return [finding.kind for finding in health.findings]


def test_a_run_without_incident_is_well() -> None:
    calm = {"reward/generate/facts": 0.5, "validation/action": "kept best", "grad_norm/understand": 1.0}
    health = assess(rows({}, calm, {**calm, "validation/action": "none"}), LIMITS)
    assert not health.findings
    assert health.as_dict() == {"well": True, "findings": []}


def test_failed_scores_are_counted_over_the_whole_run() -> None:
    """Three of ten steps without any score: .3."""
    good = {"reward/generate/facts": 0.5}
    dead = {"reward_failed/generate/facts": 1.0, "reward_failed_why/generate/facts": "the server is away"}
    (found,) = assess(rows({}, *[good] * 7, *[dead] * 3), LIMITS).findings
    assert found == Finding(
        "failed scores",
        "30% of the scores of facts (generate) failed, 10% may; most often: the server is away",
    )
    assert not assess(rows({}, *[good] * 9, dead), LIMITS).findings  # .1 is not more than .1
    assert not assess(rows(*[{"reward_failed/understand/agreement": 0.6}] * 9), LIMITS).findings
    assert not assess(rows(*[{"reward_failed/understand/unknown": 1.0}] * 9), LIMITS).findings
    null = {"reward_failed/generate/facts": None, "reward/generate/facts": 0.1}
    assert not assess(rows(null), LIMITS).findings


def test_a_reward_says_for_itself_how_much_may_fail() -> None:
    tree = [{"name": "exact_answer"}, {"name": "scene_facts", "label": "facts", "max_failed": 0.7}]
    config = TrainConfig.model_validate({"rewards": tree, "health": {"max_failed": 0.2}})
    assert config.max_failed == {"success": 0.2, "exact_answer": 0.2, "facts": 0.7}


@pytest.mark.parametrize("action", ["rolled back to step 3: edit fell", "stopped: edit fell", "warned: edit fell"])
@pytest.mark.parametrize("name", ["validation", "overoptimization"])
def test_validation_actions_are_findings(name: str, action: str) -> None:
    (found,) = assess(rows({}, {f"{name}/action": action}, {}), LIMITS).findings
    assert found == Finding("validation", f"validation, step 1: {action}")


def test_answers_that_collapsed() -> None:
    course = [{"answer_entropy/understand/color": value} for value in (2.0, 1.0, 0.0)]
    (found,) = assess(rows(*course), LIMITS).findings
    assert found.words == (
        "the answers to understand/color collapsed to one: their entropy fell from 2.00 "
        "to 0.00 bits on held-out questions"
    )
    constant = [{"answer_entropy/understand/color": value} for value in (0.2, 1.0, 0.0)]
    back = [{"answer_entropy/understand/color": value} for value in (2.0, 0.0, 0.4)]
    assert not assess(rows(*constant), LIMITS).findings
    assert not assess(rows(*back), LIMITS).findings


def test_gradients_that_were_none() -> None:
    (found,) = assess(rows({}, *[{"grad_norm/generate": None}] * 7), LIMITS).findings
    assert found.words.endswith("at step 1, 2, 3, 4, 5 and 2 more")
    assert kinds(assess(rows({"grad_norm/generate": 0.0}), LIMITS)) == []


def asked(category: str, right: list[str], said: list[str]) -> list[Group]:
    prompts = [
        Prompt(f"{category}{i}", "understand", ("x",), ("text",), answer=answer, category=category)
        for i, answer in enumerate(right)
    ]
    return [offline_group(prompt, [[text]]) for prompt, text in zip(prompts, said, strict=True)]


def test_the_entropy_of_answers_by_form() -> None:
    groups = [
        *asked("color", ["red", "blue", "red", "blue"], ["Red", "red ", "red", "blue"]),
        *asked("count", ["1", "2", "3", "4"], ["1", "1", "1", "1"]),
        *asked("exists", ["yes"] * 4, ["yes", "no", "yes", "no"]),  # one right answer
        *asked("shape", ["star", "cube"], ["star", "cube"]),  # too few
    ]
    texts = [group.trajectories[0].text for group in groups]
    assert answer_entropies([group.prompt for group in groups], texts) == {
        "understand/color": pytest.approx(2 - 0.75 * math.log2(3)),
        "understand/count": 0.0,
    }
    assert answer_entropies([], []) == {}
