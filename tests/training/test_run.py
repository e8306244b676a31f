"""Runs on the disk: interrupted and killed ones go on bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PilImage
from ranks import Command
from stored import killed_copy, stored

from lvrpo.config import dump_config, load_config
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.loading import load_policy, policy_folder
from lvrpo.training import preflight
from lvrpo.training.base_trainer import Interrupted, InterruptHandler
from lvrpo.training.checkpoint import load_state, verify_checkpoint
from lvrpo.training.components import training_source
from lvrpo.training.config import TrainConfig
from lvrpo.training.policies import Policies, SetName
from lvrpo.training.preflight import Check
from lvrpo.training.pretrain import PretrainConfig, Pretrainer
from lvrpo.training.rollout_log import TRAITS, read_steps
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer

SMALL = (
    "steps=10",
    "data.prompts_per_step={generate: 3, understand: 8, edit: 1, reason: 3}",
    "rollout={group_size: 4, num_steps: 4}",
    "rewards=[{name: exact_answer}, {name: self_vqa}]",
    "advantages.std_floor=1e-4",
    "validation={every: 4, prompts: {generate: 3, understand: 8, edit: 2, reason: 3}}",
    "checkpoint_every=2",
    "reference_eval_every=3",
    "samples_every=4",
    "device=cpu",
)
KINDS = ("step", "control", "validation")
SMALL_CORPUS = (
    "steps=10",
    "batch={generate: 4, caption: 2, question: 8, edit: 2, reason: 3}",
    "corpus={scenes: 30, edits: 10, reasons: 12}",
    "held_out_every=5",
    "held_out={generate: 7, understand: 8, edit: 5, reason: 3}",
    "checkpoint_every=4",
    "device=cpu",
)


@pytest.fixture
def config(small_base: Path) -> TrainConfig:
    return load_config(TrainConfig, None, [f"policy={small_base}", *SMALL])


@pytest.fixture
def straight(config: TrainConfig, made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """A run of ``config`` that was never interrupted, but resumed before its first step. Never change it."""

    def make(folder: Path) -> None:
        with Trainer.start(config, folder).run as run:
            run.close()
            assert Trainer.resume(folder).train()

    return made_once("straight_run", make)


def without_seconds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "seconds_left")} for row in rows]


def same_state(one: Any, other: Any, path: str = "") -> None:
    if isinstance(one, Mapping):
        assert set(one) == set(other), path
        for key in one:
            if key != "seconds":
                same_state(one[key], other[key], f"{path}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            same_state(a, b, f"{path}/{i}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), path
    else:
        assert one == other, path


def same_run(one: Path, other: Path, step: int = 10) -> None:
    assert without_seconds(RunDirectory.read(one).metrics()) == without_seconds(RunDirectory.read(other).metrics())
    states = [load_state(run / "checkpoints" / f"step_{step:06d}" / "state") for run in (one, other)]
    same_state(*states)
    checkpoints = [run / "checkpoints" / f"step_{step:06d}" for run in (one, other)]
    if (checkpoints[0] / "state" / "tensors").exists():  # pretraining has its own in its state
        mine, theirs = map(stored, checkpoints)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    assert (one / "policy.json").read_text() == (other / "policy.json").read_text()


def same_scores(one: Path, other: Path) -> None:
    kept = [{path.name: path.read_bytes() for path in (run / "scores").iterdir()} for run in (one, other)]
    assert kept[0] == kept[1]
    numbers = {kind: [int(name[-10:-4]) for name in sorted(kept[0]) if name.startswith(kind)] for kind in KINDS}
    assert numbers == {"step": [*range(1, 11)], "control": [1, 4, 7, 10], "validation": [0, 4, 8, 10]}


def stops_at(step: int) -> tuple[Callable[[Mapping[str, Any]], None], Callable[[], bool]]:
    """An observer and the interruption that comes after a step."""
    seen: list[int] = []
    return lambda row: seen.append(int(row["step"])), lambda: bool(seen) and seen[-1] >= step


def test_five_steps_and_a_resumption_equal_ten(config: TrainConfig, straight: Path) -> None:
    halved = Path("halved")
    alignment = Trainer.start(config, halved)
    with alignment.run:
        assert not alignment.train(*stops_at(5))
        assert alignment.state.step == 5
    again = Trainer.resume(halved, config)
    with again.run:
        assert again.state.step == 5
        assert again.train()
    same_run(straight, halved)
    same_scores(straight, halved)
    rows = RunDirectory.read(halved).metrics()
    assert [row["step"] for row in rows] == list(range(11))
    assert any("reward/understand/exact_answer" in row for row in rows)
    assert {"validation/understand", "validation/generate"} <= set(rows[4])
    assert "control/understand/exact_answer" in rows[1]
    assert "control/understand/exact_answer" not in rows[2]


def test_the_average_is_short_at_first(small_base: Path) -> None:
    """With decay min(ema_decay, step / (step + 10)): else what is evaluated and saved stays near the start."""
    changed = (
        "steps=3",
        "ema_decay=0.15",
        "data.prompts_per_step={generate: 2, understand: 0, edit: 0, reason: 0}",
        "rewards=[{name: self_vqa}]",
        "validation={every: 3, prompts: {generate: 2}}",
    )
    alignment = Trainer.start(load_config(TrainConfig, None, [f"policy={small_base}", *SMALL, *changed]), Path("run"))
    policies = alignment.state.policies
    live: list[torch.Tensor] = []
    with alignment.run:
        assert alignment.train(lambda row: live.append(flat(policies, "policy")))
    expected = live[0]
    for now, decay in zip(live[1:], [1 / 11, 0.15], strict=True):
        assert (now - expected).abs().max() > 1e-4
        expected = decay * expected + (1 - decay) * now
    torch.testing.assert_close(flat(policies, "ema"), expected, rtol=1e-5, atol=1e-6)


def flat(policies: Policies, name: SetName) -> torch.Tensor:
    return torch.cat([tensor.detach().clone().flatten() for tensor in policies.weights[name].values()])


def test_recorded_steps_need_no_short_average_and_resume(config: TrainConfig, small_base: Path) -> None:
    changed = ("steps=4", "rollout={group_size: 4, num_steps: 4, sampler: flow_sde}", "flow.kind=flow_grpo")
    config = load_config(TrainConfig, None, [f"policy={small_base}", *SMALL, *changed])
    straight = Path("straight")
    alignment = Trainer.start(config, straight)
    with alignment.run:
        assert not alignment.state.policies.has("old")
        assert alignment.train()
    kept = {name.split("/")[0] for name in stored(straight / "checkpoints" / "step_000004")}
    assert kept == {"policy", "ema", "optimizer_0"}
    killed = killed_copy(straight, 2)
    again = Trainer.resume(killed)
    with again.run:
        assert again.state.step == 2
        assert not again.state.policies.has("old")
        assert again.train()
    same_run(straight, killed, 4)


@pytest.mark.parametrize("more", [(), ("representation={weight: 0.5, layer: 1, target_layer: 1}",)])
def test_pretraining_goes_on_bit_for_bit(config: TrainConfig, more: tuple[str, ...]) -> None:
    pretraining = load_config(PretrainConfig, None, [f"init={config.policy}", *SMALL_CORPUS, *more])
    one = Pretrainer.start(pretraining, Path("straight"))
    with one.run:
        assert one.train()
    killed = killed_copy(Path("straight"), 8)
    again = Pretrainer.resume(killed)
    with again.run:
        assert again.state.step == 8
        assert again.train()
    same_run(Path("straight"), killed)
    rows = RunDirectory.read(killed).metrics()
    assert {"validation/generate", "validation/reason"} <= set(rows[4])
    assert policy_folder(str(killed)).name == "step_000010"


METHODS = {
    "all at once": [
        "rollout.max_resamples=6",
        "advantages={std_floor: 0.005, kind: grpo, stages: per_segment}",
        "text={lr_scale: 0.5, importance_cap: 2}",
        "num_minibatches=2",
        "gradient_audit.every=2",
    ],
    "offline": ["text.kind=dpo", "flow.kind=dpo", "rollout={sample_from: reference, pool: 2}"],
    "windows": [
        "flow={kind: flow_grpo, kl: gaussian, ratio: guard}",
        "rollout={sampler: flow_sde, solver: dpm_solver, window: {kind: decaying, size: 1, steps_after: 1}}",
        "gradient_mixing=pcgrad",
    ],
}


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_goes_on_bit_for_bit(name: str, small_base: Path) -> None:
    config = load_config(TrainConfig, None, [f"policy={small_base}", *SMALL, "steps=4", *METHODS[name]])
    one = Trainer.start(config, Path("straight"))
    with one.run:
        assert one.train()
    killed = killed_copy(Path("straight"), 2)
    again = Trainer.resume(killed)
    with again.run:
        assert again.state.step == 2
        assert again.train()
    same_run(Path("straight"), killed, 4)
    rows = RunDirectory.read(killed).metrics()
    if name == "all at once":
        assert all(row["refill/drawn"] > 0 for row in rows[1:])
        assert any(key.startswith("gradient/cosine/") for key in rows[1])
        assert not any(key.startswith("gradient/") for key in rows[2])


def test_the_record_says_which_rewards_judge_the_segment_of_its_advantages(config: TrainConfig) -> None:
    """A thought is judged by its answer, its image by the understanding side; the image's advantages are recorded."""
    staged = config.advantages.model_copy(update={"stages": "per_segment"})
    alignment = Trainer.start(config.model_copy(update={"steps": 1, "advantages": staged}), Path("run"))
    with alignment.run:
        assert alignment.train()
    (record,) = read_steps(Path("run"))
    assert record.names == ("exact_answer", "self_vqa")
    wrote, drew = (np.isfinite(record.traits[:, 0, TRAITS.index(trait)]) for trait in ("tokens", "red"))
    assert (wrote & drew).any()
    assert record.applies[wrote & drew].all()
    assert (record.judged[wrote & drew] == [False, True]).all()
    assert record.judged[wrote ^ drew].all()


def train_process(config: TrainConfig, folder: Path) -> Command:
    Path("config.yaml").write_text(dump_config(config))
    return Command("train", "config.yaml", "--out", folder, "--no-evaluate")


def wait_for_step(folder: Path, step: int, process: Command) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics = folder / "metrics.jsonl"
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        assert not process.ended, process.finish()
        time.sleep(0.01)
    raise AssertionError(f"step {step} did not come")


def test_a_killed_run_loses_at_most_the_steps_since_the_last_checkpoint(config: TrainConfig, straight: Path) -> None:
    process = train_process(config, Path("killed"))
    wait_for_step(Path("killed"), 5, process)
    process.signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    again = Trainer.resume(Path("killed"), config)
    with again.run:
        assert again.state.step >= 4
        assert again.train()
    same_run(straight, Path("killed"))
    same_scores(straight, Path("killed"))


def test_a_run_without_a_checkpoint_starts_over_and_says_so(config: TrainConfig) -> None:
    with Trainer.start(config, Path("run")).run as run:
        run.append_metrics({"step": 0})
        run.append_metrics({"step": 1})
    with pytest.warns(UserWarning, match="run: has no checkpoint: training starts again at step 0 and repeats 1 step$"):
        again = Trainer.resume(Path("run"))
    with again.run:
        assert again.state.step == 0
        assert again.run.metrics() == []


def test_a_finished_run_whose_checkpoints_are_gone_is_left_as_it_is(config: TrainConfig, straight: Path) -> None:
    shutil.copytree(straight, "run")
    shutil.rmtree("run/checkpoints")
    Path("run/summary.json").write_text("{}")
    longer = config.model_copy(update={"steps": config.steps + 1})
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="has no checkpoints left to continue from: restore them, or start another"):
        Trainer.resume(Path("run"), longer)
    after = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    assert after == before | {Path("run/.lock"): f"{os.getpid()}\n".encode()}  # the process that was here last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_writes_a_checkpoint(config: TrainConfig, number: signal.Signals) -> None:
    config = config.model_copy(update={"steps": 200, "checkpoint_every": 200})
    process = train_process(config, Path("run"))
    wait_for_step(Path("run"), 2, process)
    process.signal(number)
    code, errors = process.finish()
    assert code == 130, errors
    (line,) = errors.splitlines()
    steps = [row["step"] for row in RunDirectory.read(Path("run")).metrics()]
    assert line.startswith(f"interrupted after step {steps[-1]} of 200; the checkpoint is written")
    assert line.endswith("lvrpo train --resume run")
    verify_checkpoint(Path("run") / "checkpoints" / f"step_{steps[-1]:06d}")


def test_a_signal_in_the_step_that_stops_a_run_does_not_undo_the_stop(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lvrpo.training.trainer.apply_validation", lambda *_: True)
    trainer = Trainer.start(config, Path("run"))
    with trainer.run:
        assert trainer.train(*stops_at(4))
        with pytest.raises(Interrupted, match="interrupted after step 4 of 10"):
            trainer.require_uninterrupted()
    resumed = Trainer.resume(Path("run"))
    with resumed.run:
        assert resumed.train()
        assert resumed.state.step == 4


def test_the_second_signal_ends_at_once(request: pytest.FixtureRequest) -> None:
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins with it ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, found))
    with InterruptHandler() as interrupted:
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_result_is_the_best_checkpoint_of_validation(straight: Path) -> None:
    best = load_state(straight / "checkpoints" / "step_000010" / "state")["validation"]["best_step"]
    final = {"checkpoint": f"checkpoints/step_{best:06d}", "step": best}
    assert RunDirectory.read(straight).read_json("policy.json") == final
    assert policy_folder(str(straight)) == straight / "checkpoints" / f"step_{best:06d}"
    loaded = load_policy(str(straight), "cpu")
    saved = load_policy(straight / "checkpoints" / f"step_{best:06d}", "cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), saved.parameters(), strict=True))


def test_the_start_is_kept_and_the_manifest_names_it(config: TrainConfig) -> None:
    with Trainer.start(config, Path("run")).run as run:
        manifest = run.read_json("manifest.json")
    verify_checkpoint(Path("run/start"))
    (entry,) = manifest["checkpoints"].values()
    assert len(entry["sha256"]) == 64
    assert manifest["seeds"] == {"run": 0}
    assert manifest["data"]["splits"]["shared"] == 0


def test_wrong_input_leaves_no_run_directory(config: TrainConfig) -> None:
    wrong = config.model_copy(update={"policy": "nowhere"})
    with pytest.raises(InputError, match="no such folder"):
        Trainer.start(wrong, Path("run"))
    assert not Path("run").exists()


def test_a_task_that_the_rows_lack_is_refused(config: TrainConfig) -> None:
    row = {"task": "generate", "prompt": "a red circle"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    data = config.data.model_copy(
        update={"source": "jsonl", "jsonl": config.data.jsonl.model_copy(update={"train": Path("rows.jsonl")})}
    )
    with pytest.raises(InputError, match=r"data.prompts_per_step.understand=8: jsonl has no rows of task 'understand'"):
        training_source(config.model_copy(update={"data": data}))


def test_rows_of_the_user_are_trained_on(config: TrainConfig, small_base: Path) -> None:
    rows = [{"task": "reason", "prompt": f"what is {a} + 2 ?", "answer": str(a + 2)} for a in range(6)]
    rows += [{"task": "generate", "prompt": f"a {c} circle", "facts": [fact(c)]} for c in ("red", "blue", "green")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = load_config(
        TrainConfig,
        None,
        [
            f"policy={small_base}",
            "steps=2",
            "device=cpu",
            "rollout={group_size: 4, num_steps: 3}",
            "data={source: jsonl, jsonl: {train: rows.jsonl}, prompts_per_step: {reason: 4, generate: 3}}",
            "rewards=[{name: self_vqa}, {name: exact_answer}]",
            "advantages.std_floor=0",
        ],
    )
    with pytest.warns(UserWarning, match="validation is not set: validation has no held-out rows"):
        alignment = Trainer.start(own, Path("run"))
    with alignment.run as run:
        assert alignment.train()
        rows = run.metrics()
    assert rows[-1]["validation/action"] == "no held-out rows: kept the last weights"
    assert "reward/generate/self_vqa" in rows[1]
    assert "reward/generate/success" not in rows[1]
    assert "reward/reason/success" in rows[1]
    written = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(written.replace("blue", "gray"))
    longer = own.model_copy(update={"steps": 3})
    edited = pytest.raises(InputError, match=r"data\.jsonl\.train: the rows are not those .* \(edited\): restore them")
    with pytest.warns(UserWarning, match="validation is not set"), edited:
        Trainer.resume(Path("run"), longer)
    Path("rows.jsonl").write_text(written)
    with pytest.warns(UserWarning, match="validation is not set"), Trainer.resume(Path("run"), longer).run as run:
        assert run.read_json("manifest.json")["resumed"]


def test_a_run_does_not_go_on_with_other_images(small_base: Path) -> None:
    image = Path("a.png")
    PilImage.new("RGB", (16, 16), "red").save(image)
    before = image.read_bytes()
    row = {"images": ["a.png"], "task": "understand", "prompt": "what color is the circle ?", "answer": "red"}
    Path("rows.jsonl").write_text(json.dumps(row) + "\n")
    changes = ["steps=2", "device=cpu", "rewards=[{name: exact_answer}]", "data.prompts_per_step={understand: 1}"]
    own = [f"policy={small_base}", *changes, "data.source=jsonl", "data.jsonl.train=rows.jsonl"]
    config = load_config(TrainConfig, None, own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = Trainer.start(config, Path("run"))
        trainer.save()
        trainer.run.close()
        PilImage.new("RGB", (16, 16), "blue").save(image)
        changed = r"data\.jsonl\.train: the rows are not those .* \(an image has other bytes\): restore them"
        with pytest.raises(InputError, match=changed):
            Trainer.resume(Path("run"))
        image.write_bytes(before)
        Trainer.resume(Path("run")).run.close()
        manifest = json.loads(Path("run/manifest.json").read_text())
        assert len(manifest["data"]["train"].pop("rows_sha256")) == 64
        Path("run/manifest.json").write_text(json.dumps(manifest))  # as written by earlier versions
        Trainer.resume(Path("run")).run.close()


def fact(color: str) -> dict[str, str]:
    return {"question": "what color is the circle ?", "answer": color}


# --- runs that are refused, or killed, at their start ---


def test_a_run_whose_first_update_is_refused_leaves_no_folder(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Check("weights changed by the first update", 0.0, 1.0, ok=False, detail="check learning rates")
    monkeypatch.setattr(preflight, "first_update_checks", lambda *_: [broken])
    trainer = Trainer.start(config, Path("runs/one"))
    with pytest.raises(ContractError, match="weights changed by the first update is 0, limit 1: check"), trainer.run:
        trainer.train()
    assert not Path("runs").exists()


def test_a_resumed_run_that_is_refused_stays(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainer.start(config, Path("run")).run.close()
    monkeypatch.setattr(preflight, "first_update_checks", lambda *_: [Check("a", 0.0, 1.0, ok=False, detail="b")])
    trainer = Trainer.resume(Path("run"))
    with pytest.raises(ContractError, match="step-0 contract: a is 0"), trainer.run:
        trainer.train()
    assert Path("run/checkpoints/step_000000/checkpoint.json").exists()


def test_a_run_whose_start_was_killed_starts_again_with_any_configuration(config: TrainConfig) -> None:
    process = train_process(config, Path("run"))
    while not Path("run/config.yaml").exists():
        assert not process.ended, process.finish()
    process.signal(signal.SIGKILL)
    assert process.finish()[0] == -signal.SIGKILL
    with pytest.raises(InputError, match="run: was stopped before its start was complete: repeat the command that"):
        Trainer.resume(Path("run"))
    Trainer.start(config.model_copy(update={"seed": 1}), Path("run")).run.close()
    assert RunDirectory.read(Path("run")).config(TrainConfig).seed == 1
