from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import crash_work
import numpy as np
import pytest
import torch
from pydantic import Field
from ranks import exit_code

from lvrpo.config import Config, config_sha256, load_config
from lvrpo.errors import ContractError, InputError
from lvrpo.training import run_directory
from lvrpo.training.checkpoint import checkpoint_writer, latest_checkpoint, save_state
from lvrpo.training.run_directory import RunDirectory, environment, git_commit, to_json


class Training(Config):
    steps: int = 10
    rates: tuple[float, ...] = (1e-4,)


class Root(Config):
    training: Training = Training()
    weights: dict[str, float] = Field(default_factory=dict)
    seed: int = 0


class Named(Config):
    rewards: tuple[dict[str, str], ...] = ()
    file: Path | None = None


def refusal(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


# --- creating and opening ---


def test_create_then_open_gives_the_configuration_back(path: Path) -> None:
    config = Root(training=Training(steps=3), weights={"facts": 0.5})
    with RunDirectory.create(path, config) as run:
        assert run.config(Root) == config
    with RunDirectory.open(path) as run:
        assert run.config(Root) == config
        run.require_config(config, "")


def test_a_path_of_the_current_folder_stays_one_wherever_the_run_is_resumed(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(Named, overrides=["rewards=[{name: ./mine.py:warm}]", "file=../rows.jsonl"])
    with RunDirectory.create(path, config) as run:
        run.write_manifest(config, seeds={})
    with RunDirectory.open(path) as run:
        run.require_config(config, "")  # the same command with --resume
        monkeypatch.chdir("/")
        saved = run.config(Named)
    assert saved == Named(rewards=({"name": f"{tmp_path}/here/mine.py:warm"},), file=tmp_path / "rows.jsonl")


def test_another_configuration_is_refused_and_nothing_overwritten(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        run.append_metrics({"step": 0})
    before = contents(path)
    other = Root(seed=1, training=Training(steps=20, rates=(1.0, 2.0)), weights={"a": 1.0})
    assert refusal(RunDirectory.create, path, other) == (
        f"{path}: holds a run with another configuration (training.steps=10 against 20, "
        "training.rates=[0.0001] against [1.0, 2.0], weights={} against unset and 2 more): "
        "choose another name, or continue that run with --resume and its own configuration"
    )
    assert contents(path) == before


def test_allowed_keys_may_differ_on_resume(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        run.require_config(Root(training=Training(steps=20)), "", allow={"training.steps"})
        said = refusal(run.require_config, Root(seed=1), "start a new run", allow={"training.steps"})
        assert "(seed=0 against 1): start a new run" in said


def test_a_key_that_did_not_exist_when_the_run_began_has_its_default(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        file = path / "config.yaml"
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line for line in lines if not line.startswith("seed")))
        run.require_config(Root(), "")
        assert "(seed=0 against 1): start a new run" in refusal(run.require_config, Root(seed=1), "start a new run")


@pytest.mark.parametrize("left", [[], ["config.yaml"], ["config.yaml", "plan.json"], ["plan.json", "start/a"]])
def test_a_start_that_was_killed_leaves_the_folder_as_new(path: Path, left: list[str]) -> None:
    (path / "start").mkdir(parents=True)
    for name in [".lock", ".start.tmp-0a0a0a0a", *left]:
        (path / name).write_text("seed: 3\n")
    with RunDirectory.create(path, Root(seed=1)) as run:
        assert run.config(Root) == Root(seed=1)
        assert set(contents(path)) == {".lock", "config.yaml"}
    with pytest.raises(ZeroDivisionError), RunDirectory.create(path, Root(seed=2)):
        raise ZeroDivisionError
    assert not path.exists()


@pytest.mark.parametrize("kept", ["start/checkpoint.json", "rows.jsonl", "eval/before.json", "metrics.jsonl"])
def test_what_is_more_than_a_killed_start_is_left_alone(path: Path, kept: str) -> None:
    RunDirectory.create(path, Root()).close()
    (path / kept).parent.mkdir(exist_ok=True)
    (path / kept).write_text("{}")
    before = contents(path)
    assert "holds a run with another configuration" in refusal(RunDirectory.create, path, Root(seed=1))
    assert contents(path) == before


@pytest.mark.parametrize("kept", [".env", ".git/HEAD", ".config"])
def test_hidden_files_of_the_user_are_left_alone(path: Path, kept: str) -> None:
    (path / kept).parent.mkdir(parents=True)
    for name in (kept, ".lock"):
        (path / name).write_text("mine")
    before = contents(path)
    refused = refusal(RunDirectory.create, path, Root())
    assert f"is no run and holds {Path(kept).parts[0]}: choose another name" in refused
    assert contents(path) == before


@pytest.mark.parametrize("progress", ["metrics", "checkpoint", "summary"])
def test_the_same_run_is_not_started_twice_once_it_got_somewhere(path: Path, progress: str) -> None:
    RunDirectory.create(path, Root()).close()
    with RunDirectory.create(path, Root()) as run:
        if progress == "metrics":
            run.append_metrics({"step": 1})
        elif progress == "summary":
            run.write_summary({})
        else:
            with checkpoint_writer(run.checkpoint_dir(1)) as folder:
                save_state(folder, {})
    assert refusal(RunDirectory.create, path, Root()) == (
        f"{path}: holds this run already: continue it with --resume or choose another name"
    )


def test_a_folder_that_is_no_run_is_left_alone(path: Path, tmp_path: Path) -> None:
    path.mkdir(parents=True)
    RunDirectory.create(path, Root()).close()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"x")
    (tmp_path / "file").write_text("x")
    assert refusal(RunDirectory.create, tmp_path / "photos", Root()) == (
        f"{tmp_path / 'photos'}: is no run and holds cat.png: choose another name"
    )
    assert "is a file: choose another name" in refusal(RunDirectory.create, tmp_path / "file", Root())
    assert "is not a run directory" in refusal(RunDirectory.open, tmp_path / "photos")
    assert "is not a run directory" in refusal(RunDirectory.read, tmp_path / "nothing")
    assert contents(tmp_path / "photos") == {"cat.png": b"x"}


# --- one writer ---


def test_a_second_writer_is_refused_and_a_reader_is_not(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        run.append_metrics({"step": 1})
        message = f"{path}: process {os.getpid()} is writing this run: wait for it or choose another name"
        assert refusal(RunDirectory.open, path) == message
        assert exit_code(crash_work.open_run, path, path.with_name("said")) == 0
        assert path.with_name("said").read_text() == message
        assert RunDirectory.read(path).metrics() == [{"step": 1}]
    RunDirectory.open(path).close()


def test_the_lock_dies_with_its_process_and_with_its_object(path: Path) -> None:
    assert exit_code(crash_work.create_run_and_die, path) == -signal.SIGKILL
    run = RunDirectory.open(path)
    del run
    gc.collect()
    RunDirectory.open(path).close()


def test_opening_clears_what_a_killed_writer_left(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        run.append_metrics({"step": 1})
        with checkpoint_writer(run.checkpoint_dir(1)) as folder:
            save_state(folder, {})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    (path / ".summary.json.tmp-0a0a0a0a").write_text("{")
    (path / "checkpoints" / ".step_000002.tmp-0b0b0b0b").mkdir()
    (path / "eval" / "step_000003").mkdir(parents=True)
    (path / "eval" / "step_000003" / ".00003.png.tmp-0c0c0c0c").write_bytes(b"")
    (path / "checkpoints" / "step_000001").rename(path / "checkpoints" / ".step_000001.old-0c0c0c0c")
    assert RunDirectory.read(path).metrics() == [{"step": 1}]
    with RunDirectory.open(path) as run:
        run.append_metrics({"step": 2})
        assert run.metrics() == [{"step": 1}, {"step": 2}]
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["step_000001"]
    assert not (path / ".summary.json.tmp-0a0a0a0a").exists()
    assert not list((path / "eval").rglob(".*"))
    assert latest_checkpoint(path) == path / "checkpoints" / "step_000001"


# --- files ---


def test_json_is_valid_whatever_the_numbers(path: Path) -> None:
    value = {
        "nan": float("nan"),
        "infinite": [float("inf"), -float("inf")],
        "tensor": torch.tensor([1.0, float("nan")]),
        "scalar": torch.tensor(2),
        "numpy": np.float32(0.5),
        "bool": np.bool_(True),
        "float64": np.float64("nan"),
        "path": Path("a/b"),
        "tuple": (1, None, "é"),
        "set": {"b", "a"},
        3: "key",
    }
    with RunDirectory.create(path, Root()) as run:
        written = run.write_json("eval/one.json", value)
        assert run.read_json("eval/one.json") == {
            "nan": None,
            "infinite": [None, None],
            "tensor": [1.0, None],
            "scalar": 2,
            "numpy": 0.5,
            "bool": True,
            "float64": None,
            "path": "a/b",
            "tuple": [1, None, "é"],
            "set": ["a", "b"],
            "3": "key",
        }
        assert "NaN" not in written.read_text()
        assert run.write_text("notes.txt", "é").read_bytes() == "é".encode()
        assert run.write_bytes("a/b.bin", b"\0").read_bytes() == b"\0"
    with pytest.raises(ContractError, match="object cannot be written as JSON"):
        to_json({"a": object()})


def test_names_of_steps(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        assert run.samples_dir(10) == path / "samples" / "step_000010"
        assert run.samples_dir(10).is_dir()
        assert run.checkpoint_dir(50) == path / "checkpoints" / "step_000050"
        assert not run.checkpoint_dir(50).exists()


@pytest.mark.parametrize("relative", ["../out.json", "/tmp/out.json", "a/../../out.json"])
def test_no_file_leaves_the_run(path: Path, relative: str) -> None:
    with RunDirectory.create(path, Root()) as run, pytest.raises(ContractError, match="leaves the run directory"):
        run.write_json(relative, {})


def test_a_missing_or_broken_file_gets_one_line(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        assert run.read_summary() is None
        assert "no such file: the run has not written it" in refusal(run.read_json, "eval/none.json")
        (path / "summary.json").write_text("{")
        assert "summary.json: not JSON at column 2" in refusal(run.read_summary)
        run.write_summary({"seed": 0, "before": {}})
        assert run.read_summary() == {"seed": 0, "before": {}}


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full ("), (errno.EACCES, "permission denied"), (errno.EROFS, "permission denied")],
)
def test_a_failing_disk_gets_one_line_and_keeps_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def failing(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with RunDirectory.create(path, Root()) as run:
        run.write_summary({"seed": 1})
        run.append_metrics({"step": 1})
        before = contents(path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", failing)
            said = refusal(run.write_summary, {"seed": 2})
            assert said.startswith(f"{path / 'summary.json'}: cannot be written: {words}")
            said = refusal(run.append_metrics, {"step": 2}, durable=True)
            assert said.startswith(f"{path / 'metrics.jsonl'}: cannot be written: {words}")
        assert contents(path) == before


def test_half_a_written_line_is_taken_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    calls = 0

    def half_then_full(handle: int, content: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(handle, content[:4])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunDirectory.create(path, Root()) as run:
        run.append_metrics({"step": 1})
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half_then_full)
            assert "the disk is full" in refusal(run.append_metrics, {"step": 2})
        run.append_metrics({"step": 2})
        assert run.metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "permission denied" in refusal(RunDirectory.create, tmp_path / "closed" / "run", Root())


# --- metrics ---


def test_metrics_are_one_valid_line_a_step(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        assert run.metrics() == []
        for step in range(1, 4):
            run.append_metrics({"step": step, "reward": float("nan"), "loss": torch.tensor(0.5)}, durable=step == 2)
        lines = (path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"step": step, "reward": None, "loss": 0.5} for step in range(1, 4)
        ]


def test_a_broken_line_in_the_middle_is_named(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        (path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
        where = f"{path / 'metrics.jsonl'}:2"
        assert (
            refusal(run.metrics) == f"{where}: not JSON at column 2 (Unterminated string starting at): delete this line"
        )


def test_truncation_drops_later_steps_only(path: Path) -> None:
    with RunDirectory.create(path, Root()) as run:
        run.append_metrics({"step": 0, "event": "start"})
        for step in range(1, 8):
            run.append_metrics({"step": step})
        run.truncate_metrics(5)
        assert run.metrics() == [{"step": 0, "event": "start"}, *({"step": step} for step in range(1, 6))]
        inode = (path / "metrics.jsonl").stat().st_ino
        run.truncate_metrics(5)
        assert (path / "metrics.jsonl").stat().st_ino == inode


# --- manifest ---


def test_the_manifest_says_with_what_and_where_and_a_resume_adds_to_it(path: Path) -> None:
    data = {"train": {"name": "train.jsonl", "bytes": 3, "sha256": "ab"}}
    with RunDirectory.create(path, Root()) as run:
        run.write_manifest(Root(), {"run": 7}, data=data)
        first = run.read_json("manifest.json")
        run.write_manifest(Root(), {"run": 7})
        second = run.read_json("manifest.json")
    assert first["versions"]["torch"] == torch.__version__
    assert set(first["versions"]) >= {"lvrpo", "python", "torch", "numpy"}
    assert first["seeds"] == {"run": 7}
    assert first["data"] == data
    assert first["config_sha256"] == config_sha256(Root())
    assert first["hardware"]["cores"] >= 1
    assert first["hardware"]["threads"] == torch.get_num_threads()
    assert first["hardware"]["memory_gib"] > 0
    assert {key: second[key] for key in first} == first
    assert [entry["seeds"] for entry in second["resumed"]] == [{"run": 7}]


def test_a_configuration_of_another_version_is_distinguished_from_an_edit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Older(Root):
        rate: float = 0.5

    monkeypatch.setattr(run_directory, "git_commit", lambda: "0123456789abcdef")
    with RunDirectory.create(path, Older()) as run:
        run.write_manifest(Older(), {"run": 0}, {}, {})
    assert refusal(RunDirectory.read(path).config, Root).startswith(f"{path}/config.yaml: rate: unknown key: did you")
    monkeypatch.setattr(run_directory, "git_commit", lambda: None)
    line = refusal(RunDirectory.read(path).config, Root, ["seed=3"])
    assert line.startswith(f"{path}/config.yaml: was written by lvrpo ")
    assert line.endswith(
        " at commit 0123456789, and has rate, which this version lacks: use that version, or start a new run"
    )
    assert RunDirectory.read(path).config(Older, ["seed=3"]) == Older(seed=3)
    (path / "config.yaml").write_text("rat: 1\n", encoding="utf-8")  # which no version wrote
    assert refusal(RunDirectory.read(path).config, Root).startswith(f"{path}/config.yaml: rat: unknown key")


def test_the_command_does_not_hold_the_path_of_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/home/me/.venv/bin/lvrpo", "train", "a b.yaml"])
    assert environment()["command"] == "lvrpo train 'a b.yaml'"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    module = tmp_path / "module.py"
    module.write_text("x = 1\n")
    git("init")
    monkeypatch.setattr(run_directory, "__file__", str(module))
    assert git_commit() is None
    git("add", "module.py")
    git("commit", "-m", "one")
    clean = git_commit()
    assert clean is not None
    assert len(clean) == 40
    module.write_text("x = 2\n")
    assert git_commit() == f"{clean}-dirty"


def test_no_git_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert git_commit() is None
    assert len(environment()["platform"]) > 0
