"""Prompts of the train split as rows to imitate."""

from __future__ import annotations

import pytest

from lvrpo.data.scenes import CleanPrompts, CleanPromptsConfig, ScenePrompts, ScenesConfig
from lvrpo.training.pretrain import PretrainConfig, supervised_rows


def test_rows_are_the_first_prompts_with_their_right_outputs() -> None:
    clean = CleanPrompts.build(CleanPromptsConfig(seed=2, counts={"generate": 3, "understand": 8, "reason": 3}), 32, 4)
    source = ScenePrompts(ScenesConfig(), "train", 2)
    assert [row.prompt.id for row in clean.generate] == [prompt.id for prompt in source.prompts("generate", 3)]
    assert [row.prompt.id for row in clean.question[4:8]] == [p.id for p in source.prompts("understand", 4, 4)]
    assert all(row.outputs[0] == row.prompt.answer for row in clean.question)
    assert len(clean.reason) == 3
    assert len(clean.edit) == len(clean.caption) == 0
    with pytest.raises(IndexError):
        clean.generate[3]


def test_a_run_imitates_prompts_where_it_says_so() -> None:
    batch = {"generate": 2, "question": 4}
    tree = {"rows": "prompts", "batch": batch, "prompts": {"counts": {"generate": 4, "understand": 8}}}
    config = PretrainConfig.model_validate(tree)
    assert len(supervised_rows(config).question) == 8
    for wrong in ({"generate": 2, "caption": 1}, {"edit": 1}):
        with pytest.raises(ValueError, match="the prompts have no such rows"):
            PretrainConfig.model_validate({**tree, "batch": wrong})
