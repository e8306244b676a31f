"""Runs that train an adapter: small checkpoints, resumed bit for bit, used like any model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import killed_copy, stored

from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.policies.adapter import is_adapter
from lvrpo.policies.loading import load_policy
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.setup import open_policy
from lvrpo.training.state import TrainState
from lvrpo.training.trainer import Trainer

pytest.importorskip("peft")

SMALL = (
    "steps=4",
    "data.prompts_per_step={generate: 2, understand: 6, edit: 1, reason: 2}",
    "rollout={group_size: 4, num_steps: 4}",
    "rewards=[{name: exact_answer}, {name: self_vqa}]",
    "advantages.std_floor=1e-4",
    "validation={every: 2, prompts: {generate: 2, understand: 4}}",
    "checkpoint_every=2",
    "reference_eval_every=3",
    "optimizer={adamw_lr: 0.01}",
    "device=cpu",
)


def config_of(base: Path, adapter: str = "{rank: 4}", *more: str) -> TrainConfig:
    return load_config(TrainConfig, None, [f"policy={base}", *SMALL, f"adapter={adapter}", *more])


def go(alignment: Trainer, until: int | None = None) -> Trainer:
    with alignment.run:
        alignment.train(interrupted=lambda: alignment.state.step == until)
    return alignment


@pytest.mark.parametrize(
    ("adapter", "more"),
    [("{rank: 4}", ()), ("{rank: 2, dora: true, experts: [generate]}", ["text={weight: 0}"])],
    ids=["lora", "dora"],
)
def test_a_run_trains_the_adapter_alone_and_resumes_bit_for_bit(
    adapter: str, more: list[str], small_base: Path
) -> None:
    config = config_of(small_base, adapter, *more)
    whole = go(Trainer.start(config, Path("whole")))
    killed = killed_copy(Path("whole"), 2)
    again = Trainer.resume(killed)
    assert again.state.step == 2
    go(again)
    one, other = (stored(run / "checkpoints/step_000004") for run in (Path("whole"), killed))
    assert {name.split("/")[0] for name in one} == {"policy", "old", "ema", "optimizer_0"}
    assert one.keys() == other.keys()
    assert all(is_adapter(name) and torch.equal(tensor, other[name]) for name, tensor in one.items())
    base = load_policy(small_base)
    assert isinstance(base, MoTPolicy)
    for alignment in (whole, again):
        with alignment.state.policies.use("reference") as reference:
            assert isinstance(reference, MoTPolicy)
            assert all(torch.equal(a, b) for a, b in zip(reference.parameters(), base.parameters(), strict=True))
    live = whole.state.policies.policy
    assert isinstance(live, MoTPolicy)
    assert any(bool(p.any()) for name, p in live.named_parameters() if ".lora_B." in name)
    sizes = [path.stat().st_size for path in Path("whole/start").iterdir()]
    assert sum(sizes) < (small_base / "model.safetensors").stat().st_size / 2  # the base is not copied into the run


def test_the_result_of_a_run_is_a_model(small_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alignment = go(Trainer.start(config_of(small_base), Path("run")))
    result = alignment.result()
    assert isinstance(result, MoTPolicy)
    assert result.adapter is not None
    assert result.adapter.base == str(small_base)
    ask = ["generate", "{}", "--prompt", "a red circle", "--num-steps", "3", "--out", "{}"]
    assert main([part.format("run" if i == 1 else "one") for i, part in enumerate(ask)]) == 0
    assert main(["export", "run", "whole", "--device", "cpu"]) == 0
    assert "whole: run, its adapter merged" in capsys.readouterr().out
    exported = load_policy("whole")
    assert isinstance(exported, MoTPolicy)
    assert exported.adapter is None
    assert main([part.format("whole" if i == 1 else "two") for i, part in enumerate(ask)]) == 0
    assert main(["export", "run", "whole"]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"policy=run: is an adapter: make one model of it with `lvrpo export`"):
        Trainer.start(config_of(Path("run")), Path("again"))


def test_a_run_whose_base_has_moved_goes_on(small_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(small_base, "here")
    go(Trainer.start(config_of(Path("here")), Path("straight")))
    killed_copy(Path("straight"), 2).rename("run")
    Path("here").rename("there")
    assert main(["train", "--resume", "run", "--no-evaluate"]) == 2
    assert "its base is not there: name it (--base FOLDER)" in capsys.readouterr().err
    assert main(["train", "quickstart", "--base", "there", "--out", "new"]) == 2
    assert "--base there: is for a resumed run" in capsys.readouterr().err
    assert main(["train", "--resume", "run", "--base", "there", "--no-evaluate"]) == 0
    states = [stored(Path(run) / "checkpoints/step_000004", "policy") for run in ("straight", "run")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_muon_leaves_the_factors_to_adamw(small_base: Path) -> None:
    policy, _ = open_policy(config_of(small_base))
    state = TrainState.start(policy, config_of(small_base))
    kinds = [type(optimizer) for optimizer in state.optimizers[0].optimizers]
    assert kinds == [torch.optim.AdamW]


def test_training_what_no_trained_weight_touches_is_refused(small_base: Path) -> None:
    with pytest.raises(InputError, match=r"adapter.experts=\[generate\]: text is written by the other expert"):
        config_of(small_base, "{experts: [generate]}")


def test_an_adapter_is_no_setting_of_a_resumed_run(small_base: Path) -> None:
    go(Trainer.start(config_of(small_base), Path("run")), until=2)
    with pytest.raises(InputError, match="adapter"):
        Trainer.resume(Path("run"), config_of(small_base, "{rank: 8}"))


def test_the_first_update_is_seen_in_the_adapter(small_base: Path) -> None:
    policy, _ = open_policy(config_of(small_base))
    state = TrainState.start(policy, config_of(small_base))
    assert not state.policies.weights.differs_from("reference")
    assert isinstance(policy, MoTPolicy)
    factor: Any = policy.get_submodule("transformer.layers.0.understanding.q_proj.lora_B.default")  # Any: a Linear
    with torch.no_grad():
        factor.weight[0, 0] = 1e-3
    assert state.policies.weights.differs_from("reference")
