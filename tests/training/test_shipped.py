"""Every configuration that lvrpo ships runs a few steps on a small policy."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml

from lvrpo.config import load_config, shipped_configs
from lvrpo.errors import InputError
from lvrpo.policies import BUILT_IN
from lvrpo.policies.loading import load_policy
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.trainer import Trainer

SUPERVISED = (
    *("bagel_tiny_pretrain", "bagel_tiny_pretrain_edits", "continued", "continued_token", "pretrain"),
    *("pretrain_masked", "pretrain_token", "repa"),
)
"""Alignments of BAGEL are tried by test_bagel_configs.py, of other families by
tests/policies/test_runs.py."""
TOKENS = {"quickstart_token": "tiny-token", "quickstart_masked": "tiny-masked"}
"""Alignments of policies of image tokens, with their policy."""


def test_a_recipe_that_asks_for_no_drawing_is_not_held_to_the_section_of_flows() -> None:
    config = load_config(TrainConfig, shipped_configs()["qwen3_vl_2b"], ["rollout.group_size=2"])
    config.require_policy_fit(("text",))
    with pytest.raises(InputError, match=r"flow\.top_bottom_k=2: best and worst must fit into rollout\.group_size=2"):
        config.require_policy_fit(("text", "flow"))
    with pytest.raises(InputError, match=r"flow\.top_bottom_k=2"):
        load_config(TrainConfig, shipped_configs()["quickstart"], ["rollout.group_size=2"])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in shipped_configs()
        if name not in SUPERVISED and not name.startswith(("bagel", "emu3", "janus", "mmada", "qwen3", "sd35", "showo"))
    ],
)
def test_an_alignment_runs(name: str, small_base: Path) -> None:
    shipped, policy = load_config(TrainConfig, shipped_configs()[name]), TOKENS.get(name, small_base)
    counts = {task: min(count, 3) for task, count in shipped.data.prompts_per_step.items()}
    config = load_config(
        TrainConfig,
        shipped_configs()[name],
        [
            f"policy={policy}",
            "device=cpu",
            "steps=3",
            f"data.prompts_per_step={counts}",
            "rewards=[{name: 'spread:Spread'}]",
            "allow_code=[spread]",
            "validation={every: 2, prompts: {generate: 2, understand: 2}}",
            "reference_eval_every=2",
        ],
    )
    alignment = Trainer.start(config, Path("run"))
    with alignment.run as run:
        assert alignment.train()
        rows = run.metrics()[1:]
    assert [row["step"] for row in rows] == [1, 2, 3]
    numbers = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert any(key.startswith(("loss/text", "loss/flow", "loss/tokens", "loss/masked")) for key in rows[0])
    live, start = alignment.state.policies.policy, load_policy(policy)
    assert any(not torch.equal(a, b) for a, b in zip(live.parameters(), start.parameters(), strict=True))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SUPERVISED)
def test_a_supervised_run_runs(name: str, small_base: Path) -> None:
    rows = "batch={generate: 4, caption: 2, question: 8, edit: 2, reason: 3}"
    sizes = ["corpus={scenes: 30, edits: 10, reasons: 12}", rows, "steps=3", "device=cpu", "held_out_every=0"]
    start = [] if name == "pretrain" else [f"init={small_base}"]
    small = "policy={transformer: {width: 32, depth: 1, heads: 2, key_heads: 2, mlp_width: 32}, tower_width: 16}"
    training = Pretrainer.start(
        load_config(PretrainConfig, shipped_configs()[name], [*sizes, *start, small]), Path("run")
    )
    with training.run as run:
        assert training.train()
        rows = run.metrics()
    assert all(math.isfinite(row["loss/text"]) and math.isfinite(row["loss/image"]) for row in rows)
    assert ("loss/representation" in rows[0]) == (name == "repa")


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_a_configuration_says_what_it_was_validated_on(name: str) -> None:
    text = shipped_configs()[name].read_text()
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert "Validated on" in comments or "ntested on real weights" in comments
    assert yaml.safe_load(text)["name"] in (name, *BUILT_IN.values())
