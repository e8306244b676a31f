"""Whatever a user gets wrong: one line that says what, the right exit code, and nothing overwritten."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bad_commands import COMMAND_LINE, CONFIGURATION, DATA, MODELS_AND_RUNS, REWARD_CONTRACT, SMALL_TRAIN
from PIL import Image

from lvrpo.cli import main

REWARDS = """
import torch
from lvrpo.rewards.base import Scores

class Base:
    def applies(self, prompt):
        return True

class NotANumber(Base):
    def score(self, groups, judge):
        return Scores(torch.full((len(groups), len(groups[0])), float("nan")))

class WrongShape(Base):
    def score(self, groups, judge):
        return Scores(torch.zeros(len(groups), 1 + len(groups[0])))

class Constant(Base):
    def score(self, groups, judge):
        return Scores(torch.ones(len(groups), len(groups[0])))

class Failing(Base):
    def score(self, groups, judge):
        raise RuntimeError("the server is away")

def of_lists(trajectories):
    return [0.0]

class Silent:
    pass

class Unmade(Base):
    def __init__(self):
        raise ValueError("no server")

    def score(self, groups, judge): ...
"""


@pytest.fixture(scope="module")
def shelf(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the cases name, made once: policies, a finished run, images, rows."""
    shelf = tmp_path_factory.mktemp("shelf")
    here = Path.cwd()
    os.chdir(shelf)
    try:
        shutil.copytree(small_base, "small")
        assert main([*SMALL_TRAIN, "--out", "finished", "--no-evaluate"]) == 0
        shutil.copytree("finished", "unfinished")
        for name in ("summary.json", "policy.json"):
            (shelf / "unfinished" / name).unlink()
        shutil.copytree("unfinished", "damaged")
        state = max(shelf.glob("damaged/checkpoints/step_*")) / "state" / "state.safetensors"
        state.write_bytes(state.read_bytes()[:1000])
        shutil.copytree("unfinished", "startless")
        shutil.rmtree("startless/start")
        shutil.copytree("finished", "oddsummary")
        Path("oddsummary/summary.json").write_text("{")
        shutil.copytree("finished", "unscored")
        shutil.rmtree("unscored/scores")
        shutil.copytree("finished", "oddscores")
        scores = Path("oddscores/scores/step_000002.npz")
        scores.write_bytes(scores.read_bytes()[:200])
        policies()
        images()
        tables()
    finally:
        os.chdir(here)
    return shelf


def policies() -> None:
    for name in ("truncated", "foreign", "oddconfig", "oddtokens", "othersize"):
        shutil.copytree("small", name)
    weights = Path("truncated/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])
    Path("foreign/config.json").write_text(json.dumps({"model_type": "llama"}))
    config = json.loads(Path("small/config.json").read_text())
    Path("oddconfig/config.json").write_text(json.dumps({**config, "wings": 2}))
    Path("othersize/config.json").write_text(json.dumps({**config, "tower_width": 32}))
    Path("oddtokens/tokenizer.json").write_text("{}")
    Path("hollow").mkdir()
    Path("notes").mkdir()
    Path("notes/todo.txt").write_text("mine\n")


def images() -> None:
    red = Image.new("RGB", (32, 32), "red")
    red.save("red.png")
    Path("broken.png").write_bytes(Path("red.png").read_bytes()[:60])
    Path("text.png").write_text("no image")
    red.save("moving.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), "blue")], duration=50)
    Image.new("1", (9000, 8000)).save("huge.png")
    Path("inside").mkdir()
    red.save("inside/red.png")


def tables() -> None:
    question = {"task": "understand", "prompt": "what color is the circle ?", "images": ["red.png"], "answer": "red"}
    files = {
        "empty": "",
        "noanswer": json.dumps({k: v for k, v in question.items() if k != "answer"}),
        "noimage": f"{json.dumps(question)}\n{json.dumps({k: v for k, v in question.items() if k != 'images'})}",
        "unknownfield": json.dumps({**question, "anwser": "red"}),
        "unknowntask": json.dumps({**question, "task": "undrstand"}),
        "outside": json.dumps({**question, "images": ["../secret.png"]}),
        "address": json.dumps({**question, "images": ["https://host/red.png"]}),
        "inline": json.dumps({**question, "images": ["data:image/png;base64,AAAA"]}),
        "surrogate": json.dumps({**question, "images": ["\ud800.png"]}),
        "absent": json.dumps({**question, "images": ["absent.png"]}),
        "broken": json.dumps({**question, "images": ["text.png"]}),
        "animated": json.dumps({**question, "images": ["moving.gif"]}),
        "huge": json.dumps({**question, "images": ["huge.png"]}),
        "notjson": json.dumps(question) + "\n{",
        "drawing": json.dumps({"task": "generate", "prompt": "a red circle"}),
        "questions": json.dumps({"image": "red.png", "question": "what color is the circle ?"}),
        "noquestion": json.dumps({"image": "red.png"}),
    }
    for name, text in files.items():
        Path(f"{name}.jsonl").write_text(text + "\n" if text else "")
    Path("inside/leaves.jsonl").write_text(json.dumps({"images": ["../red.png"], "prompt": "what ?"}) + "\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    Path("doubled.jsonl").write_text('{"task": "edit", ' + json.dumps(question)[1:] + "\n")
    Path("packed.jsonl").write_bytes(gzip.compress(json.dumps(question).encode()))
    Path("table.csv").write_text("prompt\na red circle\n")
    Path("blank.txt").write_text("\n\n")
    Path("marks.txt").write_text("a red circle\n\n...\n")
    Path("unknown.txt").write_text("a red circle\ntwo red circels\n")
    Path("marks.jsonl").write_text(json.dumps({"prompt": "?!", "images": ["red.png"]}) + "\n")
    Path("broken.yaml").write_text("steps: [1\n")
    Path("nothing.yaml").write_text("# to be written\n")
    Path("list.yaml").write_text("- steps\n")
    Path("twice.yaml").write_text("steps: 3\nsteps: 4\n")
    Path("loop.yaml").write_text("extends: loop.yaml\n")
    Path("bad_rewards.py").write_text(REWARDS)
    Path("broken_rewards.py").write_text("class Reward(:\n    pass\n")
    Path("ring").symlink_to("ring")
    os.mkfifo("pipe")
    Path("leaving_rewards.py").write_text("import sys\nsys.exit(3)\n")


DIGESTS: dict[tuple[str, int, int, int, int], str] = {}
"""By path, inode, size and times: a file that is written or replaced has another time of its last change."""


def contents(folder: Path) -> dict[str, str]:
    found = {}
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "__pycache__"]
        for name in names:
            path = os.path.join(root, name)
            if name == ".lock" or not os.path.isfile(path):
                continue
            s = os.stat(path)
            key = path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns
            if key not in DIGESTS:
                DIGESTS[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            found[os.path.relpath(path, folder)] = DIGESTS[key]
    return found


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [pytest.param(*case, id=case[2]) for case in COMMAND_LINE + CONFIGURATION + MODELS_AND_RUNS + DATA],
)
def test_wrong_input_is_one_line_and_changes_nothing(
    arguments: tuple[str, ...],
    code: int,
    fragment: str,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(shelf)
    monkeypatch.syspath_prepend(shelf)
    before = contents(shelf)
    assert main(arguments) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert fragment in lines[0]
    assert contents(shelf) == before


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"), [pytest.param(*case, id=case[2]) for case in REWARD_CONTRACT]
)
def test_a_broken_reward_stops_the_run_before_its_first_step(
    arguments: tuple[str, ...],
    code: int,
    fragment: str,
    shelf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(shelf / "small", "small")
    monkeypatch.syspath_prepend(shelf)
    assert main([*arguments, "--no-evaluate"]) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert fragment in lines[0]
    assert not Path("new/checkpoints").exists()


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from lvrpo.training import checkpoint

    shutil.copytree(shelf / "small", "small")
    save = checkpoint.write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        if "step_000000" not in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(path, tensors)

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    assert main([*SMALL_TRAIN, "--out", "new", "--no-evaluate"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "the disk is full" in line
    assert [path.name for path in Path("new/checkpoints").iterdir()] == ["step_000000"]
    monkeypatch.setattr(checkpoint, "write_tensors", save)
    assert main(["train", "--resume", "new", "--no-evaluate"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [case[0] for case in CONFIGURATION if case[0][0] == "train"],
    ids=[c[2] for c in CONFIGURATION if c[0][0] == "train"],
)
def test_a_wrong_configuration_is_found_before_any_model_loads(
    arguments: tuple[str, ...], shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lvrpo.training import setup

    def never(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(shelf)
    monkeypatch.syspath_prepend(shelf)
    monkeypatch.setattr(setup, "load_policy", never)
    if "device=gpu" not in arguments:
        assert main(arguments) == 2


def test_debug_shows_the_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "missing.yaml", "--debug"]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith("Traceback")
    assert errors.splitlines()[-1].startswith("error: missing.yaml: no such file")


def test_the_unexpected_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken(run: Path) -> Path:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("lvrpo.commands.report.load_run", broken)
    assert main(["report", "run"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == "error: ZeroDivisionError: division by zero (unexpected: --debug shows where)"


@pytest.mark.parametrize("arguments", [("train", "quickstrat"), ("generate", "nowhere", "--prompt", "a", "--out", "x")])
def test_the_installed_command_behaves_the_same(arguments: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", "lvrpo", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert list(Path().iterdir()) == []


def test_the_table_is_long_and_every_case_stands_once() -> None:
    cases = COMMAND_LINE + CONFIGURATION + MODELS_AND_RUNS + DATA + REWARD_CONTRACT
    assert len(cases) == len({case[0] for case in cases}) >= 40
