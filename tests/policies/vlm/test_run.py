"""Whole runs of a small random Qwen3-VL with the shipped recipe, and the commands on folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from stored import stored

from lvrpo.cli import main
from lvrpo.config import load_config, shipped_configs
from lvrpo.data.scenes import ScenePrompts
from lvrpo.errors import InputError
from lvrpo.evaluation.experiment import held_out_plan
from lvrpo.evaluation.samples import png
from lvrpo.policies.image_text_to_text import ImageTextToTextPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.sources import open_parts
from lvrpo.training.trainer import Trainer

pytestmark = pytest.mark.parametrize("folder", ["qwen3_vl"], indirect=True)


@pytest.fixture
def small(folder: Path) -> list[str]:
    """The shipped recipe at small numbers, and a reward that spreads."""
    return [
        f"policy={folder}",
        "device=cpu",
        "data.prompts_per_step={generate: 0, understand: 2, edit: 0, reason: 2}",
        "data.scenes.size=32",
        "rollout.group_size=4",
        "rollout.max_new_tokens=6",
        "rewards=[{name: 'spread:Spread'}, {name: exact_answer, weight: 0.1}, {name: agreement, max_failed: 1}]",
        "allow_code=[spread]",
        "optimizer.warmup_steps=0",
        "optimizer.adamw_lr=1e-3",
        "validation={every: 2, prompts: {understand: 2, reason: 1}}",
        "reference_eval_every=2",
        "reference_eval_group_size=2",
        "steps=2",
    ]


@pytest.fixture
def config(small: list[str]) -> TrainConfig:
    return load_config(TrainConfig, shipped_configs()["qwen3_vl_2b"], small)


def test_the_recipe_runs_and_goes_on_bit_for_bit(config: TrainConfig, folder: Path) -> None:
    straight = Trainer.start(config, Path("straight"))
    with straight.run:
        assert straight.train()
    assert all(check["ok"] for check in json.loads(Path("straight/contract.json").read_text()))
    rows = RunDirectory.read(Path("straight")).metrics()[1:]
    assert {"loss/text/understand", "loss/text/reason"} <= {name for row in rows for name in row}
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
    assert isinstance(after, ImageTextToTextPolicy)
    assert all(not torch.equal(p, after.get_parameter(name)) for name, p in before.named_parameters())


def test_float32_keeps_the_step_0_contract_exactly(small: list[str]) -> None:
    settings = [*small, "precision.compute=null", "steps=1", "limits.gradient_checkpointing=true"]
    trainer = Trainer.start(load_config(TrainConfig, shipped_configs()["qwen3_vl_2b"], settings), Path("run"))
    with trainer.run:
        assert trainer.train()
    checks = {check["check"]: check for check in json.loads(Path("run/contract.json").read_text())}
    assert all(check["ok"] for check in checks.values())
    assert checks["replay, text, own batch: max |difference|"]["value"] == 0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
def test_an_adapter_alone_is_trained(small: list[str], folder: Path) -> None:
    pytest.importorskip("peft")
    settings = [*small, "steps=1", "adapter={rank: 2}"]
    trainer = Trainer.start(load_config(TrainConfig, shipped_configs()["qwen3_vl_2b"], settings), Path("run"))
    with trainer.run:
        assert trainer.train()
    assert all(check["ok"] for check in json.loads(Path("run/contract.json").read_text()))
    contexts, texts = [("a red circle",)], ["yes"]
    moved = load_policy("run").text_logprob(contexts, texts)
    assert not torch.equal(moved, load_policy(folder).text_logprob(contexts, texts))
    assert main(["export", "run", "whole"]) == 0
    assert torch.allclose(load_policy("whole").text_logprob(contexts, texts), moved, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["data.prompts_per_step.generate=1"], "generate=1: policy=.* reads pictures and does not draw them: set it"),
        (["data.prompts_per_step.edit=1"], "edit=1: policy=.* reads pictures and does not draw them: set it to 0"),
        (
            ["data.scenes.weights={}", "data.prompts_per_step.reason=9"],
            "reason=9: prompt .* asks for a picture, and policy=.* reads pictures and does not draw them: set data.sc",
        ),
        (
            ["rewards=[{name: exact_answer}, {name: self_vqa}]"],
            "rewards.self_vqa: scores pictures that are drawn, and policy=.* reads pictures and does not draw them",
        ),
        (["adapter={modules: [time]}"], "no time of understand or generate: the model has attention "),
        (["rollout.guidance_scale=3"], "rollout.guidance_scale=3.0: is of flow, tokens and masked|is of"),
    ],
)
def test_what_a_run_cannot_do_is_one_line(small: list[str], settings: list[str], words: str) -> None:
    config = load_config(TrainConfig, shipped_configs()["qwen3_vl_2b"], [*small, *settings])
    with pytest.raises(InputError, match=words):
        Trainer.start(config, Path("run"))
    assert not Path("run").exists()


def test_commands_work_on_a_folder(small: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = next(part for part in ScenePrompts().prompt("understand", 0).parts if not isinstance(part, str))
    Path("p.png").write_bytes(png(picture))
    model = str(folder)
    assert main(["ask", model, "--image", "p.png", "what is it?", "--max-new-tokens", "4"]) == 0
    assert main(["ask", model, "--image", "p.png", "what is it?", "--max-new-tokens", "4", "--think"]) == 0
    assert main(["evaluate", model, "--benchmark", "understand,reason", "--n", "6", "--json", "e.json"]) == 0
    categories = json.loads(Path("e.json").read_text())["scores"]["reason"]["categories"]
    assert set(categories) == {"sum", "compare"}
    assert main(["check", "qwen3_vl_2b", *small, "--allow-code"]) == 0
    assert "contract" in capfd.readouterr().out
    for wrong, words in (
        (["evaluate", model, "--benchmark", "edit", "--n", "2"], "this model reads pictures and does not draw them"),
        (["edit", model, "redder", "--image", "p.png", "--out", "x.png"], "reads pictures and does not draw them"),
        (["generate", model, "--prompt", "a circle", "--out", "drawn"], "reads pictures and does not draw them"),
        (["ask", model, "--image", "p.png", "<|im_end|>"], "holds <|im_end|>, a marker of the model"),
    ):
        assert main(wrong) == 2
        assert words in capfd.readouterr().err


def test_held_out_benchmarks_are_those_that_it_can_answer(config: TrainConfig) -> None:
    names = held_out_plan(config, []).benchmarks
    assert {"understand", "reason"} <= set(names)
    assert not any(name.startswith(("generate", "edit")) for name in names)
    parts = open_parts(config.model_copy(update={"rewards": config.rewards[1:2]}))
    assert all(prompt.output == ("text",) for prompts in parts.validator.prompts.values() for prompt in prompts)
