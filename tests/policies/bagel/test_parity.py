"""Every tensor of the reference vectors, within 2e-5 of its largest value; integers exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lvrpo.policies.bagel.images import ResizeRule

RULES = {
    "vae_1024_512_16": (ResizeRule(max_side=1024, min_side=512, stride=16), 1),
    "vit_980_224_14": (ResizeRule(max_side=980, min_side=224, stride=14), 1),
    "vit_980_378_14_maxpix2007040": (ResizeRule(max_side=980, min_side=378, stride=14, max_pixels=2_007_040), 1),
    "vit_980_378_14_maxpix2007040_imgnum8": (
        ResizeRule(max_side=980, min_side=378, stride=14, max_pixels=2_007_040),
        8,
    ),
}


@pytest.mark.parametrize("section", ["pictures", "text", "understanding", "velocities", "trajectories", "autoencoder"])
def test_section(section: str, parity: Any, report: Callable[..., None]) -> None:
    report(section, getattr(parity, section)())


@pytest.mark.parametrize("shift", [1, 4])
def test_training_step(shift: int, parity: Any, report: Callable[..., None]) -> None:
    report(f"training, shift {shift}", parity.training(shift))


def test_rule_for_sizes(parity: Any) -> None:
    rules = RULES | {"vae_set": (parity.policy.config.settings.latent_resize, 1)}
    for row in parity.meta["resize_table"]:
        for name, (rule, pictures) in rules.items():
            if row[name] is not None:
                assert list(rule.size(*row["in_wh"], pictures)) == row[name], (name, row)


def test_tokens(parity: Any) -> None:
    words, special = parity.policy.words, parity.meta["special_token_ids"]
    for row in parity.meta["tokenizer"]:
        assert words.encode(row["text"]) == row["ids"]
        assert words.decode(row["ids"]) == row["text"]
    assert words.bos_id == special["bos_token_id"]
    assert words.eos_id == special["eos_token_id"]
    assert words.image_start_id == special["start_of_image"]
    assert words.image_end_id == special["end_of_image"]


def test_dropped_conditions(parity: Any) -> None:
    parity.dropped_conditions()
