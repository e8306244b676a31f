"""Whole runs of a small random Show-o with the shipped recipe, and the commands on its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stored import stored

from lvrpo.cli import main
from lvrpo.config import load_config, shipped_configs
from lvrpo.errors import InputError
from lvrpo.policies.loading import load_policy
from lvrpo.policies.showo.policy import ShowoPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.setup import open_policy
from lvrpo.training.trainer import Trainer


@pytest.fixture
def small(folder: Path) -> list[str]:
    """The shipped recipe at small numbers, and a reward that spreads."""
    return [
        f"policy={folder}",
        "device=cpu",
        "data.prompts_per_step={generate: 2, understand: 1, edit: 0, reason: 2}",
        "rollout.group_size=4",
        "rollout.max_new_tokens=4",
        "rollout.num_steps=3",
        "rewards=[{name: 'spread:Spread'}]",
        "allow_code=[spread]",
        "optimizer.warmup_steps=0",
        "optimizer.adamw_lr=1e-3",
        "validation={every: 2, prompts: {generate: 1, understand: 1, reason: 1}}",
        "reference_eval_every=2",
        "reference_eval_group_size=2",
        "steps=2",
    ]


def test_the_recipe_runs_and_goes_on_bit_for_bit(small: list[str], folder: Path) -> None:
    config = load_config(TrainConfig, shipped_configs()["showo"], small)
    straight = Trainer.start(config, Path("straight"))
    with straight.run:
        assert straight.train()
    rows = RunDirectory.read(Path("straight")).metrics()[1:]
    losses = {"loss/text/understand", "loss/masked/generate", "loss/text/reason", "loss/masked/reason"}
    assert losses <= {name for row in rows for name in row}
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
    assert isinstance(before, ShowoPolicy)
    assert isinstance(after, ShowoPolicy)
    moved = {name for name, p in before.named_parameters() if not torch.equal(p, after.get_parameter(name))}
    assert {name.split(".")[0] for name in moved} == {"model"}
    assert {name.split(".")[1] for name in moved} == {"model", "lm_head"}


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_alone_is_trained(small: list[str], folder: Path) -> None:
    pytest.importorskip("peft")
    settings = [*small, "steps=1", "adapter={rank: 2}"]
    trainer = Trainer.start(load_config(TrainConfig, shipped_configs()["showo"], settings), Path("run"))
    with trainer.run:
        assert trainer.train()
    assert all(check["ok"] for check in json.loads(Path("run/contract.json").read_text()))
    tuned, base = load_policy("run"), load_policy(folder)
    assert isinstance(tuned, ShowoPolicy)
    contexts, texts = [("a red circle",)], ["yes"]
    moved = tuned.text_logprob(contexts, texts)
    assert not torch.equal(moved, base.text_logprob(contexts, texts))
    assert torch.equal(tuned.make_reference().text_logprob(contexts, texts), base.text_logprob(contexts, texts))
    (step,) = Path("run/checkpoints").glob("step_000001")
    prefix = "base_model.model.showo.model.layers.0."
    names = [name for name in load_file(step / "adapter_model.safetensors") if name.startswith(prefix)]
    layers = {name.removeprefix(prefix).partition(".lora_")[0] for name in names}
    projections = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "dense")}
    assert layers == projections | {"mlp.fc1", "mlp.fc2"}
    assert main(["export", "run", "whole"]) == 0
    assert torch.allclose(load_policy("whole").text_logprob(contexts, texts), moved, atol=1e-5)


@pytest.mark.parametrize("likelihood", ["{kind: path}", "{kind: monte_carlo, draws: 2}"])
def test_float32_keeps_the_step_0_contract_exactly(small: list[str], likelihood: str) -> None:
    exact = ["precision.compute=null", "rollout.guided_logprobs=joint", f"rollout.masked_likelihood={likelihood}"]
    trainer = Trainer.start(
        load_config(TrainConfig, shipped_configs()["showo"], [*small, *exact, "steps=1"]), Path("run")
    )
    with trainer.run:
        assert trainer.train()
    checks = {check["check"]: check for check in json.loads(Path("run/contract.json").read_text())}
    assert all(check["ok"] for check in checks.values())
    for kind in ("text", "masked image tokens"):
        assert checks[f"replay, {kind}, own batch: max |difference|"]["value"] == 0
    assert checks["gradient of the masked image tokens divergence"]["value"] > 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.prompts_per_step.edit=1", "prompts_per_step.edit=1: policy=.* does understand, generate, reason alone"),
        ("masked=null", "masked: policy=.* draws such segments, and nothing says how they are trained"),
        (
            "adapter={modules: [tower]}",
            "no tower of understand or generate: the model has attention .generate., attention",
        ),
    ],
)
def test_what_a_run_cannot_do_is_one_line(small: list[str], setting: str, words: str) -> None:
    config = load_config(TrainConfig, shipped_configs()["showo"], [*small, setting])
    with pytest.raises(InputError, match=words):
        open_policy(config)


def test_commands_work_on_a_folder(small: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "showo-tiny", "model", "width=32", "seed=3"]) == 0
    assert "a random Show-o of" in capfd.readouterr().out
    draw = ["generate", "model", "--out", "drawn", "--prompt", "a red circle", "--think", "--max-new-tokens", "4"]
    assert main(draw) == 0
    assert main(["ask", "model", "--image", "drawn/00000.png", "what is it?", "--max-new-tokens", "4"]) == 0
    assert main(["evaluate", "model", "--benchmark", "understand,reason", "--n", "2", "--sampled-prompts", "0"]) == 0
    assert main(["check", "showo", *small, "--allow-code"]) == 0
    assert "contract" in capfd.readouterr().out
    for wrong, words in (
        (["edit", "model", "redder", "--image", "drawn/00000.png", "--out", "x.png"], "draws from text alone"),
        (["init", "showo-tiny", "other", "image_size=36"], "image_size=36: must be a multiple of patch_size=8"),
        (["init", "showo-tiny", "other", "heads=3"], "heads=3: a width of 64 must be a multiple of 4 x heads"),
        (["init", "showo-tiny", "other", "positions=140"], "positions=140: a drawing takes 147: use more"),
        (["init", "showo-tiny", "other", "--train-autoencoder", "5"], "is of bagel-tiny"),
    ):
        assert main(wrong) == 2
        assert words in capfd.readouterr().err
