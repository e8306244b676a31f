"""Runs on data sets: exact resumption, streamed or not, and only with the rows that a run was started with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from stored import killed_copy

from lvrpo.commands.evaluate import sampled_as_run
from lvrpo.commands.options import Options
from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.evaluation.experiment import TEST_ROWS, Plan, _planned_benchmarks, held_out_plan, warn_without_test
from lvrpo.evaluation.suite import SAMPLING, find_benchmarks
from lvrpo.policies.base import Sampling
from lvrpo.registry import allow_code
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trainer import Trainer
from lvrpo.training.validation import Validator

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    allow_code(["*"])
    Path("mine.py").write_text("def mean(image):\n    return float(image.mean())\n")


def write(*texts: str) -> None:
    Path("set").mkdir(exist_ok=True)
    Path("set/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def config(base: Path, *more: str, one: str = "train: 'train[:4]', validation: 'train[4:6]'") -> TrainConfig:
    sets = f"datasets: [{{path: set, preset: prompts, {one}}}]"
    data = f"data={{source: datasets, {sets}, prompts_per_step: {{generate: 2}}}}"
    small = ["device=cpu", "rollout={group_size: 4, num_steps: 2}", "validation={every: 2, prompts: {generate: 2}}"]
    return load_config(
        TrainConfig, None, [f"policy={base}", "steps=4", "rewards=[{name: mine.py:mean}]", data, *small, *more]
    )


TEXTS = ("a red circle", "a blue circle", "two red circles", "a star", "a cross", "two stars")


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_two_steps_and_a_resumption_equal_four(streaming: str, small_base: Path) -> None:
    """More steps than one pass over the rows. With other rows it does not go on."""
    write(*TEXTS)
    one = f"streaming: {streaming}, train: 'train[:4]', validation: 'train[4:6]'"
    chosen = config(small_base, "checkpoint_every=2", one=one)
    trainer = Trainer.start(chosen, Path("straight"))
    with trainer.run:
        trainer.train()
    killed = killed_copy(Path("straight"), 2)
    trainer = Trainer.resume(killed)
    with trainer.run:
        assert trainer.state.step == 2
        trainer.train()
    straight, again = (RunDirectory.read(run) for run in (Path("straight"), killed))
    assert len(straight.metrics()) == 5
    for a, b in zip(straight.metrics(), again.metrics(), strict=True):
        assert {k: v for k, v in a.items() if not k.startswith("seconds")} == {
            k: v for k, v in b.items() if not k.startswith("seconds")
        }
    manifest = straight.read_json("manifest.json")
    assert manifest["data"]["train"]["rows"] == 4
    assert manifest["data"]["splits"]["rows"] == {"train": 4, "validation": 2}
    write(*reversed(TEXTS))
    before = sorted(path.read_bytes() for path in killed.rglob("*") if path.is_file())
    longer = chosen.model_copy(update={"steps": 6})
    with pytest.raises(InputError, match=r"data\.datasets\.train: the rows are not those .* \(edited\): restore them"):
        Trainer.resume(killed, longer)
    assert sorted(path.read_bytes() for path in killed.rglob("*") if path.is_file()) == before


def test_rows_are_tested_with_the_settings_of_validation(small_base: Path) -> None:
    """``lvrpo evaluate`` of the run too; of a model alone, rows are sampled with its own defaults."""
    write(*TEXTS)
    chosen = config(
        small_base,
        "rollout={group_size: 4, num_steps: 2, max_new_tokens: 20, solver: euler}",
        "steps=1",
        one="train: 'train[:4]', validation: 'train[4:5]', test: 'train[5:]'",
    )
    trainer = Trainer.start(chosen, Path("run"))
    with trainer.run:
        (rows,) = _planned_benchmarks(trainer, Plan((TEST_ROWS,)))
    validated = Validator({}, chosen).sampling
    assert (validated.max_new_tokens, validated.num_steps, validated.solver) == (20, 2, "euler")
    assert rows.sampling(Sampling()) == validated
    Path("rows.jsonl").write_text(json.dumps({"task": "reason", "prompt": "a", "answer": "b"}) + "\n")
    found = find_benchmarks(["rows.jsonl", "reason"])
    for model, expected in (("run", validated), ("tiny", Sampling(max_new_tokens=99, tokens_per_step=2))):
        own, world = sampled_as_run(Options(model=model), found)
        assert own.sampling(Sampling(max_new_tokens=99, tokens_per_step=2)) == expected
        assert world.sampling(SAMPLING) == SAMPLING


def test_splits_that_share_a_row_are_refused_before_the_start(small_base: Path) -> None:
    write(*TEXTS, "A red circle.")
    with pytest.raises(InputError, match=r"row 7: the same text and images as .*row 1 of data\.datasets\.train"):
        Trainer.start(config(small_base, one="train: 'train[:4]', validation: 'train[4:]'"), Path("run"))
    assert not Path("run").exists()


def test_rows_of_another_task_and_sets_without_training_rows_are_refused(small_base: Path) -> None:
    write(*TEXTS)
    with pytest.raises(InputError, match=r"prompts_per_step\.edit=1: datasets has no rows of task 'edit': set it to 0"):
        Trainer.start(config(small_base, "data.prompts_per_step.edit=1"), Path("run"))
    with pytest.raises(InputError, match=r"no set of data\.datasets has train"):
        config(small_base, one="test: train")


def test_test_rows_or_else_validation_rows_are_scored_before_and_after(small_base: Path) -> None:
    write(*TEXTS)
    for one, plan, said in (
        ("train: 'train[:4]', test: 'train[4:]'", (TEST_ROWS,), None),
        ("train: 'train[:4]', validation: 'train[4:]'", (TEST_ROWS,), "measured on the validation rows"),
        ("train: train", (), "nothing is measured"),
    ):
        chosen = config(small_base, one=one)
        assert held_out_plan(chosen, ()).benchmarks == plan
        if said is None:
            warn_without_test(chosen)
        else:
            with pytest.warns(UserWarning, match=f"data.datasets.test is not set: .*{said}"):
                warn_without_test(chosen)
