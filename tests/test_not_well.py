"""Runs that end badly, late or not healthy: the words, the exit code, and what lies on the disk afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import stored

from lvrpo.cli import main
from lvrpo.distributed import save_sharded
from lvrpo.training.checkpoint import load_state, save_state, seal_checkpoint
from lvrpo.training.run_directory import RunDirectory

REWARDS = """
import random, sys, time
import numpy as np
import torch
from lvrpo.rewards.base import Scores

CALLS = {"n": 0}
DIES_AT = {"n": 10**9}

class Level:
    sides = ()
    def applies(self, prompt):
        return True
    def score(self, groups, judge):
        CALLS["n"] += 1
        self.before(groups)
        rows = [[float(i % 3) for i in range(len(group))] for group in groups]
        return Scores(torch.tensor(rows))
    def before(self, groups):
        pass

class Dies(Level):
    def before(self, groups):
        if CALLS["n"] > DIES_AT["n"]:
            raise RuntimeError("the server is away")

class Exits(Level):
    def before(self, groups):
        if CALLS["n"] > DIES_AT["n"]:
            sys.exit(3)

class Meddles(Level):
    def before(self, groups):
        random.seed(1); np.random.seed(1); torch.manual_seed(1); torch.set_grad_enabled(False)
        for group in groups:
            for trajectory in group.trajectories:
                for segment in trajectory.segments:
                    segment.behavior_logprobs.fill_(7)
"""
SMALL = (
    "steps=4",
    "device=cpu",
    "data.prompts_per_step={generate: 2, understand: 4, edit: 0, reason: 0}",
    "rollout={group_size: 4, num_steps: 3}",
    "validation={every: 2, prompts: {generate: 2, understand: 4}}",
    "reference_eval_every=100",
)


@pytest.fixture
def train(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """``lvrpo train`` with a reward of this module's own, without evaluation."""
    Path("own_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(__import__("sys").modules, "own_rewards", raising=False)

    def run(name: str, *changes: str, out: str = "run", **row: Any) -> int:
        rewards = json.dumps([{"name": f"own_rewards:{name}", **row}])
        arguments = [
            "train",
            "quickstart",
            f"policy={small_base}",
            *SMALL,
            f"rewards={rewards}",
            "allow_code=[own_rewards]",
            *changes,
        ]
        return main([*arguments, "--out", out, "--no-evaluate"])

    return run


def dies_at(calls: int) -> None:
    import own_rewards  # type: ignore[import-not-found]  # written by the fixture

    own_rewards.CALLS["n"], own_rewards.DIES_AT["n"] = 0, calls


def error(capfd: pytest.CaptureFixture[str]) -> str:
    (line,) = capfd.readouterr().err.splitlines()
    return line


def test_a_reward_that_dies_stops_the_run_with_a_checkpoint(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    for name, said in (("Dies", "RuntimeError: the server is away"), ("Exits", "SystemExit: 3")):
        dies_at(4)  # the contract, step 1 with its control, step 2
        assert train(name, out=name) == 1
        line = error(capfd)
        assert f"'own_rewards:{name}' failed on 24 of 24 outputs, max_failed=0.5: most often (24): {said}" in line
        assert f"step 2 is saved: continue with lvrpo train --resume {name}" in line
        assert sorted(path.name for path in Path(name, "checkpoints").iterdir()) == ["step_000000", "step_000002"]
        dies_at(10**9)
        assert main(["train", "--resume", name, "--no-evaluate", "--allow-code"]) == 0
        assert [row["step"] for row in RunDirectory.read(Path(name)).metrics()] == [0, 1, 2, 3, 4]


def test_what_may_fail_is_masked_and_the_run_is_not_well_all_the_same(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str]
) -> None:
    """The second reward fails from step 3 on, in half of the run's steps; the first is sound."""
    dies_at(10**9)
    half = '[{"name": "own_rewards:Level"}, {"name": "own_rewards:Dies", "label": "dying", "max_failed": 1}]'
    import own_rewards  # type: ignore[import-not-found]

    own_rewards.DIES_AT["n"] = 8  # of both rewards: contract, step 1 with control, step 2
    assert train("Level", f"rewards={half}") == 0  # as it said of itself that all may fail
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["health"] == {"well": True, "findings": []}
    output = capfd.readouterr().out
    assert "dying -" in output

    dies_at(10**9)
    own_rewards.DIES_AT["n"] = 8
    monitored = half.replace('"max_failed": 1', '"max_failed": 0.49, "weight": 0')
    assert train("Level", f"rewards={monitored}", out="other") == 1
    assert "'dying' failed on 24 of 24 outputs, max_failed=0.49" in capfd.readouterr().err


def test_not_well_is_code_3_a_line_a_record_and_the_first_lines_of_the_report(
    train: Callable[..., int], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvrpo.training import validation

    monkeypatch.setattr(validation, "has_regressed", lambda now, before: True)
    assert train("Level", "validation.action=rollback") == 3
    line = error(capfd)
    assert line.startswith("not healthy: run: validation, step 2: rolled back to step 0: ")
    summary = json.loads(Path("run/summary.json").read_text())
    assert [finding["kind"] for finding in summary["health"]["findings"]] == ["validation", "validation"]
    page = Path("run/report.html").read_text()
    assert page.index("Not healthy: validation, step 2: rolled back") < page.index("<main>")
    assert main(["report", "run"]) == 0
    assert main(["audit", "run"]) == 0


def test_a_start_that_fails_leaves_nothing(train: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
    before = {path.name for path in Path().iterdir()}
    dies = train("Dies", "rollout.image_size=[33,33]", out="a/b/run")
    assert dies == 2
    assert "image_size=(33, 33): this model draws 32 x 32" in error(capfd)
    dies_at(0)
    assert train("Dies", out="a/b/run") == 1  # by the contract
    assert "the server is away" in error(capfd)
    assert {path.name for path in Path().iterdir()} - {"__pycache__"} == before - {"__pycache__"}
    Path("mine").mkdir()
    assert train("Dies", out="mine") == 1
    assert list(Path("mine").iterdir()) == []
    dies_at(10**9)
    assert train("Level", "steps=1", out="mine") == 0


def test_neither_a_reward_that_meddles_nor_a_clock_that_jumps_changes_a_run(
    train: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train("Level", "steps=2", out="one", label="r") == 0
    assert train("Meddles", "steps=2", out="meddled", label="r") == 0
    weights = [stored(Path(run, "checkpoints/step_000002"), "policy") for run in ("one", "meddled")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    clock = iter(range(10**9, 0, -(10**6)))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert train("Level", "steps=2", out="two", label="r") == 0
    rows = [RunDirectory.read(Path(run)).metrics() for run in ("one", "two")]
    assert all(row["seconds"] > 0 and row["seconds_left"] >= 0 for row in rows[1][1:])
    for row in (*rows[0], *rows[1]):
        for name in ("seconds", "seconds_left"):
            row.pop(name, None)
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def unfinished(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its last checkpoint at step 2 and no result yet, on lvrpo's own rewards."""
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    rewards = "rewards=[{name: self_vqa}, {name: exact_answer}]"
    changes = [*SMALL, "steps=2", "advantages.std_floor=1e-6", rewards]
    assert main(["train", "quickstart", f"policy={small_base}", *changes, "--out", str(folder), "--no-evaluate"]) == 0
    for name in ("summary.json", "policy.json"):
        (folder / name).unlink()
    return folder


def spoil_state(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the state of the last checkpoint and seals it again."""
    checkpoint = run / "checkpoints/step_000002"
    tree = load_state(checkpoint / "state")
    change(tree)
    save_state(checkpoint / "state", tree)
    (checkpoint / "checkpoint.json").unlink()
    seal_checkpoint(checkpoint)


def spoil_tensors(run: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Changes the tensors of the last checkpoint and seals it again."""
    checkpoint = run / "checkpoints/step_000002"
    tensors = stored(checkpoint)
    change(tensors)
    shutil.rmtree(checkpoint / "state/tensors")
    (checkpoint / "state/tensors").mkdir()
    save_sharded(checkpoint / "state/tensors", tensors)
    seal_checkpoint(checkpoint)


def nan_weight(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values())).view(-1)[0] = float("nan")


def without_policy(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.startswith("policy/")]:
        del tensors[name]


SHAPES: dict[str, tuple[Callable[[Path], object], str]] = {
    "metrics: a list": (lambda r: (r / "metrics.jsonl").write_text("[1]\n"), "metrics.jsonl:1: [1]: input should be a"),
    "metrics: no step": (lambda r: (r / "metrics.jsonl").write_text('{"a": 1}\n'), "metrics.jsonl:1: step={"),
    "metrics: a step in words": (
        lambda r: (r / "metrics.jsonl").write_text('{"step": "two"}\n'),
        'metrics.jsonl:1: step="two": input should be a valid integer',
    ),
    "metrics: deep": (
        lambda r: (r / "metrics.jsonl").write_text("[" * 100_000 + "\n"),
        "metrics.jsonl:1: nested too deeply",
    ),
    "metrics: no text": (lambda r: (r / "metrics.jsonl").write_bytes(b"\xff\n"), "metrics.jsonl:1: not JSON"),
    "plan: a list": (lambda r: (r / "plan.json").write_text("[]"), "plan.json: []: input should be"),
    "plan: empty": (lambda r: (r / "plan.json").write_text("{}"), "plan.json: benchmarks={}: field required"),
    "plan: a baseline that is none": (
        lambda r: (r / "plan.json").write_text(
            '{"benchmarks": [], "sizes": {}, "baseline": {"stpes": 3}, "baseline_name": "b", "parallel": true}'
        ),
        "plan.json: baseline.stpes: unknown key: did you mean steps?",
    ),
    "manifest: a number": (lambda r: (r / "manifest.json").write_text("3"), "manifest.json: 3: input should be"),
    "manifest: no hash": (lambda r: (r / "manifest.json").write_text("{}"), "manifest.json: config_sha256={}: field"),
    "evaluation: a list": (
        lambda r: [(r / "eval").mkdir(exist_ok=True), (r / "eval/before.json").write_text("[1]")],
        "eval/before.json: the file is list, not an object",
    ),
    "evaluation: scores of another kind": (
        lambda r: [
            (r / "eval").mkdir(exist_ok=True),
            (r / "eval/before.json").write_text('{"seconds": 1.0, "scores": {"edit": [1]}}'),
        ],
        "eval/before.json: scores.edit is list, not an object",
    ),
    "evaluation: lists that differ": (
        lambda r: [
            (r / "eval").mkdir(exist_ok=True),
            (r / "eval/before.json").write_text(
                '{"seconds": 1, "scores": {"edit": {"ids": ["a"], "categories": [], "clusters": [], "scores": []}}}'
            ),
        ],
        "eval/before.json: scores.edit: its lists differ in length",
    ),
    "state: no step": (lambda r: spoil_state(r, lambda t: t.pop("step")), "state.json: step="),
    "state: a list for validation": (
        lambda r: spoil_state(r, lambda t: t.update(validation=[1])),
        "state.json: validation=[1]: input should be",
    ),
    "state: no weights": (
        lambda r: spoil_tensors(r, without_policy),
        "state/tensors: the checkpoint lacks policy/",
    ),
    "state: moments of another shape": (
        lambda r: spoil_state(r, lambda t: t.update(moments=[1])),
        "state.json: is not as a run writes it (AttributeError",
    ),
    "state: weights of nan": (lambda r: spoil_tensors(r, nan_weight), "holds a number that is not finite"),
    "state: of before": (
        lambda r: (shutil.rmtree(r / "checkpoints/step_000002/state/tensors"), spoil_state(r, lambda t: t)),
        "state/tensors: holds no tensors",
    ),
    "seal: a list": (
        lambda r: (r / "checkpoints/step_000002/checkpoint.json").write_text("[1]"),
        "checkpoint.json: truncated or not a seal",
    ),
    "config: edited": (
        lambda r: (r / "config.yaml").write_text((r / "config.yaml").read_text().replace("seed: 0", "seed: 1", 1)),
        "config.yaml: was changed since the run began (manifest.json holds its hash): undo the change",
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_files_of_another_shape_are_one_line(case: str, unfinished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, said = SHAPES[case]
    run = Path(shutil.copytree(unfinished, "run"))
    spoil(run)
    evaluated = case.startswith("evaluation")
    if evaluated:
        (run / "plan.json").unlink(missing_ok=True)
    assert main(["train", "--resume", "run", *(["--benchmark", "edit"] if evaluated else ["--no-evaluate"])]) == 2
    assert said in error(capfd)


def test_a_contract_of_another_shape(unfinished: Path) -> None:
    run = RunDirectory.read(unfinished)
    from lvrpo.errors import InputError

    shutil.copytree(unfinished, "run")
    Path("run/contract.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r'contract\.json: \{"a": 1\}: input should be a valid list'):
        RunDirectory.read(Path("run")).read_json("contract.json", list[dict[str, Any]])
    assert run.read_json("contract.json", list[dict[str, Any]])


def test_a_checkpoint_that_a_kill_left_is_pruned_on_resumption(unfinished: Path) -> None:
    run = Path(shutil.copytree(unfinished, "run"))
    checkpoints = run / "checkpoints"
    for extra in ("step_000001", "step_000003x"):
        shutil.copytree(checkpoints / "step_000002", checkpoints / extra)
    before = {path.name for path in checkpoints.iterdir()}
    assert before == {"step_000000", "step_000001", "step_000002", "step_000003x"}
    assert main(["train", "--resume", "run", "--no-evaluate"]) in (0, 3)
    kept = {path.name for path in checkpoints.iterdir()}
    best = json.loads((run / "policy.json").read_text())["checkpoint"].split("/")[-1]
    assert kept == {"step_000001", "step_000002", "step_000003x", best}  # the last two, and validation's best


def test_a_run_of_an_older_version_goes_on(unfinished: Path) -> None:
    """Its config.yaml lacks keys that came later, and its manifest holds the hash of that file."""
    import yaml

    from lvrpo.config import tree_sha256

    run = Path(shutil.copytree(unfinished, "run"))
    tree = yaml.safe_load((run / "config.yaml").read_text())
    del tree["health"]
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "config_sha256": tree_sha256(tree)}))
    assert main(["train", "--resume", "run", "--no-evaluate"]) in (0, 3)


def test_a_run_that_cannot_be_written_is_read(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(unfinished, "run"))
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and Path(path).parts[:1] == ("run",):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(Path, "touch", lambda self, *_, **__: os.open(self, os.O_CREAT))
    assert main(["audit", "run"]) == 0
    capfd.readouterr()
    assert main(["train", "--resume", "run"]) == 2
    assert "run/.lock: cannot be written: permission denied" in error(capfd)
    assert main(["report", "run"]) == 2
    assert "audit.json: cannot be written: permission denied" in error(capfd)
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in unfinished.iterdir())


def test_a_configuration_of_the_other_kind_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (
            ("train", "pretrain"),
            "is a supervised configuration (it has a section 'batch'): start it with lvrpo",
        ),
        (("check", "pretrain"), "is a supervised configuration"),
        (("quickstart", "--config", "pretrain"), "is a supervised configuration"),
        (("train", "bagel_tiny_pretrain"), "is a supervised configuration"),
        (
            ("pretrain", "quickstart"),
            "is an RL configuration (it has a section 'data'): start it with lvrpo",
        ),
    ):
        assert main(arguments) == 2
        assert said in error(capfd)
    assert list(Path().iterdir()) == []
