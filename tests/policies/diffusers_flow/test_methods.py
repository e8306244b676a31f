"""Methods of flows on small random pipelines, and folders that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lvrpo.config import load_config, shipped_configs
from lvrpo.errors import InputError
from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy
from lvrpo.policies.loading import load_policy
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer

WHOLE = ("adapter=null", "limits.gradient_checkpointing=false")
JOINT = "rollout.guided_logprobs=joint"
FRESH = (*WHOLE, JOINT, "rollout.sampler=ode", "rollout.window={kind: fast}", "rollout.num_steps=2")
RECORDED = (*WHOLE, "rollout.num_steps=3")
METHODS = {
    "flow_grpo": (*RECORDED, "flow={kind: flow_grpo, top_bottom_k: 2, kl_coef: 0.1, kl: velocity}"),
    "guard": (*RECORDED, "flow={kind: flow_grpo, top_bottom_k: 2, ratio: guard, step_weighting: level}"),
    "dance_grpo": (*RECORDED, "rollout.sampler=dance_sde", "flow={kind: dance_grpo, top_bottom_k: 2}"),
    "mix_grpo": (*RECORDED, "rollout.window={kind: sliding, size: 1}", "flow={kind: mix_grpo, top_bottom_k: 2}"),
    "nft": (*FRESH, "flow={kind: nft, unguided_kl_coef: 0.1, reference_guidance: 2.0}"),
    "awm": (*FRESH, "flow={kind: awm}"),
    "dpo": (*FRESH, "flow={kind: dpo}"),
    "best_of": (*FRESH, "flow={kind: best_of}"),
}


@pytest.fixture
def small() -> Callable[[Path], list[str]]:
    """The shipped recipe at small numbers, and a reward that spreads."""
    return lambda folder: [
        f"policy={folder}",
        "device=cpu",
        "adapter.rank=2",
        "precision.compute=null",
        "data.prompts_per_step={generate: 1, understand: 0, edit: 0, reason: 0}",
        "rollout.group_size=4",
        "rollout.num_steps=3",
        "rollout.image_size=[32, 32]",
        "flow.top_bottom_k=2",
        "rewards=[{name: 'spread:Spread'}]",
        "allow_code=[spread]",
        "validation={every: 2, prompts: {generate: 1}}",
        "reference_eval_every=2",
        "steps=2",
    ]


def train(config: TrainConfig, folder: str) -> None:
    trainer = Trainer.start(config, Path(folder))
    with trainer.run:
        assert trainer.train()


EDITS = {"kontext-tiny": ("flow_grpo", "nft"), "qwen-image-edit-tiny": ("flow_grpo",)}
"""Methods that cover what the calls of a pipeline with edits add."""
RUNS = [(method, kind) for kind in ("sd3-tiny", *EDITS) for method in EDITS.get(kind, METHODS)]


@pytest.mark.parametrize(("method", "kind"), RUNS)
def test_every_method_of_flows_trains(
    method: str, kind: str, small: Callable[[Path], list[str]], folders: Callable[[str], Path]
) -> None:
    settings = [*small(folders(kind)), *METHODS[method], "rollout.guidance_scale=2", "steps=1"]
    if kind == "kontext-tiny":  # its guidance has no branch to detach
        settings += [JOINT, "data.prompts_per_step={generate: 1, understand: 0, edit: 1, reason: 0}"]
    if kind == "qwen-image-edit-tiny":
        settings += ["data.prompts_per_step={edit: 1}", "validation.prompts={edit: 1}"]
    train(load_config(TrainConfig, shipped_configs()["sd35_medium"], settings), "run")
    (row,) = RunDirectory.read(Path("run")).metrics()[1:]
    assert row["grad_norm/generate"] > 0
    assert ("loss/flow/edit" in row) == (kind in EDITS)
    assert all(check["ok"] for check in json.loads(Path("run/contract.json").read_text()))


def test_a_reward_that_needs_a_reading_side_is_refused_before_anything_is_loaded(
    small: Callable[[Path], list[str]], folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(DiffusersPolicy, "load", never)
    changes = [*small(folders("sd3-tiny")), "rewards=[{name: 'spread:Spread'}, {name: self_vqa, weight: 0.1}]"]
    config = load_config(TrainConfig, shipped_configs()["sd35_medium"], changes)
    with pytest.raises(
        InputError, match=r"rewards\.self_vqa: asks the understanding side of the policy's initial weights"
    ):
        Trainer.start(config, Path("run"))
    assert not Path("run").exists()


def test_another_model_judges_in_its_place(small: Callable[[Path], list[str]], folders: Callable[[str], Path]) -> None:
    rewards = "rewards=[{name: 'spread:Spread'}, {name: self_vqa, judge: tiny, weight: 0.1}]"
    settings = [*small(folders("sd3-tiny")), rewards, "steps=1"]
    train(load_config(TrainConfig, shipped_configs()["sd35_medium"], settings), "run")
    (row,) = RunDirectory.read(Path("run")).metrics()[1:]
    assert 0 <= row["reward/generate/self_vqa"] <= 1


# --- folders ---


def change_index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"_class_name": "StableDiffusionXLPipeline"},
            "holds a StableDiffusionXLPipeline of diffusers: not supported: lvrpo trains StableDiffusion3Pipeline, .*; "
            "the nearest is StableDiffusion3Pipeline",
        ),
        ({"_class_name": 3}, "holds a 3 of diffusers: not supported"),
        ({"transformer": ["evil", "Model"]}, "transformer is evil.Model: only classes of diffusers and transformers"),
        ({"tokenizer": ["os", "system"]}, "tokenizer is os.system: only classes of diffusers and transformers"),
        ({"vae": ["diffusers", "NoSuchClass"]}, "vae is diffusers.NoSuchClass: only classes of diffusers"),
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "has a SD3Transformer2DModel: restore it"),
        ({"scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler DDIMScheduler: lvrpo samples by the sigmas of"),
        ({"text_encoder": [None, None]}, r"text_encoder is \[None, None\], not \[library, class\]"),
        ({"text_encoder_3": "T5"}, "text_encoder_3 is 'T5', not"),
    ],
)
def test_a_folder_that_names_other_parts_is_refused(changes: dict[str, object], words: str, sd3: Path) -> None:
    (sd3 / "evil.py").write_text("raise SystemExit('code ran')")
    change_index(sd3, **changes)
    with pytest.raises(InputError, match=words):
        load_policy(sd3)


def test_the_third_text_encoder_may_be_absent(sd3: Path) -> None:
    change_index(sd3, text_encoder_3=[None, None], tokenizer_3=[None, None])
    policy = load_policy(sd3)
    with pytest.raises(InputError, match=r"a prompt of .* tokens: .*: the limit is 77: shorten it"):
        policy.check_text("letters " * 20)
    policy.check_text("letters")


def damage(file: Path, how: str) -> None:
    tensors = load_file(file)
    file.unlink()
    name = next(iter(tensors))
    if how == "gone":
        return
    if how == "cut":
        file.write_bytes(b"12345678")
        return
    if how == "nan":
        tensors[name].view(-1)[0] = float("nan")
    elif how == "int":
        tensors[name] = tensors[name].to(torch.int32)
    elif how == "shape":
        tensors[name] = tensors[name][..., :-1].contiguous()
    else:
        del tensors[name]
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("how", ["gone", "cut", "nan", "int", "shape", "lacks"])
@pytest.mark.parametrize("part", ["transformer/diffusion_pytorch_model", "text_encoder_3/model"])
def test_damaged_weights_are_one_line(part: str, how: str, sd3: Path) -> None:
    damage(sd3 / f"{part}.safetensors", how)
    with pytest.raises(InputError) as caught:
        load_policy(sd3)
    assert part.partition("/")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "tokenizer_3/tokenizer_config.json"])
def test_a_tokenizer_without_a_file_is_one_line(name: str, sd3: Path) -> None:
    (sd3 / name).unlink()
    folder, _, file = name.partition("/")
    with pytest.raises(InputError, match=f"sd3/{folder}: holds no {file}.*: fetch the files again"):
        load_policy(sd3)
