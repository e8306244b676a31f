"""``lvrpo launch ray``: what of it needs no Ray, and one run on two workers, one of which is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest
from processes import OPTIONS, finish, rows, start

from lvrpo.cli import main
from lvrpo.commands import launch
from lvrpo.commands.launch import (
    FINAL_CODES,
    Coordinator,
    Job,
    LaunchResult,
    Rendezvous,
    command,
    environment,
    has_start,
    outcome,
    raise_for_result,
    require_resources,
)
from lvrpo.commands.options import Parser
from lvrpo.errors import ContractError, InputError, UnhealthyRunError
from lvrpo.registry import ANY

Output = pytest.CaptureFixture[str]
JOB = Job(("quickstart", "steps=3"), "/shared/runs/one", False, "/shared")


def parsed(*arguments: str) -> list[str]:
    parser = Parser("lvrpo launch ray", "")
    launch.options(parser)
    return launch.train_arguments(parser.parse([*arguments, "--workers", "2"]), ())


def test_a_process_is_started_or_resumes() -> None:
    of_both = ["-m", "lvrpo", "train", "quickstart", "steps=3"]
    assert command(JOB, False)[1:] == [*of_both, "--out", "/shared/runs/one"]
    assert command(JOB, True)[1:] == [*of_both, "--resume", "/shared/runs/one"]


def test_what_train_takes_is_passed_on() -> None:
    assert parsed("quickstart", "seed=1", "--out", "x") == ["quickstart", "seed=1", "--timeout-min", "30"]
    given = ("quickstart", "--benchmark", "scenes,a.jsonl", "--no-evaluate", "--base", "tiny", "--timeout-min", "5")
    assert parsed(*given) == list(given)
    assert parsed("--resume", "x") == ["--timeout-min", "30"]


def test_consent_is_passed_on() -> None:
    parser = Parser("lvrpo launch ray", "")
    launch.options(parser)
    options = parser.parse(["quickstart", "--workers", "1"])
    assert "--allow-code=/a/x.py,mine" in launch.train_arguments(options, ["mine", "/a/x.py"])
    assert "--allow-code" in launch.train_arguments(options, [ANY, "mine"])


def test_a_process_finds_the_others() -> None:
    found = environment(Rendezvous(2, "10.0.0.1", 4000, False), 3, 8, 1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
    assert [found[name] for name in names] == ["3", "8", "1", "10.0.0.1", "4000", "2"]
    assert found["TORCHELASTIC_RUN_ID"]
    assert "TORCHELASTIC_USE_AGENT_STORE" not in found  # rank 0 serves it


@pytest.mark.parametrize(
    ("codes", "code", "again"),
    [((0, 0), 0, False), ((2, 1), 2, False), ((3, 3), 3, False), ((130, 1), 130, False), ((-9, 1), -9, True)],
)
def test_the_first_code_decides_whether_it_is_tried_again(codes: Sequence[int], code: int, again: bool) -> None:
    assert outcome(codes) == code
    assert (code not in FINAL_CODES) == again
    assert 1 not in FINAL_CODES


def test_the_desk_keeps_attempts_apart() -> None:
    coordinator = Coordinator()
    assert (coordinator.begin(), coordinator.report(0, [("out", "a")], None), coordinator.report(0, [], -9)) == (
        0,
        ([], False),
        ([-9], False),
    )
    assert coordinator.begin() == 1
    coordinator.stop()
    assert coordinator.report(1, [("err", "b")], 0) == ([0], True)
    assert coordinator.read() == ([("out", "a"), ("err", "b")], [[-9], [0]])
    assert coordinator.read()[0] == []


@pytest.mark.parametrize(
    ("ended", "kind", "line"),
    [
        (LaunchResult(2, "error: x: unknown"), InputError, "x: unknown"),
        (LaunchResult(3, "not healthy: r: y"), UnhealthyRunError, "r: y"),
        (
            LaunchResult(130, "continue with: lvrpo train --resume /r"),
            KeyboardInterrupt,
            "continue with: lvrpo launch ray --workers N",
        ),
        (LaunchResult(-15, "", None, stopped=True), KeyboardInterrupt, "interrupted"),
        (
            LaunchResult(-9, "", ValueError("of Ray")),
            ContractError,
            "a process ended with code -9: no restart is left: continue with",
        ),
        (LaunchResult(1, "error: z", ValueError("of Ray")), ContractError, "z: no restart is left"),
        (LaunchResult(None, "", ValueError("no\n room")), ContractError, "no room: no restart is left"),
    ],
)
def test_the_command_ends_as_its_processes(ended: LaunchResult, kind: type[BaseException], line: str) -> None:
    with pytest.raises(kind) as error:
        raise_for_result(ended, "/r")
    assert str(error.value).startswith(line)
    raise_for_result(LaunchResult(0), "/r")


def test_more_workers_than_the_cluster_has_room_for() -> None:
    require_resources({"CPU": 4, "GPU": 2}, 4, 0)
    with pytest.raises(InputError, match=r"--workers 3: each takes 1 CPU and 1 GPU, .* 4 CPUs and 2 GPUs: give 2"):
        require_resources({"CPU": 4, "GPU": 2}, 3, 1)
    with pytest.raises(InputError, match="--workers 1: the Ray cluster has 4 CPUs and 0 GPUs: add nodes"):
        require_resources({"CPU": 4, "GPU": 0}, 1, 1)


def test_a_run_has_a_start_once_that_is_written(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    assert not has_start(tmp_path)
    (tmp_path / "start" / "checkpoint.json").touch()
    assert has_start(tmp_path)


def test_one_line_before_ray_is_asked(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["launch", "ray", "quickstart", "--workers", "2"]) == 2
    assert capsys.readouterr().err == "error: lvrpo launch ray: needs ray: pip install 'lvrpo[ray]'\n"
    assert main(["launch", "ray", "quickstart", "stpes=3", "--workers", "2"]) == 2
    assert "did you mean steps?" in capsys.readouterr().err
    Path("old/start").mkdir(parents=True)
    Path("old/start/checkpoint.json").touch()
    assert main(["launch", "ray", "quickstart", "--workers", "2", "--out", "old"]) == 2
    assert capsys.readouterr().err == (
        "error: old: holds a run already: continue it with --resume or choose another name\n"
    )
    assert main(["launch", "ray", "--resume", "old", "--out", "x", "--workers", "2"]) == 2
    assert "leave --out away" in capsys.readouterr().err
    assert main(["launch", "ray", "quickstart"]) == 2
    assert "--workers" in capsys.readouterr().err


# --- with Ray ---


def launched(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lvrpo", "launch", "ray", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def process_of(run: Path, rank: int) -> psutil.Process:
    """The training process of a rank."""
    for process in psutil.process_iter(["cmdline"]):
        if str(run.absolute()) in (process.info["cmdline"] or ()) and process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_a_run_goes_on_after_a_worker_was_killed_and_ends_as_under_torchrun(small_base: Path) -> None:
    pytest.importorskip("ray")
    options = ("quickstart", f"policy={small_base}", *OPTIONS, "steps=6", "--no-evaluate")
    finish(start("train", *options, "--out", "whole"))
    run = Path("killed")
    process = launched(*options, "--workers", 2, "--out", run)
    wait_for(process, lambda: (run / "checkpoints" / "step_000002").exists())
    process_of(run, 1).send_signal(signal.SIGKILL)
    output = finish(process)
    assert "restart 1 of 3 from the last checkpoint" in output
    assert "restart 2" not in output
    assert "Traceback" not in output
    assert rows(run) == rows(Path("whole"))
    assert not list(Path().glob(".ray-*"))


@pytest.mark.slow
def test_interruptions_and_failures_end_as_those_of_train(small_base: Path) -> None:
    pytest.importorskip("ray")
    options = ("quickstart", f"policy={small_base}", *OPTIONS, "--no-evaluate")
    run = Path("stopped")
    process = launched(*options, "steps=200", "--workers", 2, "--out", run)
    wait_for(process, lambda: (run / "metrics.jsonl").exists() and len(rows(run)) > 1)
    process.send_signal(signal.SIGINT)
    output = finish(process, succeeds=False)
    assert process.returncode == 130
    assert f"continue with: lvrpo launch ray --workers N --resume {run.absolute()}" in output
    assert 1 <= rows(run)[-1]["step"] < 200

    process = launched(*options, "--workers", 2, "--out", "no", "--benchmark", "nobody")
    output = finish(process, succeeds=False)
    assert process.returncode == 2
    assert len(output.splitlines()) == 1
    assert output.startswith("error: ")
    process = launched(*options, "--workers", 64, "--out", "no")
    assert "error: --workers 64: each takes 1 CPU" in finish(process, succeeds=False)
    assert not Path("no").exists()

    run = Path("failed").absolute()
    process = launched(*options, "--workers", 1, "--out", run, "--max-failures", 0)
    wait_for(process, lambda: has_start(run))
    process_of(run, 0).send_signal(signal.SIGKILL)
    output = finish(process, succeeds=False)
    assert process.returncode == 1
    again = f"no restart is left: continue with lvrpo launch ray --workers N --resume {run}"
    assert output.splitlines()[-1] == f"error: a process ended with code -9: {again}"
    assert "Traceback" not in output
