"""Whole runs of a small random Show-o2 with the shipped recipe, and the commands on its folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from stored import stored

from lvrpo.cli import main
from lvrpo.config import load_config, shipped_configs
from lvrpo.policies.loading import load_policy
from lvrpo.policies.showo2.policy import Showo2Policy
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer


@pytest.fixture
def small(folder: Path) -> list[str]:
    """The shipped recipe at small numbers, and a reward that spreads."""
    return [
        f"policy={folder}",
        "device=cpu",
        "data.prompts_per_step={generate: 2, understand: 2, edit: 0, reason: 0}",
        "rollout.group_size=4",
        "rollout.max_new_tokens=6",
        "rollout.num_steps=3",
        "rewards=[{name: 'spread:Spread'}, {name: self_vqa, weight: 0.1}]",
        "allow_code=[spread]",
        "optimizer.warmup_steps=0",
        "optimizer.adamw_lr=1e-3",
        "validation={every: 2, prompts: {generate: 1, understand: 1}}",
        "reference_eval_every=2",
        "reference_eval_group_size=2",
        "steps=2",
    ]


def test_the_recipe_runs_and_goes_on_bit_for_bit(small: list[str], folder: Path) -> None:
    config = load_config(TrainConfig, shipped_configs()["showo2_1p5b"], small)
    straight = Trainer.start(config, Path("straight"))
    with straight.run:
        assert straight.train()
    rows = RunDirectory.read(Path("straight")).metrics()[1:]
    assert {"loss/text/understand", "loss/flow/generate"} <= {name for row in rows for name in row}
    assert rows[0]["ratio/flow"] == pytest.approx(1, abs=1e-2)  # bfloat16
    seen: list[int] = []
    halved = Trainer.start(config, Path("halved"))
    with halved.run:
        assert not halved.train(lambda row: seen.append(int(row["step"])), lambda: bool(seen) and seen[-1] >= 1)
    again = Trainer.resume(Path("halved"), config)
    with again.run:
        assert again.train()
    one, other = (stored(Path(run, "checkpoints", "step_000002")) for run in ("straight", "halved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    before, after = load_policy(folder), load_policy("straight")
    assert isinstance(before, Showo2Policy)
    assert isinstance(after, Showo2Policy)
    moved = {n for n, p in before.model.named_parameters() if not torch.equal(p, after.model.get_parameter(n))}
    assert {name.split(".")[0] for name in moved} >= {"showo", "diffusion_head_a", "und_trans", "fusion_proj"}


def test_an_adapter_alone_is_trained(small: list[str]) -> None:
    pytest.importorskip("peft")
    adapter = ["adapter={rank: 2, modules: [attention, mlp]}", "precision={compute: null}", "steps=1"]
    config = load_config(TrainConfig, shipped_configs()["showo2_1p5b"], [*small, *adapter])
    trainer = Trainer.start(config, Path("run"))
    with trainer.run:
        assert trainer.train()
    names = {p.name for p in Path("run/checkpoints/step_000001").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    policy = load_policy("run")
    assert isinstance(policy, Showo2Policy)
    assert policy.adapter is not None


def test_the_commands_work_on_its_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = ["generate", str(folder), "--prompt", "a star", "--num-steps", "2", "--device", "cpu"]
    assert main([*drawn, "--out", "drawings"]) == 0
    with Image.open("drawings/00000.png") as picture:
        assert picture.size == (32, 32)
    asked = ["ask", str(folder), "what color ?", "--image", "drawings/00000.png", "--max-new-tokens", "3"]
    assert main([*asked, "--device", "cpu"]) == 0
    assert main(["init", "showo2-tiny", "fresh", "seed=3"]) == 0
    assert main(["init", "showo2-tiny", "other", "image_size=40"]) == 2
    assert "multiple of 16" in capsys.readouterr().err
    assert not Path("other").exists()
