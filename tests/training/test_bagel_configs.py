"""The configurations for BAGEL, on a small random checkpoint of its layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import training_work as work
from estimates import measure_only
from processes import rows
from ranks import Ranks
from safetensors.torch import load_file
from stored import killed_copy, stored

from lvrpo.cli import main
from lvrpo.config import load_config, shipped_configs
from lvrpo.policies.bagel.checkpoint import official_name
from lvrpo.policies.bagel.create import BagelSizes, create_bagel
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.policies import policy_module
from lvrpo.training.trainer import Trainer

SIZES = {"width": 16, "depth": 2, "heads": 2, "key_heads": 1, "mlp_width": 16, "read_side": 4, "latent_side": 4}
TOWERS = {"vit_width": 8, "vit_depth": 1, "vit_heads": 2, "vit_mlp_width": 8, "image_size": 32}
SPREAD = """
import torch
from lvrpo.rewards.base import Scores

class Spread:
    def applies(self, prompt):
        return True

    def score(self, groups, judge):
        return Scores(torch.tensor([[t.seed % 7 / 6 for t in group.trajectories] for group in groups]))
"""
NEEDS = {"bagel_lvrpo_lora": ["peft"], "bagel_lvrpo_full": [], "bagel_lvrpo_paper": []}
ESTIMATED = {"bagel_lvrpo_full": "replay of text", "bagel_lvrpo_paper": "replay of images"}
"""Of the phases of a step, what is estimated in another way than for an adapter, whose estimate is of every phase."""
LOSSES = {"loss/text/understand", "loss/flow/generate", "loss/flow/edit", "loss/text/reason", "loss/flow/reason"}
"""Of every task; reasoning that ends in an image has both."""


@pytest.fixture
def bagel(monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lively one, and a reward that spreads."""
    policy = create_bagel(BagelSizes.model_validate(SIZES | TOWERS))
    with torch.no_grad():
        for parameter in policy.parameters():
            if not parameter.any():
                parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    policy.save(Path("bagel"))
    Path("spread.py").write_text(SPREAD)
    monkeypatch.syspath_prepend(Path.cwd())
    return Path("bagel")


def small(name: str, folder: Path) -> list[str]:
    counts = load_config(TrainConfig, shipped_configs()[name]).data.prompts_per_step
    return [
        f"policy={folder}",
        "device=cpu",
        "threads=1",
        "steps=2",
        f"data.prompts_per_step={dict.fromkeys(counts, 1) | {'reason': 3}}",  # every third thinks, then draws
        "rewards=[{name: 'spread:Spread'}]",
        "allow_code=[spread]",
        "rollout.image_size=[32, 32]",
        "rollout.max_new_tokens=4",
        "rollout.num_steps=3",
        "rollout.group_size=4",
        "flow.top_bottom_k=1",
        "validation={every: 2, prompts: {understand: 1, reason: 1}}",
    ]


@pytest.mark.parametrize("name", NEEDS)
def test_check_passes(
    name: str, bagel: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in NEEDS[name]:
        pytest.importorskip(package)
    if name in ESTIMATED:
        measure_only(monkeypatch, ESTIMATED[name])
    assert main(["check", name, *small(name, bagel)]) == 0
    printed = capsys.readouterr().out
    assert "at most, in the" in printed
    assert "BROKEN" not in printed
    assert "max |difference|, bfloat16" in printed


def test_a_few_steps_on_one_card_s_configuration(bagel: Path) -> None:
    pytest.importorskip("peft")
    config = load_config(
        TrainConfig, shipped_configs()["bagel_lvrpo_lora"], [*small("bagel_lvrpo_lora", bagel), "checkpoint_every=1"]
    )
    alignment = Trainer.start(config, Path("run"))
    with alignment.run as run:
        assert alignment.train()
        rows = run.metrics()[1:]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    assert all(set(row) >= LOSSES for row in rows)
    live = alignment.state.policies.policy
    assert isinstance(live, MoTPolicy)
    assert any(bool(p.any()) for name, p in live.named_parameters() if ".lora_B." in name)
    files = [path.name for path in Path("run/checkpoints/step_000002").iterdir() if path.is_file()]
    assert "adapter_model.safetensors" in files
    assert "ema.safetensors" not in files


@pytest.mark.parametrize("name", ["bagel_lvrpo_full", "bagel_lvrpo_paper"])
def test_a_step_of_the_larger_configurations(name: str, bagel: Path) -> None:
    config = load_config(TrainConfig, shipped_configs()[name], [*small(name, bagel), "steps=1"])
    alignment = Trainer.start(config, Path("run"))
    with alignment.run as run:
        assert alignment.train()
        (row,) = run.metrics()[1:]
    assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))
    assert {"loss/text/reason", "loss/flow/reason", "loss/flow/generate"} <= set(row)
    policies = alignment.state.policies
    assert policies.reduces_per_microbatch
    assert {tensor.dtype for tensor in policies.weights["ema"].values()} == {torch.float32}
    assert {tensor.dtype for tensor in policies.weights["reference"].values()} == {torch.bfloat16}
    with policies.use("ema") as policy:
        assert {p.dtype for p in policy_module(policy).parameters() if p.requires_grad} == {torch.bfloat16}
    result = dict(policy_module(load_policy("run", dtype="float32")).named_parameters())
    for key, tensor in stored(Path("run/checkpoints/step_000001"), "ema").items():
        assert torch.equal(result[key], tensor)
    assert main(["export", "run", "whole", "--device", "cpu", "--dtype", "float32"]) == 0
    saved = load_file("whole/ema.safetensors")
    assert all(torch.equal(saved[official_name(key)], result[key]) for key in policies.weights["ema"])
    checks = {check["check"]: check["value"] for check in run.read_json("contract.json")}
    assert checks["gradient of the text divergence"] > 0
    assert checks["gradient of the image divergence"] > 0


def test_two_processes_train_all_weights_and_one_goes_on(bagel: Path, tmp_path: Path) -> None:
    options = (
        *small("bagel_lvrpo_full", bagel),
        "checkpoint_every=1",
        "data.prompts_per_step={generate: 3, reason: 3}",
    )
    command = "train", "bagel_lvrpo_full", *options, "--out", "run", "--no-evaluate"
    assert Ranks(tmp_path, 2, work.command, Path.cwd(), *command).results() == [0, 0]
    assert all(math.isfinite(value) for row in rows(Path("run")) for value in row.values() if isinstance(value, float))
    written = sorted(Path("run/checkpoints/step_000002/state/tensors").iterdir())
    assert [path.name[:11] for path in written] == ["shard-00001", "shard-00002"]
    last = rows(Path("run"))[2]
    killed = killed_copy(Path("run"), 1)
    assert main(["train", "--resume", str(killed), "--no-evaluate", "--allow-code"]) == 0
    again = rows(killed)[2]
    assert set(again) == set(last)
    for name, value in last.items():  # bfloat16, rows in other company
        if isinstance(value, float) and name.startswith(("loss/", "kl/")):
            assert again[name] == pytest.approx(value, abs=0.05), name


def test_replaying_in_small_parts_gives_the_same_update(bagel: Path) -> None:
    pytest.importorskip("peft")
    found = []
    tokens = "{backward_tokens: 1, forward_tokens: 64, gradient_checkpointing: true}"
    for number, limits in enumerate(("{microbatch_size: null}", "{microbatch_size: 1}", tokens)):
        tree = [*small("bagel_lvrpo_lora", bagel), "steps=1", "precision={}", "limits.microbatch_size=null"]
        tree.append(f"limits={limits}")
        config = load_config(TrainConfig, shipped_configs()["bagel_lvrpo_lora"], tree)
        alignment = Trainer.start(config, Path(f"run-{number}"))
        with alignment.run as run:
            alignment.train()
            found.append(run.metrics()[1])
    for name in ("grad_norm/understand", "grad_norm/generate", "loss/flow/generate"):
        assert [row[name] for row in found[1:]] == pytest.approx([found[0][name]] * 2, rel=1e-4)


def test_limits_and_precision_are_those_of_a_resumed_run(bagel: Path) -> None:
    pytest.importorskip("peft")
    limits = "limits={microbatch_size: null, backward_tokens: 200, forward_tokens: 64, gradient_checkpointing: true}"
    tree = [*small("bagel_lvrpo_lora", bagel), "checkpoint_every=1", limits]
    config = load_config(TrainConfig, shipped_configs()["bagel_lvrpo_lora"], tree)
    whole = Trainer.start(config, Path("whole"))
    with whole.run:
        whole.train()
    killed = killed_copy(Path("whole"), 1)
    again = Trainer.resume(killed)
    with again.run:
        assert again.state.step == 1
        again.train()
    for state in (whole.state, again.state):
        policies = state.policies
        for policy in (policies.policy, again.result()):
            assert isinstance(policy, BagelPolicy)
            assert policy.compute_dtype == torch.bfloat16
            assert policy.max_tokens == 64
            assert policy.transformer.checkpointing
    one, other = (stored(run / "checkpoints/step_000002", "policy") for run in (Path("whole"), killed))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_configuration_of_a_small_bagel_runs(bagel: Path) -> None:
    config = load_config(TrainConfig, shipped_configs()["bagel_tiny"], small("bagel_tiny", bagel))
    alignment = Trainer.start(config, Path("run"))
    with alignment.run as run:
        assert alignment.train()
        rows = run.metrics()[1:]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(set(row) >= LOSSES for row in rows)
