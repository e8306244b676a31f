"""Whole runs of a small random model of every family with its shipped recipe, and the commands on its folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Family
from PIL import Image
from safetensors.torch import load_file
from small_vlm import without_videos
from stored import killed_copy, stored

from lvrpo.cli import main, parse_command
from lvrpo.commands.quickstart import Recipe, plan, recipe_of, training_config
from lvrpo.config import load_config, shipped_configs
from lvrpo.data.scenes import ScenePrompts
from lvrpo.errors import InputError
from lvrpo.evaluation.experiment import held_out_plan
from lvrpo.evaluation.samples import png
from lvrpo.evaluation.suite import evaluate, find_benchmarks
from lvrpo.policies.adapter import AdaptablePolicy
from lvrpo.policies.loading import load_policy
from lvrpo.training.components import open_components
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer

ADAPTED = {
    "janus": "adapter={rank: 2, modules: [attention, mlp, connector, head]}",
    "emu3": "adapter={rank: 2}",
    "showo": "adapter={rank: 2}",
    "mmada": "adapter={rank: 2}",
    "showo2": "adapter={rank: 2, modules: [attention, mlp]}",
    "qwen3_vl": "adapter={rank: 2}",
    "sd3": "adapter={rank: 2, modules: [attention]}",
}
MOVED = {
    "janus": {"language_model", "vision_model", "aligner", "lm_head", "generation_embeddings"}
    | {"generation_aligner", "generation_head"},
    "emu3": {"text_model", "lm_head"},
    "showo": {"model", "lm_head"},
    "mmada": {"model", "lm_head"},
    "showo2": {"showo", "diffusion_head_a", "und_trans", "fusion_proj"},
    "qwen3_vl": {"language_model", "visual"},
    "sd3": {"transformer_blocks", "context_embedder", "proj_out"},
}
"""Parts that training changes, by their name in the path of a parameter."""
LAYERS = {
    "janus": {"language_model", "aligner", "generation_aligner", "generation_head", "lm_head"},
    "emu3": {"text_model"},
    "showo": {"showo"},
    "mmada": {"transformer", "blocks", "attn_out", "ff_out", "ff_proj"},
}
"""What the names in the files of an adapter begin with."""
PEFT_READS = ("janus", "emu3", "qwen3_vl")
"""Families whose model is a class of transformers; of the others, the layers are made by their published names."""


@pytest.fixture(scope="module", autouse=True)
def images_alone() -> Iterator[None]:
    """See ``without_videos``."""
    with without_videos():
        yield


@pytest.fixture
def folder(name: str, family_folder: Callable[[str], Path]) -> Path:
    return family_folder(name)


@pytest.fixture
def family(name: str) -> Family:
    return FAMILIES[name]


def config_of(family: Family, folder: Path, *further: str) -> TrainConfig:
    return load_config(TrainConfig, shipped_configs()[family.recipe], [*family.overrides(folder), *further])


def train(config: TrainConfig, folder: str) -> None:
    trainer = Trainer.start(config, Path(folder))
    with trainer.run:
        assert trainer.train()


def open_model(folder: str | Path) -> AdaptablePolicy:
    policy = load_policy(folder)
    assert isinstance(policy, AdaptablePolicy)
    return policy


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recipe_runs_and_goes_on_bit_for_bit(name: str, family: Family, folder: Path) -> None:
    config = config_of(family, folder, "checkpoint_every=1")
    train(config, "straight")
    rows = RunDirectory.read(Path("straight")).metrics()[1:]
    assert family.losses <= {metric for row in rows for metric in row}
    if "ratio/flow" in rows[0]:
        assert rows[0]["ratio/flow"] == pytest.approx(1, abs=1e-2)  # bfloat16
    killed = killed_copy(Path("straight"), 1)
    again = Trainer.resume(killed, config)
    with again.run:
        assert again.state.step == 1
        assert again.train()
    one, other = (stored(run / "checkpoints" / "step_000002") for run in (Path("straight"), killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)

    before, after = open_model(folder), open_model("straight")
    moved = {n for n, p in before.named_parameters() if not torch.equal(p, after.get_parameter(n))}
    assert MOVED[name] <= {part for parameter in moved for part in parameter.split(".")}
    assert all(before.get_parameter(n).requires_grad for n in moved)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_alone_is_trained_and_the_step_0_contract_is_exact_in_float32(
    name: str, family: Family, folder: Path
) -> None:
    peft = pytest.importorskip("peft")
    exact = ("rollout.guided_logprobs=joint",) if name in ("janus", "emu3", "showo", "mmada") else ()
    train(config_of(family, folder, ADAPTED[name], "precision.compute=null", "steps=1", *exact), "run")
    checks = {check["check"]: check for check in json.loads(Path("run/contract.json").read_text())}
    assert all(check["ok"] for check in checks.values())
    for kind in family.replays:
        assert checks[f"replay, {kind}, own batch: max |difference|"]["value"] == 0
        if kind != "text":
            assert checks[f"gradient of the {kind} divergence"]["value"] > 0

    tuned, base = open_model("run"), open_model(folder)
    assert tuned.adapter is not None
    (step,) = Path("run/checkpoints").glob("step_000001")
    assert not (step / "model.safetensors").exists()
    names = [n.removeprefix("base_model.model.") for n in load_file(step / "adapter_model.safetensors")]
    parts = {part for n in names for part in n.split(".")}
    assert LAYERS.get(name, set()) <= parts
    if name == "showo":
        first = [n.removeprefix("showo.model.layers.0.") for n in names if n.startswith("showo.model.layers.0.")]
        projections = {f"self_attn.{each}" for each in ("q_proj", "k_proj", "v_proj", "dense")}
        assert {n.partition(".lora_")[0] for n in first} == projections | {"mlp.fc1", "mlp.fc2"}
    assert main(["export", "run", "whole"]) == 0
    whole = open_model("whole")
    if "text" not in family.replays:
        moved = {n for n, p in base.named_parameters() if not torch.equal(p, whole.get_parameter(n))}
        assert len(moved) > 8
        assert all(".attn" in n for n in moved)
        return
    contexts, texts = [("a red circle",)], ["yes"]
    changed = tuned.text_logprob(contexts, texts)
    assert not torch.equal(changed, base.text_logprob(contexts, texts))
    assert torch.equal(tuned.make_reference().text_logprob(contexts, texts), base.text_logprob(contexts, texts))
    assert torch.allclose(whole.text_logprob(contexts, texts), changed, atol=1e-5)
    if name in PEFT_READS:
        base.model = peft.PeftModel.from_pretrained(base.model, step).merge_and_unload()
        assert torch.allclose(base.text_logprob(contexts, texts), changed, atol=1e-5)
        return
    (file,) = (file.name for file in folder.glob("*.safetensors"))
    merged = peft.PeftModel.from_pretrained(published_layers(folder / file), step).merge_and_unload().state_dict()
    for key, value in load_file(Path("whole", file)).items():
        assert key not in merged or torch.allclose(value, merged[key], atol=1e-6)


def published_layers(file: Path) -> torch.nn.Module:
    """Linear layers under their names in a file of weights, which are those in the published class."""
    root = torch.nn.Module()
    for name, weight in load_file(file).items():
        *parents, layer, kind = name.split(".")
        if kind != "weight" or weight.ndim != 2:
            continue
        at = root
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.add_module(layer, torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False))
        at.get_submodule(layer).weight = torch.nn.Parameter(weight)
    return root


NO_EDITS = ("data.prompts_per_step.edit=1", "edit=1: policy=.* does understand, generate, reason alone")
NO_DRAWING = "reads images and does not draw them"
REFUSED: list[tuple[str, str, str]] = [
    ("janus", *NO_EDITS),
    ("janus", "rollout.num_steps=4", "rollout.num_steps=4: applies to flow and masked"),
    ("janus", "rollout.image_size=[64, 64]", r"image_size=\(64, 64\): this model draws 32 x 32"),
    ("janus", "tokens=null", "tokens: policy=.* draws such segments, and nothing says how they are trained"),
    ("janus", "adapter={modules: [time]}", "no time of understand or generate: the model has attention .generate."),
    ("emu3", *NO_EDITS),
    ("emu3", "rollout.image_size=[36, 32]", r"image_size=\(36, 32\): this model draws in tokens of 8 x 8"),
    ("emu3", "adapter={modules: [tower]}", "no tower of understand or generate: the model has attention"),
    ("showo", *NO_EDITS),
    ("showo", "masked=null", "masked: policy=.* draws such segments, and nothing says how they are trained"),
    ("showo", "adapter={modules: [tower]}", "no tower of understand or generate: the model has attention .generate."),
    ("showo", "rollout.block_length=4", "rollout.block_length=4: applies to policies that write by masked decoding"),
    ("janus", "rollout.tokens_per_step=4", "rollout.tokens_per_step=4: applies to masked, and policy="),
    ("mmada", *NO_EDITS),
    ("showo2", *NO_EDITS),
    (
        "showo2",
        "data={scenes: {weights: {}}, prompts_per_step: {generate: 0, understand: 2, edit: 0, reason: 9}}",
        "reason=9: prompt .* asks for an image after a text, and policy=.* draws after a prompt alone: set data.sc",
    ),
    ("qwen3_vl", "data.prompts_per_step.generate=1", f"generate=1: policy=.* {NO_DRAWING}: set it"),
    ("qwen3_vl", "data.prompts_per_step.edit=1", f"edit=1: policy=.* {NO_DRAWING}: set it to 0"),
    (
        "qwen3_vl",
        "data={scenes: {weights: {}}, prompts_per_step: {generate: 0, understand: 2, edit: 0, reason: 9}}",
        f"reason=9: prompt .* asks for an image, and policy=.* {NO_DRAWING}: set data.sc",
    ),
    (
        "qwen3_vl",
        "rewards=[{name: exact_answer}, {name: self_vqa}]",
        f"rewards.self_vqa: scores images that are drawn, and policy=.* {NO_DRAWING}",
    ),
    ("qwen3_vl", "adapter={modules: [time]}", "no time of understand or generate: the model has attention "),
    ("qwen3_vl", "rollout.guidance_scale=3", "rollout.guidance_scale=3.0: applies to"),
    ("sd3", "data.prompts_per_step={generate: 1, reason: 1}", "prompts_per_step.reason=1: policy=.* does generate al"),
    ("sd3", "data.prompts_per_step={understand: 1}", "prompts_per_step.understand=1: policy=.* does generate alone"),
    ("sd3", "rollout.image_size=[32, 36]", r"image_size=\[32, 36\]: must be multiples of 8: use \[32, 32\]"),
    ("sd3", "rollout.image_guidance_scale=2", "image_guidance_scale=2.0: this model guides by text alone"),
    ("sd3", "text.kl_coef=1", "text: policy=.* writes no such segments, only flow: leave it out"),
    ("sd3", "adapter={modules: [head]}", "adapter.modules: no head of understand or generate: the model has attention"),
    *(
        (
            "sd3",
            f"rewards=[{{name: 'spread:Spread'}}, {{name: {reward}, weight: 0.1}}]",
            f"rewards.{reward}: asks the understanding side of the policy's initial weights, and",
        )
        for reward in ("self_vqa", "caption_back", "semantic")
    ),
]


@pytest.mark.parametrize(("name", "setting", "words"), REFUSED, ids=[f"{n}-{s[:40]}" for n, s, _ in REFUSED])
def test_what_a_run_cannot_do_is_one_line(name: str, family: Family, folder: Path, setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        Trainer.start(config_of(family, folder, setting), Path("run"))
    assert "\n" not in str(caught.value)
    assert not Path("run").exists()


@pytest.mark.filterwarnings("ignore:.*middle square is resized")
@pytest.mark.parametrize(
    ("name", "task"),
    [
        *((name, "generate") for name in ("janus", "showo", "showo2")),
        *((name, "understand") for name in ("janus", "showo", "showo2", "qwen3_vl")),
    ],
)
def test_a_row_that_is_too_long_is_found_before_the_run(name: str, family: Family, folder: Path, task: str) -> None:
    Image.new("RGB", (32, 32), "red").save("red.png")
    given = {"images": ["red.png"], "answer": "red"} if task == "understand" else {}
    rows = [{"task": task, "prompt": "red " * n, "id": f"row {i}", **given} for i, n in enumerate((1, 1, 5000, 1))]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("held.jsonl").write_text(json.dumps({"task": task, "prompt": "blue", **given}))
    files = "jsonl: {train: rows.jsonl, validation: held.jsonl}"
    counts = {"generate": 0, "understand": 0, "reason": 0, task: 1}
    data = f"data={{source: jsonl, {files}, prompts_per_step: {json.dumps(counts)}}}"
    config = config_of(family, folder, data, "rewards=[{name: 'spread:Spread'}, {name: exact_answer}]")
    with pytest.raises(InputError, match=r"^rows.jsonl:3: prompt 'row 2': .* tokens.*, the limit is \d+: shorten it"):
        Trainer.start(config, Path("run"))
    assert not Path("run").exists()


DRAW = ("generate", "--out", "drawn", "--prompt", "a red circle")
THINKS = (*DRAW, "--think", "--max-new-tokens", "4")
ASK = ("ask", "--image", "p.png", "what is it?", "--max-new-tokens", "4")
SCORES = ("evaluate", "--n", "2", "--sampled-prompts", "0", "--benchmark")
EDIT = ("edit", "redder", "--image", "p.png", "--out", "x.png")
WORKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "janus": (THINKS, ASK, (*SCORES, "understand,reason")),
    "emu3": (THINKS, ASK, (*SCORES, "understand,reason")),
    "showo": (THINKS, ASK, (*SCORES, "understand,reason")),
    "mmada": (THINKS, ASK, (*SCORES, "understand,reason")),
    "showo2": ((*DRAW, "--num-steps", "2"), ASK, (*SCORES, "understand,reason")),
    "qwen3_vl": (ASK, (*ASK, "--think"), (*SCORES, "understand,reason")),
    "sd3": ((*DRAW, "--num-steps", "2"), SCORES[:-1]),  # without names: of what it can do
}
FAILS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "janus": (
        ((*SCORES, "edit"), "this model does understand, generate, reason alone"),
        (EDIT, "does understand, generate, reason alone: name a model of the task 'edit'"),
        ((*DRAW, "--force", "--num-steps", "4"), "--num-steps: applies to flow and masked, and this model generates t"),
        ((*SCORES, "generate", "--num-steps", "4"), "--num-steps: applies to flow and masked, and this model generat"),
    ),
    "emu3": (
        (EDIT, "does understand, generate, reason alone"),
        ((*DRAW, "--force", "--size", "33x32"), "in tokens of 8 x 8: use multiples of 8"),
    ),
    "showo": (
        (EDIT, "does understand, generate, reason alone"),
        ((*DRAW, "--force", "--renorm-min", ".5"), "--renorm-min: applies to flow, and this model generates text, ma"),
    ),
    "mmada": ((EDIT, "does understand, generate, reason alone"),),
    "showo2": ((EDIT, "does understand, generate, reason alone"),),
    "qwen3_vl": (
        ((*SCORES, "edit"), f"this model {NO_DRAWING}"),
        (EDIT, NO_DRAWING),
        (DRAW, NO_DRAWING),
        (("ask", "--image", "p.png", "<|im_end|>"), "holds <|im_end|>, a marker of the model"),
    ),
    "sd3": (
        (ASK, "does generate alone: name a model of the task 'understand'"),
        (EDIT, "does generate alone"),
        ((*DRAW, "--force", "--size", "33x32"), "must be multiples of 8"),
        ((*SCORES, "understand"), "this model does generate alone"),
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_commands_work_on_a_folder(name: str, family: Family, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image = next(part for part in ScenePrompts().prompt("understand", 0).parts if not isinstance(part, str))
    Path("p.png").write_bytes(png(image))
    for command, *options in WORKS[name]:
        assert main([command, str(folder), *options]) == 0, (command, options)
    assert Path("drawn/00000.png").is_file() == (name != "qwen3_vl")
    assert name == "qwen3_vl" or Path("drawn/00000.png").stat().st_size > 100
    assert main(["check", family.recipe, *family.overrides(folder), "--allow-code"]) == 0
    said = capfd.readouterr().out
    assert "contract" in said
    assert "at most, in the" in said
    for (command, *options), words in FAILS[name]:
        assert main([command, str(folder), *options]) == 2, (command, options)
        assert words in capfd.readouterr().err


@pytest.mark.parametrize("name", FAMILIES)
def test_held_out_prompts_are_those_that_it_can_answer(name: str, family: Family, folder: Path) -> None:
    side = {"sd3": ("scene_facts",), "qwen3_vl": ("exact_answer",)}.get(name, ("scene_facts", "exact_answer"))
    rewards = ", ".join(f"{{name: {reward}}}" for reward in side)
    config = config_of(family, folder, f"rewards=[{rewards}]")
    benchmarks = held_out_plan(config, []).benchmarks
    assert not any(benchmark.startswith("edit") for benchmark in benchmarks)
    assert ("understand" in benchmarks, "reason" in benchmarks) == ((name != "sd3",) * 2)
    assert any(benchmark.startswith("generate") for benchmark in benchmarks) == (name != "qwen3_vl")
    held_out = [prompt for prompts in open_components(config).validator.prompts.values() for prompt in prompts]
    possible = {"text": name != "sd3", "image": name != "qwen3_vl"}
    assert held_out
    assert all(possible[kind] for prompt in held_out for kind in prompt.output)


@pytest.mark.parametrize("model", ["tiny-token", "tiny-masked"])
def test_a_shipped_model_generates_and_answers(model: str) -> None:
    """Far above chance, on prompts of the test split."""
    sizes = {"generate_guided": 56, "understand": 56}
    found = evaluate(load_policy(model), find_benchmarks([*sizes]), sizes=sizes).results()
    assert found["generate_guided"]["score"] > 0.15
    assert found["understand"]["score"] > 0.6


def test_a_quickstart_takes_the_recipe_of_the_family(
    family_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["quickstart", "--quick", "--policy", str(family_folder("showo2"))]) == 2
    assert "has no supervised losses for a baseline: add --no-baseline" in capfd.readouterr().err
    assert recipe_of("tiny-masked") == ("quickstart_masked", "continued_token")
    assert recipe_of("tiny") == Recipe()
    command = ["quickstart", "--quick", "--steps", "2", "--policy", "tiny-token", "--no-baseline"]
    parsed = parse_command(command[:-1])
    assert parsed is not None
    baseline = plan(parsed[1], training_config(parsed[1]), Path("run"), "tiny-token").baseline
    assert baseline is not None
    assert baseline.batch["edit"] == 0 < baseline.batch["generate"]
    assert main(command) in (0, 3)  # 3: not healthy, by so few prompts
    run = Path("runs/quickstart_token")
    summary = json.loads((run / "summary.json").read_text())
    assert {"generate", "understand", "reason"} <= summary["before"].keys()
    assert "edit" not in summary["before"]
    assert "loss/tokens/generate" in RunDirectory.read(run).metrics()[1]
    assert (run / "report.html").is_file()


RANDOM: list[tuple[str, tuple[str, ...], str]] = [
    ("janus-tiny", ("width=32", "seed=3"), "a random Janus of"),
    ("emu3-tiny", ("width=32", "seed=3"), "a random Emu3 of"),
    ("showo-tiny", ("width=32", "seed=3"), "a random Show-o of"),
    ("mmada-tiny", ("width=32", "seed=3"), "a random MMaDA of"),
    ("showo2-tiny", ("seed=3",), "a random Show-o2 of"),
    ("sd3-tiny", ("depth=1", "seed=3"), "a random Stable Diffusion 3 of"),
    ("flux-tiny", ("depth=1", "seed=3"), "a random FLUX of"),
    ("kontext-tiny", ("depth=1", "seed=3"), "a random FLUX Kontext of"),
    ("qwen-image-tiny", ("depth=1", "seed=3"), "a random Qwen-Image of"),
    ("qwen-image-edit-tiny", ("depth=1", "seed=3"), "a random Qwen-Image-Edit of"),
    ("z-image-tiny", ("depth=1", "seed=3"), "a random Z-Image of"),
]
MISFITS: list[tuple[str, tuple[str, ...], str]] = [
    *((kind, ("--train-autoencoder", "5"), "applies to bagel-tiny only") for kind, _, _ in RANDOM),
    ("janus-tiny", ("image_size=36",), "image_size=36: must be a multiple of patch_size=8"),
    ("emu3-tiny", ("image_size=36",), "image_size=36: must be a multiple of 8"),
    ("emu3-tiny", ("heads=3",), "heads=3: a width of 64 is not divided evenly"),
    ("emu3-tiny", ("key_heads=3",), "key_heads=3: heads=4 must be a multiple of it"),
    ("showo-tiny", ("image_size=36",), "image_size=36: must be a multiple of patch_size=8"),
    ("showo-tiny", ("heads=3",), "heads=3: a width of 64 must be a multiple of 4 x heads"),
    ("showo-tiny", ("positions=140",), "positions=140: an image takes 147: use more"),
    ("mmada-tiny", ("heads=3",), "heads=3: a width of 64 must be a multiple of 2 x heads"),
    ("mmada-tiny", ("key_heads=3",), "key_heads=3: heads=4 must be a multiple of it"),
    ("mmada-tiny", ("positions=20",), "positions=20: an image takes 32: use more"),
    ("showo2-tiny", ("image_size=40",), "multiple of 16"),
    ("sd3-tiny", ("image_size=36",), "image_size=36: must be a multiple of 2 vae_stride=8"),
]


@pytest.mark.parametrize(("kind", "sizes", "words"), RANDOM, ids=[kind for kind, _, _ in RANDOM])
def test_random_models_are_made(
    kind: str, sizes: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if sizes[0] == "depth=1" or kind == "showo2-tiny":
        pytest.importorskip("diffusers")
    assert main(["init", kind, "model", *sizes]) == 0
    assert words in capfd.readouterr().out
    load_policy("model")


@pytest.mark.parametrize(("kind", "sizes", "words"), MISFITS)
def test_sizes_that_do_not_fit_are_one_line(
    kind: str, sizes: tuple[str, ...], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", kind, "model", *sizes]) == 2
    err = capfd.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert not Path("model").exists()
