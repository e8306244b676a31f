"""Whole runs of a small random Janus with the shipped recipe, and the commands on its folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stored import stored

from lvrpo.cli import main
from lvrpo.config import load_config, shipped_configs
from lvrpo.errors import InputError
from lvrpo.evaluation.experiment import held_out_plan
from lvrpo.policies.janus.policy import JanusPolicy
from lvrpo.policies.loading import load_policy
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
        "data.prompts_per_step={generate: 2, understand: 1, edit: 0, reason: 3}",
        "rollout.group_size=4",
        "rollout.max_new_tokens=6",
        "rewards=[{name: 'spread:Spread'}, {name: self_vqa, weight: 0.1}]",
        "allow_code=[spread]",
        "optimizer.warmup_steps=0",
        "optimizer.adamw_lr=1e-3",
        "validation={every: 2, prompts: {generate: 1, understand: 1, reason: 1}}",
        "reference_eval_every=2",
        "reference_eval_group_size=2",
        "steps=2",
    ]


def test_the_recipe_runs_and_goes_on_bit_for_bit(small: list[str], folder: Path) -> None:
    config = load_config(TrainConfig, shipped_configs()["janus_lvrpo"], small)
    straight = Trainer.start(config, Path("straight"))
    with straight.run:
        assert straight.train()
    rows = RunDirectory.read(Path("straight")).metrics()[1:]
    losses = {"loss/text/understand", "loss/tokens/generate", "loss/text/reason", "loss/tokens/reason"}
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
    assert isinstance(after, JanusPolicy)
    moved = {name for name, p in before.model.named_parameters() if not torch.equal(p, after.model.get_parameter(name))}
    assert {name.split(".")[1] for name in moved} == {
        *("language_model", "vision_model", "aligner", "weight"),
        *("generation_embeddings", "generation_aligner", "generation_head"),
    }


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_alone_is_trained_and_peft_reads_it(small: list[str], folder: Path) -> None:
    peft = pytest.importorskip("peft")
    settings = [*small, "steps=1", "adapter={rank: 2, modules: [attention, mlp, connector, head]}"]
    trainer = Trainer.start(load_config(TrainConfig, shipped_configs()["janus_lvrpo"], settings), Path("run"))
    with trainer.run:
        assert trainer.train()
    assert all(check["ok"] for check in json.loads(Path("run/contract.json").read_text()))
    tuned, base = load_policy("run"), load_policy(folder)
    assert isinstance(tuned, JanusPolicy)
    assert isinstance(base, JanusPolicy)
    contexts, texts = [("a red circle",)], ["yes"]
    moved = tuned.text_logprob(contexts, texts)
    assert not torch.equal(moved, base.text_logprob(contexts, texts))
    reference = tuned.make_reference()
    assert torch.equal(reference.text_logprob(contexts, texts), base.text_logprob(contexts, texts))
    table = tuned.model.get_input_embeddings().weight
    assert reference.model.get_input_embeddings().weight is table

    (step,) = Path("run/checkpoints").glob("step_000001")
    base.model = peft.PeftModel.from_pretrained(base.model, step).merge_and_unload()
    assert torch.allclose(base.text_logprob(contexts, texts), moved, atol=1e-5)
    assert main(["export", "run", "whole"]) == 0
    assert torch.allclose(load_policy("whole").text_logprob(contexts, texts), moved, atol=1e-5)


def test_float32_keeps_the_step_0_contract_exactly(small: list[str]) -> None:
    settings = [*small, "precision.compute=null", "steps=1", "rollout.guided_logprobs=joint"]
    trainer = Trainer.start(load_config(TrainConfig, shipped_configs()["janus_lvrpo"], settings), Path("run"))
    with trainer.run:
        assert trainer.train()
    checks = {check["check"]: check for check in json.loads(Path("run/contract.json").read_text())}
    assert all(check["ok"] for check in checks.values())
    for kind in ("text", "image tokens"):
        assert checks[f"replay, {kind}, own batch: max |difference|"]["value"] == 0
    assert checks["gradient of the image tokens divergence"]["value"] > 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.prompts_per_step.edit=1", "prompts_per_step.edit=1: policy=.* does understand, generate, reason alone"),
        ("rollout.num_steps=4", "rollout.num_steps=4: is of flow and masked"),
        ("tokens=null", "tokens: policy=.* draws such segments, and nothing says how they are trained"),
        (
            "adapter={modules: [time]}",
            "no time of understand or generate: the model has attention .generate., attention",
        ),
    ],
)
def test_what_a_run_cannot_do_is_one_line(small: list[str], setting: str, words: str) -> None:
    config = load_config(TrainConfig, shipped_configs()["janus_lvrpo"], [*small, setting])
    with pytest.raises(InputError, match=words):
        open_policy(config)


def test_commands_work_on_a_folder(small: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "janus-tiny", "model", "width=32", "seed=3"]) == 0
    assert "a random Janus of" in capfd.readouterr().out
    draw = ["generate", "model", "--out", "drawn", "--prompt", "a red circle", "--think", "--max-new-tokens", "4"]
    assert main(draw) == 0
    assert main(["ask", "model", "--image", "drawn/00000.png", "what is it?", "--max-new-tokens", "4"]) == 0
    assert main(["evaluate", "model", "--benchmark", "understand,reason", "--n", "2", "--sampled-prompts", "0"]) == 0
    assert main(["check", "janus_lvrpo", *small, "--allow-code"]) == 0
    assert "contract" in capfd.readouterr().out
    for wrong, words in (
        (
            ["evaluate", "model", "--benchmark", "edit", "--n", "2"],
            "this model does understand, generate, reason alone",
        ),
        (["edit", "model", "redder", "--image", "drawn/00000.png", "--out", "x.png"], "draws from text alone"),
        (["init", "janus-tiny", "other", "image_size=36"], "image_size=36: must be a multiple of patch_size=8"),
        (["init", "janus-tiny", "other", "--train-autoencoder", "5"], "is of bagel-tiny"),
    ):
        assert main(wrong) == 2
        assert words in capfd.readouterr().err
    config = load_config(TrainConfig, shipped_configs()["janus_lvrpo"], small)
    assert "edit" not in held_out_plan(config, []).benchmarks
    assert "reason" in held_out_plan(config, []).benchmarks
