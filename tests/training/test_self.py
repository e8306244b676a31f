"""The label-free recipe: prompts without labels, and a run in which any look at the truth is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lvrpo.config import load_config, shipped_configs
from lvrpo.rewards import success, verifiable_image, verifiable_text
from lvrpo.training.components import open_components
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer

SMALL = (
    "steps=2",
    "rollout.group_size=4",
    "data.prompts_per_step={generate: 4, understand: 4, edit: 3, reason: 6}",
    "validation.prompts={generate: 7, edit: 5}",
    "validation.every=1",
    "reference_eval_every=1",
    "device=cpu",
)


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("somebody looked at the truth")


def test_prompts_carry_no_label_and_every_task_but_drawn_answers_has_a_reward() -> None:
    config = load_config(TrainConfig, shipped_configs()["self"])
    parts = open_components(config)
    names: dict[str, set[str]] = {}
    for task, count in config.data.prompts_per_step.items():
        for prompt in parts.source.prompts(task, count):
            assert (prompt.answer, prompt.facts, prompt.edited, prompt.content) == (None, (), None, "")
            names.setdefault(task, set()).update(r.config.name for r in parts.rewards if r.scores(prompt))
    assert names == {
        "generate": {"self_vqa"},
        "understand": {"agreement"},
        "edit": {"edit_consistency"},
        "reason": {"agreement"},
    }
    assert {task: len(rows) for task, rows in parts.validator.prompts.items()} == {"generate": 84, "edit": 60}
    watched = [p for rows in parts.validator.prompts.values() for p in rows]
    assert all((p.answer, p.facts, p.edited, p.content) == (None, (), None, "") for p in watched)


def test_training_does_not_use_ground_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (verifiable_image, "fact_table"),
        (success, "fact_table"),
        (success, "is_right_answer"),
        (verifiable_text, "is_right_answer"),
    ):
        monkeypatch.setattr(module, name, refuse)
    config = load_config(TrainConfig, shipped_configs()["self"], [*SMALL])
    alignment = Trainer.start(config, Path("run"))
    with alignment.run as run:
        assert alignment.train()
        rows = run.metrics()
    assert rows[-1]["step"] == 2
    assert {"validation/generate", "validation/edit", "reward/generate/self_vqa"} <= set(rows[-1])
