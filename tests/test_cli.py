"""The command line as a user meets it."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from settings import SMALL

from lvrpo.cli import COMMANDS, main, parse_command
from lvrpo.commands.options import Options
from lvrpo.commands.progress import Progress, clock, sparkline
from lvrpo.config import load_config, shipped_configs
from lvrpo.data.scenes import VOCABULARY
from lvrpo.errors import InputError
from lvrpo.evaluation import BENCHMARKS
from lvrpo.policies.loading import policy_folder
from lvrpo.report.run import load_run
from lvrpo.training.config import TrainConfig
from lvrpo.training.pretrain import PretrainConfig
from lvrpo.training.trainer import Trainer

Output = pytest.CaptureFixture[str]
TASKS = tuple(BENCHMARKS)


@pytest.fixture(scope="module")
def quickstart(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A whole small quickstart, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "lvrpo", "quickstart", "--quick", "--policy", str(small_base), "--steps", "2"]
    done = subprocess.run([*command, "--seed", "3"], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "runs" / "quickstart", done.stdout


def test_quickstart_leaves_a_whole_run(quickstart: tuple[Path, str]) -> None:
    run, _ = quickstart
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 3
    for part in (summary["before"], summary["after"], summary["difference"], summary["ours_minus_baseline"]):
        assert tuple(part) == TASKS
        for result in part.values():
            assert result["low"] <= result["score"] <= result["high"]
            assert sum(c["n"] for c in result["categories"].values()) == result["n"]
    baseline = summary["baseline"]
    assert baseline["name"] == "continued pretraining"
    assert tuple(baseline["after"]) == tuple(baseline["difference"]) == TASKS
    assert min(baseline["seconds"], summary["seconds"], summary["peak_memory_gib"]) > 0
    for task in TASKS:
        gained = summary["after"][task]["score"] - summary["before"][task]["score"]
        assert summary["difference"][task]["score"] == pytest.approx(gained)
        beyond = summary["after"][task]["score"] - baseline["after"][task]["score"]
        assert summary["ours_minus_baseline"][task]["score"] == pytest.approx(beyond)
    assert (run / "report.html").stat().st_size > 10_000
    assert json.loads((run / "manifest.json").read_text())["seeds"] == {"run": 3}
    assert (run / "contract.json").exists()
    assert policy_folder(run).parent == run / "checkpoints"


def test_the_report_shows_the_same_prompts_before_during_and_after(quickstart: tuple[Path, str]) -> None:
    record = load_run(quickstart[0])
    assert record.finished
    assert not record.problems
    before = record.samples("before")
    assert before
    assert list(record.samples("after")) == list(record.samples("step 1")) == list(before)
    assert len({(case.task, case.category) for case in before.values()}) == 7 + 6 + 5 + 3
    drawn = [case for case in before.values() if case.image]
    assert drawn
    assert all((quickstart[0] / str(case.image)).is_file() for case in drawn)


def test_quickstart_says_what_it_does_and_what_next(quickstart: tuple[Path, str]) -> None:
    _, printed = quickstart
    for words in ("evaluate before", "train: 2 steps", "step 2/2", "evaluate after", "difference [95 %]"):
        assert words in printed
    for words in ("report.html", "summary.json", "lvrpo generate runs/quickstart", "peak memory"):
        assert words in printed
    assert "\x1b[" not in printed


def test_the_run_is_a_model_and_compares(quickstart: tuple[Path, str], capfd: Output) -> None:
    run = str(quickstart[0])
    assert main(["evaluate", run, "--benchmark", "edit", "--n", "5"]) == 0
    assert main(["compare", run, "--markdown"]) == 0
    printed = capfd.readouterr().out
    assert "edit: 5 prompts" in printed
    assert "quickstart: continued pretraining" in printed
    assert main(["compare", run, "--over-seeds", "--markdown"]) == 0
    assert "too few seeds (1)" in capfd.readouterr().out


def test_the_same_quickstart_is_not_overwritten(quickstart: tuple[Path, str], small_base: Path, capfd: Output) -> None:
    run, _ = quickstart
    before = (run / "summary.json").read_bytes()
    arguments = ["quickstart", "--quick", "--policy", str(small_base), "--steps", "2", "--seed", "3", "--out", str(run)]
    assert main(arguments) == 2
    assert "holds this run already" in capfd.readouterr().err
    assert (run / "summary.json").read_bytes() == before


def test_an_interrupted_quickstart_goes_on(small_base: Path) -> None:
    command = [sys.executable, "-m", "lvrpo", "quickstart"]
    options = ["--quick", "--policy", str(small_base), "--steps", "60", "--out", "run"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = Path("run/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    (line,) = errors.splitlines()
    assert line.endswith("continue with: lvrpo quickstart --resume run")
    assert not Path("run/summary.json").exists()
    alignment = Trainer.resume(Path("run"))
    with alignment.run:
        assert alignment.state.step >= 3


def test_train_evaluates_and_reports(small_base: Path, capfd: Output) -> None:
    arguments = ["train", "quickstart", f"policy={small_base}", *SMALL, "--out", "run", "--benchmark", "reason"]
    assert main(arguments) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert list(summary["before"]) == list(summary["difference"]) == ["reason"]
    assert "baseline" not in summary
    assert Path("run/report.html").exists()
    assert main(["report", "run"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == "run/report.html"
    Path("run/summary.json").write_text("")
    Path("run/audit.json").unlink()
    assert main(["report", "run"]) == 2
    assert not Path("run/audit.json").exists()


def test_pretrain_makes_a_model(small_base: Path, capfd: Output) -> None:
    sizes = ["batch={generate: 4, question: 8}", "corpus={scenes: 20, edits: 5, reasons: 6}", "device=cpu"]
    assert main(["pretrain", "continued", f"init={small_base}", *sizes, "steps=2", "--out", "run"]) == 0
    assert main(["evaluate", "run", "--benchmark", "reason", "--n", "3"]) == 0
    Path("rows.jsonl").write_text('{"task": "reason", "prompt": "what is 1 + 2 ?", "answer": "3"}\n')
    assert main(["evaluate", "run", "--benchmark", "rows.jsonl"]) == 0
    assert main(["pretrain", "--resume", "run"]) == 2
    assert "has finished" in capfd.readouterr().err


def test_check_changes_nothing(small_base: Path, capfd: Output) -> None:
    assert main(["check", "quickstart", f"policy={small_base}", *SMALL]) == 0
    printed = capfd.readouterr().out
    assert f"policy: {small_base}" in printed
    assert "group_size: 4" in printed
    assert "ok      replay, text, own batch" in printed
    assert "estimate, from one small step" in printed
    assert list(Path().iterdir()) == []
    assert main(["check", "bagel_lvrpo_lora", "policy=MISSING"]) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: model 'MISSING': no such folder")


def test_evaluate_writes_scores_that_scripts_can_read(small_base: Path, capfd: Output) -> None:
    arguments = ["evaluate", str(small_base), "--benchmark", "understand,edit", "--n", "20", "--json", "scores.json"]
    arguments += ["--sampled-prompts", "3", "--samples", "4"]
    assert main(arguments) == 0
    written = json.loads(Path("scores.json").read_text())
    assert list(written["results"]) == ["understand", "edit"]
    assert {"score", "low", "high", "n", "categories"} <= set(written["results"]["edit"])
    assert list(written["results"]["edit"]["pass_at_k"]) == ["1", "4"]
    assert [len(row) for row in written["scores"]["edit"]["successes"]] == [4] * 3 + [1] * 17
    printed = capfd.readouterr().out
    for words in ("single sample", "pass@4", "best of 4", "balanced accuracy", "Draw, then read back"):
        assert words in printed
    assert len(written["scores"]["edit"]["ids"]) == len(written["scores"]["edit"]["scores"]) == 20
    assert main([*arguments, "--force"]) == 0
    assert json.loads(Path("scores.json").read_text())["results"] == written["results"]


@pytest.mark.parametrize(("model", "base"), [("tiny", "tiny-token"), ("tiny-token", "tiny")])
def test_evaluate_against_a_model_of_fewer_tasks_measures_what_both_can_do(
    model: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named: list[list[str]] = []

    def stop(options: Options, _: object) -> None:
        named.append(options.benchmark)
        raise InputError("enough")

    monkeypatch.setattr("lvrpo.commands.evaluate.measured", stop)
    assert main(["evaluate", model, "--against", base]) == 2
    assert named == [[name for name in BENCHMARKS if name != "edit"]]


def test_evaluate_against_a_model_of_other_tasks_is_refused(
    small_base: Path, monkeypatch: pytest.MonkeyPatch, capfd: Output
) -> None:
    tasks = {str(small_base): ("generate",), "tiny": ("understand", "reason")}
    monkeypatch.setattr("lvrpo.evaluation.experiment.possible_tasks", lambda model: tasks[model])
    assert main(["evaluate", str(small_base), "--against", "tiny"]) == 2
    assert capfd.readouterr().err == f"error: --against tiny: does none of the tasks of {small_base}: name another\n"


def test_evaluate_at_the_settings_that_it_chose(small_base: Path, capfd: Output) -> None:
    arguments = ["evaluate", str(small_base), "--benchmark", "understand", "--n", "6"]
    assert main([*arguments, "--tune", "best.json"]) == 0
    assert "understand: temperature" in capfd.readouterr().out
    assert main([*arguments, "--tuned", "best.json", "--json", "scores.json"]) == 0
    written = json.loads(Path("scores.json").read_text())
    assert written["tuned"]["prompts"] == 6
    assert written["scores"]["understand"]["settings"]["tasks"]["understand"] == {
        "guidance_scale": 1.0,
        **json.loads(Path("best.json").read_text())["settings"]["understand"],
    }
    for wrong, message in (
        ([*arguments, "--tune", "best.json"], "best.json"),  # is there already
        ([*arguments, "--tune", "other.json", "--samples", "4"], "--samples: belongs to an evaluation"),
        (["evaluate", "tiny", "--benchmark", "understand", "--tuned", "best.json"], "tune each model for itself"),
    ):
        assert main(wrong) == 2
        error = capfd.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_generate_writes_images_and_their_index(small_base: Path) -> None:
    Path("prompts.txt").write_text("a red circle\n\ntwo blue squares.\n")
    base = str(small_base)
    assert main(["generate", base, "--prompts", "prompts.txt", "--count", "2", "--seed", "5", "--out", "one"]) == 0
    rows = [json.loads(line) for line in Path("one/index.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"{n:05d}.png" for n in range(4)]
    assert [row["prompt"] for row in rows] == ["a red circle"] * 2 + ["two blue squares."] * 2
    with Image.open("one/00000.png") as image:
        assert (image.size, image.mode) == ((32, 32), "RGB")
    images = [Path(f"one/{row['file']}").read_bytes() for row in rows]
    assert len(set(images)) == 4
    prompts = ["--prompt", "a red circle", "--prompt", "two blue squares."]
    assert main(["generate", base, *prompts, "--count", "2", "--seed", "5", "--out", "two"]) == 0
    assert [Path(f"two/{n:05d}.png").read_bytes() for n in range(4)] == images
    assert main(["generate", base, "--prompt", "a red circle", "--guidance", "2", "--out", "two", "--force"]) == 0
    assert Path("two/00000.png").read_bytes() != images[0]


def test_ask_answers_one_question_and_many(small_base: Path, capfd: Output) -> None:
    Image.new("RGB", (32, 32), "red").save("red.png")
    base = str(small_base)
    assert main(["ask", base, "--image", "red.png", "What color is the circle?"]) == 0
    output = capfd.readouterr()
    assert output.err == ""
    answer = output.out.strip()
    assert set(answer.split()) <= set(VOCABULARY)
    rows = [{"images": ["red.png"], "prompt": "What color is the circle?", "category": "color"}] * 2
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["ask", base, "--questions", "asked.jsonl"]) == 0
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [{**r, "output": answer} for r in rows]
    assert main(["ask", base, "--questions", "asked.jsonl", "--out", "answers.jsonl"]) == 0
    assert len(Path("answers.jsonl").read_text().splitlines()) == 2
    Path("asked.jsonl").write_text(json.dumps({"image": "red.png", "question": "what ?"}) + "\n")
    assert main(["ask", base, "--questions", "asked.jsonl"]) == 2
    assert "asked.jsonl:1: field 'image' is of an older format: write \"images\"" in capfd.readouterr().err
    row = {"task": "understand", "images": ["red.png"], "prompt": "What color is the circle?", "answer": "red"}
    Path("asked.jsonl").write_text(json.dumps(row) + "\n")
    assert main(["ask", base, "--questions", "asked.jsonl"]) == 0
    output = capfd.readouterr()
    assert (output.err, json.loads(output.out)) == ("", {**row, "output": answer})


def test_a_image_of_another_size_is_fitted_with_a_warning(small_base: Path, capfd: Output) -> None:
    Image.new("RGB", (640, 480), "green").save("photo.png")
    assert main(["ask", str(small_base), "--image", "photo.png", "is there a red circle ?"]) == 0
    errors = capfd.readouterr().err
    assert errors == "warning: photo.png: 640 x 480 pixels: the middle square is resized to 32 x 32\n"
    assert main(["edit", str(small_base), "remove the circle", "--image", "photo.png", "--out", "edited.png"]) == 0
    with Image.open("edited.png") as image:
        assert image.size == (32, 32)


@pytest.mark.parametrize("arguments", [["data"], ["data", "--help"]])
def test_a_group_of_commands_explains_itself(arguments: list[str], capfd: Output) -> None:
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    assert printed.startswith("usage: lvrpo data COMMAND")
    assert all(f"data {name} " in printed for name in ("preview", "vocabulary"))


def test_data_commands(capfd: Output) -> None:
    assert main(["data", "vocabulary"]) == 0
    assert capfd.readouterr().out.split() == list(VOCABULARY)
    assert main(["data", "preview", "--out", "world.png"]) == 0
    assert capfd.readouterr().out.strip() == "world.png"
    with Image.open("world.png") as image:
        assert min(image.size) > 500


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_every_shipped_configuration_is_valid_and_says_what_it_is(name: str) -> None:
    path = shipped_configs()[name]
    supervised = "pretrain" in name or name.startswith("continued") or name == "repa"
    cls: Any = PretrainConfig if supervised else TrainConfig
    load_config(cls, path)
    assert path.read_text().startswith("# ")


def test_help_is_quick_and_complete() -> None:
    code = "import sys; from lvrpo.cli import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *printed, modules = done.stdout.splitlines()
    assert "torch" not in modules
    assert "'numpy'" not in modules
    for name in COMMANDS:
        assert any(line.strip().startswith(name) for line in printed)


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_explains_itself(name: str, capfd: Output) -> None:
    assert main([*name.split(), "--help"]) == 0
    printed = capfd.readouterr().out
    assert printed.startswith(f"usage: lvrpo {name} ")
    examples = re.findall(r"^  (.*lvrpo .*)$", printed.rpartition("\nexamples:\n")[2], flags=re.MULTILINE)
    assert examples
    for example in examples:
        for command in re.sub(r"[#>].*", "", example).replace("-m lvrpo", "&& lvrpo").split("&&"):
            program, *words = shlex.split(command)
            if program == "lvrpo":
                assert parse_command(words) is not None or "--config-help" in words  # which prints, and ends


def test_version(capfd: Output) -> None:
    from lvrpo import __version__

    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"lvrpo {__version__}\n"


def test_a_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m lvrpo data vocabulary | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("script", "code", "line"),
    [
        ("lvrpo --help > /dev/full", 1, "error: the output cannot be written: no space is left on its device"),
        ("mkdir gone && cd gone && rmdir ../gone && lvrpo trian", 2, "error: command 'trian': unknown"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line(script: str, code: int, line: str) -> None:
    command = script.replace("lvrpo ", f"{sys.executable} -m lvrpo ")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_main_works_outside_the_main_thread(capfd: Output) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["data", "vocabulary"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_sparkline() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert len(sparkline([float(i) for i in range(1000)])) == 24


def test_clock() -> None:
    assert [clock(s) for s in (0.4, 75, 3675)] == ["0:00", "1:15", "1:01:15"]


def rows(steps: int) -> list[dict[str, Any]]:
    found = [
        {"step": s, "seconds": 2.0 * s, "seconds_left": 2.0 * (steps - s), "reward/generate/facts": s / steps}
        for s in range(1, steps + 1)
    ]
    found[0]["control/generate/facts"] = 0.125
    found[1]["validation/action"] = "rolled back to step 0: edit fell"
    return found


def test_progress_without_a_terminal_is_plain_lines() -> None:
    out = io.StringIO()
    with Progress(4, Console(file=out, highlight=False)) as progress:
        progress.phase("align")
        for row in rows(4):
            progress.step(row)
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines == [
        "0:00  align",
        "step 1/4, 0:06 left: generate facts 0.250",
        "step 2: validation rolled back to step 0: edit fell",
        "step 4/4, 0:00 left: generate facts 0.625",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_prints_names_that_look_like_markup(terminal: bool) -> None:
    out = io.StringIO()
    with Progress(1, Console(file=out, force_terminal=terminal, width=100, highlight=False)) as progress:
        progress.step({"step": 1, "seconds": 1.0, "seconds_left": 0.0, "reward/generate/[red]": 0.25})
    assert "generate [red]" in out.getvalue()


def test_progress_on_a_terminal_shows_rewards_base_curve_and_seconds_left() -> None:
    out = io.StringIO()
    with Progress(4, Console(file=out, force_terminal=True, width=100, highlight=False)) as progress:
        for row in rows(4):
            progress.step(row)
    last = out.getvalue()[-1500:]
    for words in ("step 4/4", "0:00 left", "generate facts", "0.625", "0.125", "▁▃▆█", "validation rolled back"):
        assert words in last


def test_what_is_measured_is_known_before_a_run_can_be_resumed(
    small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lvrpo.training.trainer.save_start", killed)
    options = (f"policy={small_base}", *SMALL, "--benchmark", "edit", "--out", "run")
    assert main(["train", "quickstart", *options]) == 130
    assert json.loads(Path("run/plan.json").read_text())["benchmarks"] == ["edit"]


def test_a_process_of_torchrun_ends_without_tearing_the_interpreter_down() -> None:
    """Threads of gloo that still release tensors abort a process whose interpreter is being finalized."""
    program = """
import atexit, os, sys
from lvrpo.cli import run

class AbortsAtTeardown:
    def __del__(self, abort=os.abort):
        abort()

kept = AbortsAtTeardown()
atexit.register(print, "at exit")
sys.argv = ["lvrpo", "--version"]
run()
"""
    environment = {**os.environ, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == ["at exit"]


@pytest.mark.parametrize(("command", "setting"), [("train", "rollout.group_size"), ("pretrain", "checkpoint_every")])
def test_settings_are_described_on_the_command_line(command: str, setting: str, capsys: Output) -> None:
    assert main([command, "--config-help", setting]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{setting}  (int >= ")
    assert second.strip()
    assert main([command, "--config-help"]) == 0
    every = capsys.readouterr().out
    assert {name.partition("  ")[0] for name in every.splitlines() if not name.startswith(" ")} >= {setting, "seed"}
    assert main([command, "--config-help", f"x{setting}"]) == 2
    assert f"did you mean {setting}?" in capsys.readouterr().err


def test_a_reader_of_the_output_that_ends_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Output) -> None:
    """rich turns the closed pipe of ``lvrpo train ... | head`` into SystemExit(1)."""

    def closed(arguments: list[str]) -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904  # as rich does

    monkeypatch.setattr("lvrpo.cli.parse_command", closed)
    assert main(["data", "vocabulary"]) == 1
    assert (
        capsys.readouterr().err == "error: the program that reads the output has ended, so the command stopped, too\n"
    )
