"""Rows, rewards and held-out prompts of one's own: checked before a run starts, scored by its own rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from weight_sets import sets_of

from lvrpo import InputError, Prompt, Sampling, reward
from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.policies.loading import model_type, stored_image_size
from lvrpo.registry import allow_code, isolated_permissions, resolve
from lvrpo.rewards.agreement import Agreement
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.function import as_reward
from lvrpo.rewards.success import HeldOutScorer
from lvrpo.rewards.table import build_rewards
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import ValidationState
from lvrpo.training.trainer import Trainer
from lvrpo.training.validation import Validator
from lvrpo.types import Group, TextSegment, Trajectory

DRAW = {"task": "generate", "prompt": "a red circle"}


def write(name: str, *rows: dict[str, Any]) -> Path:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(name)


def group(answer: str, right: str | None = None) -> Group:
    prompt = Prompt(f"{answer}/{right}", "understand", ("x",), ("text",), right)
    segment = TextSegment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 0.0, answer, True)
    return Group(prompt, (Trajectory(prompt, 0, (segment,), 0),))


def source(function: Any, weight: float = 1.0) -> ConfiguredReward:
    return ConfiguredReward(RewardConfig(name=function.__name__, weight=weight), as_reward(function)())


def letters(text: str) -> float:
    return float(len(text))


def fails(text: str) -> float:
    raise ValueError("no score")


def two(text: str) -> float:
    return 2.0


def test_verified_success_else_the_weighted_mean_of_the_trained_rewards() -> None:
    watched = source(fails, weight=0)
    scorer = HeldOutScorer((source(letters, 3.0), source(two, 1.0), watched))
    told, open_ended = group("red", "red"), group("green")
    assert (scorer.metric(told.prompt), scorer.metric(open_ended.prompt)) == ("success", "reward")
    found = scorer.scores([open_ended, told], judge=object())  # type: ignore[arg-type]
    assert found == ([[(3 * 5 + 2) / 4], [1.0]], {})


def test_a_failed_score_is_nan_and_group_comparisons_do_not_count() -> None:
    scorer = HeldOutScorer((source(letters), source(fails)))  # one of two
    ((score,),), reasons = scorer.scores([group("red")], judge=object())  # type: ignore[arg-type]
    assert math.isnan(score)
    assert list(reasons) == [0]
    relative = ConfiguredReward(RewardConfig(name="agreement"), Agreement())
    assert HeldOutScorer((relative,)).metric(group("red").prompt) is None


def test_validation_handles_negative_rewards_and_ignores_failures() -> None:
    validator, state = Validator({"understand": [group("a").prompt]}, TrainConfig()), ValidationState()
    for mean, verdict in ((-0.5, "best"), (-0.4, "best"), (-0.9, "regressed")):
        validator._sample = lambda policies: {}  # type: ignore[method-assign]
        validator._scores = lambda outputs, policies, mean=mean: {"understand": [mean, mean, math.nan]}  # type: ignore[method-assign]
        assert validator.validate(sets_of(), state, 0).verdict == verdict  # type: ignore[arg-type]
    assert state.top == pytest.approx(-0.4)


def test_images_are_resized_as_elsewhere_and_said_once() -> None:
    Image.new("RGB", (40, 20), "red").save("wide.png")
    row = {"task": "edit", "images": ["wide.png"], "prompt": "make it red", "edited": [[10, 0, 20, 10]]}
    path = write("rows.jsonl", row, {**row, "id": "b"})
    with pytest.warns(
        UserWarning, match=r"wide.png has 40 x 20 pixels: the middle square is resized to 16 x 16"
    ) as said:
        prompt = JsonlPrompts(JsonlConfig(train=path), side=16).in_order()[0]
    assert len(said) == 1
    assert not isinstance(prompt.parts[0], str)
    assert prompt.parts[0].shape == (3, 16, 16)
    assert prompt.edited is not None
    assert prompt.edited[:8, :8].all()
    assert not prompt.edited[9:].any()


def test_absolute_paths_and_links_may_lead_into_the_root(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    Path("linked").symlink_to(tmp_path)
    rows = [{**DRAW, "images": [name]} for name in (str(tmp_path / "a.png"), "linked/a.png", "a.png")]
    path = write("rows.jsonl", *rows)
    assert len(JsonlPrompts(JsonlConfig(train=path, root=tmp_path))) == 3
    with pytest.raises(InputError, match=r"rows.jsonl:1: image .* lies outside .* set root to a folder that holds it"):
        JsonlPrompts(JsonlConfig(train=path))
    with pytest.raises(InputError, match="root=nowhere: no such folder"):
        JsonlPrompts(JsonlConfig(train=path, root=Path("nowhere")))


def settings(base: Path, *more: str) -> list[str]:
    Path("my_rewards.py").write_text("def mean(image):\n    return float(image.mean())\n")
    rewards = "rewards=[{name: my_rewards.py:mean}]"
    data = "data={source: jsonl, jsonl: {train: t.jsonl, validation: v.jsonl, test: e.jsonl}, "
    data += "prompts_per_step: {generate: 2}}"
    small = [
        "steps=2",
        "device=cpu",
        "rollout={group_size: 4, num_steps: 3}",
        "validation={every: 1, prompts: {generate: 2}}",
    ]
    return [f"policy={base}", rewards, data, *small, *more]


def rows(**changed: dict[str, Any]) -> None:
    for name, shape in {"t": "circle", "v": "star", "e": "cross"}.items():
        first, second = ({**DRAW, "prompt": f"a {color} {shape}"} for color in ("blue", "red"))
        write(f"{name}.jsonl", first, {**second, **changed.get(name, {})})


@pytest.mark.parametrize("file", ["t", "v", "e"])
@pytest.mark.parametrize("command", ["check", "train"])
def test_an_unknown_word_is_found_before_the_start(
    command: str, file: str, small_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows(**{file: {"prompt": "a crimson circle"}})
    Path("c.yaml").write_text("name: own\n")
    assert main([command, "c.yaml", *settings(small_base), "--allow-code"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}.jsonl:2: 'crimson' in 'a crimson circle': not among")
    assert not Path("runs").exists()


@pytest.mark.parametrize("images", [{}, {"task": "edit", "images": ["red.png"]}], ids=["text", "image"])
def test_a_row_that_is_too_long_is_found_before_the_start(
    images: dict[str, Any], small_base: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows()
    Image.new("RGB", (32, 32), "red").save("red.png")
    write("t.jsonl", DRAW, *({**DRAW, **images, "prompt": "red " * n} for n in (1, 5000, 2)))
    Path("c.yaml").write_text("name: own\n")
    task = f"data.prompts_per_step={json.dumps({'generate': 1, images.get('task', 'generate'): 1})}"
    assert main(["train", "c.yaml", *settings(small_base, task), "--allow-code"]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: t.jsonl:3: prompt 't:3': 50")
    assert not Path("runs").exists()


def test_a_start_that_failed_leaves_nothing(small_base: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows()
    Path("c.yaml").write_text("name: own\n")
    given = settings(small_base)
    Path("my_rewards.py").write_text("def mean(image):\n    raise ValueError('broken')\n")
    assert main(["train", "c.yaml", *given, "--allow-code"]) == 1
    assert "broken" in capfd.readouterr().err
    assert not Path("runs").exists()


def test_a_run_can_be_made_longer_as_if_it_had_been_so_from_the_start(small_base: Path) -> None:
    rows()
    allow = isolated_permissions()
    with allow:
        allow_code(["*"])
        slow = "optimizer={decay_start: 1.0, warmup_steps: 0}"
        short = load_config(TrainConfig, None, settings(small_base, slow))
        long = short.model_copy(update={"steps": 4})
        for config, folder in ((short, "grown"), (long, "straight")):
            alignment = Trainer.start(config, Path(folder))
            with alignment.run as run:
                assert alignment.train()
                run.write_summary({"before": {}, "after": {}})
        with pytest.raises(InputError, match="can only be made longer: give more"):
            Trainer.resume(Path("grown"), short.model_copy(update={"steps": 1}))
        with pytest.raises(InputError, match=r"has finished.*steps=4"):
            Trainer.resume(Path("grown"), short)
        tensors = next(Path("grown/checkpoints/step_000002/state/tensors").glob("*.safetensors"))
        whole = tensors.read_bytes()
        tensors.write_bytes(whole[:-1])
        before = {path: path.read_bytes() for path in Path("grown").rglob("*") if path.is_file()}
        with pytest.raises(InputError, match=r"safetensors: has \d+ of \d+ bytes: use another checkpoint"):
            Trainer.resume(Path("grown"), long)
        assert {path: path.read_bytes() for path in Path("grown").rglob("*") if path.is_file()} == before
        tensors.write_bytes(whole)
        again = Trainer.resume(Path("grown"), long)
        with again.run:
            assert again.train()
    one, other = (RunDirectory.read(Path(name)) for name in ("grown", "straight"))
    assert one.config(TrainConfig) == other.config(TrainConfig)
    assert one.read_summary() is None
    for a, b in zip(one.metrics(), other.metrics(), strict=True):
        same = {k: v for k, v in a.items() if not k.startswith("seconds")}
        assert same == {k: v for k, v in b.items() if not k.startswith("seconds")}


def test_built_in_names_are_extended_and_errors_name_the_file() -> None:
    for name in ("quickstart", "quickstart.yaml"):
        Path("own.yaml").write_text(f"extends: {name}\nsteps: 3\n")
        assert load_config(TrainConfig, Path("own.yaml")).name == "quickstart"
    Path("quickstart").mkdir()  # a folder does not stand before a built-in name
    Path("own.yaml").write_text("extends: quickstart\n")
    assert load_config(TrainConfig, Path("own.yaml")).name == "quickstart"
    Path("own.yaml").write_text("extends: quickstrat\n")
    with pytest.raises(InputError, match=r"^own.yaml: extends=quickstrat: no such file: did you mean quickstart\?"):
        load_config(TrainConfig, Path("own.yaml"))


def test_an_override_is_blamed_itself() -> None:
    Path("own.yaml").write_text("steps: 3\n")
    with pytest.raises(InputError, match=r"^flow.kind=ppo: must be"):
        load_config(TrainConfig, Path("own.yaml"), ["flow.kind=ppo"])


def test_a_path_that_begins_with_a_dot_is_beside_the_file() -> None:
    Path("below").mkdir()
    Path("below/own.yaml").write_text("data: {jsonl: {train: ./t.jsonl, test: t.jsonl}}\n")
    jsonl = load_config(TrainConfig, Path("below/own.yaml")).data.jsonl
    assert (jsonl.train, jsonl.test) == (Path("below/t.jsonl").absolute(), Path("t.jsonl"))


def test_code_in_a_file_needs_consent_and_its_mistakes_are_one_line() -> None:
    Path("mine.py").write_text("def warm(image, most=1.0):\n    return min(most, float(image[0].mean()))\n")
    Path("broken.py").write_text("def warm(\n")
    configs = [RewardConfig(name="./mine.py:warm", options={"most": 0.5})]
    with isolated_permissions():
        with pytest.raises(InputError, match="is code of a file, not of lvrpo"):
            build_rewards(configs)
        allow_code(["./mine.py", "broken.py"])
        (built,) = build_rewards(configs)
        assert built.config.title == "warm"
        for name, words in {
            "./mine.py:cold": "has no 'cold': name something",
            "broken.py:warm": r"broken.py:1: SyntaxError",
            "./none.py:warm": "is code of a file",
        }.items():
            with pytest.raises(InputError, match=words):
                build_rewards([RewardConfig(name=name)])
        with pytest.raises(InputError, match=r"options \(least\)"):
            build_rewards([RewardConfig(name="./mine.py:warm", options={"least": 1})])
        with pytest.raises(InputError, match="model type"):
            resolve("model type", "./mine.py:warm", {}, from_model=True)


def test_the_parameters_of_a_function_say_what_it_scores() -> None:
    draw = Prompt("g", "generate", ("a circle",), ("image",))
    for function, text, image in (
        (lambda text: 1.0, True, False),
        (lambda image, target=1: 1.0, False, True),
        (lambda trajectory: 1.0, True, True),
        (lambda anything: 1.0, True, True),
    ):
        made = as_reward(function)()
        assert (made.applies(group("red").prompt), made.applies(draw)) == (text, image)
    seen = reward(lambda prompt, answer, text: len(f"{prompt}{answer}{text}"))()
    assert seen.score([group("red", "blue")], object()).values.tolist() == [[len("xbluered")]]  # type: ignore[arg-type]
    assert reward(lambda text, images=2: len(text) + images)(images=3).score([group("red")], object()).values == 6  # type: ignore[arg-type]


async def late(text: str) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda: 1.0, "takes nothing"),
        (late, "reward 'late': is async"),
    ],
)
def test_a_function_that_scores_nothing_is_refused(function: Callable[..., Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        reward(function)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sampling(group_size=0), r"sampling.group_size=0: must be a whole number >= 1"),
        (lambda: Sampling(temperature=-1), r"sampling.temperature=-1: must be a number >= 0"),
        (lambda: Sampling(guidance_scale=math.nan), r"sampling.guidance_scale=nan"),
        (lambda: Prompt("1", "generate", "two red circles", ("image",)), "'1': field parts"),  # type: ignore[arg-type]
        (lambda: Prompt("1", "generate", ("a",), "image"), "'1': field output is 'image'"),  # type: ignore[arg-type]
        (lambda: Prompt("1", "draw", ("a",), ("image",)), "'1': field task is 'draw'"),  # type: ignore[arg-type]
        (lambda: Prompt("", "generate", ("a",), ("image",)), "field id"),
    ],
)
def test_wrong_fields_are_named(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("multi_modality", r"a Janus in its makers' layout: .*, such as deepseek-community/Janus-Pro-1B$"),
        ("Emu3", r"an Emu3 in its makers' layout: .*, such as BAAI/Emu3-Gen-hf$"),
        ("gpt2", r"type 'gpt2': not supported: lvrpo knows .*nearest is bagel; .*your_model.md"),
        ("janus_flow", r"type 'janus_flow': not supported: .*nearest is janus; "),
    ],
)
def test_another_family_is_named_with_what_to_use(kind: str, words: str) -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(InputError, match=words):
        model_type(Path("model"))


def test_another_pipeline_is_named_with_those_that_are_trained() -> None:
    Path("model").mkdir()
    Path("model/model_index.json").write_text(json.dumps({"_class_name": "FluxFillPipeline"}))
    with pytest.raises(
        InputError, match=r"holds a FluxFillPipeline of diffusers: not supported: lvrpo trains .*"
    ) as one:
        model_type(Path("model"))
    assert "the nearest is FluxPipeline" in str(one.value)


def test_the_side_of_images_is_known_without_loading(small_base: Path) -> None:
    assert stored_image_size(small_base) == 32
