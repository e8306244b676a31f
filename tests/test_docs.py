"""The pages of docs: links lead somewhere, and the commands and files of the tutorial work."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lvrpo.cli import main, parse_command
from lvrpo.commands.inputs import read_config
from lvrpo.training.config import TrainConfig

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_to_a_file_and_a_heading(root: Path) -> None:
    broken = []
    for page in [*root.glob("*.md"), *root.glob("docs/**/*.md")]:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            if "://" in link or (target.exists() and (not anchor or anchor in anchors(target))):
                continue
            broken.append(f"{page.relative_to(root)}: {link}")
    assert broken == []


def test_the_errors_that_the_readme_shows_are_those_of_the_commands(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shown = re.findall(r"^\$ lvrpo (.*)\n(error: .*)$", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(shown) == 2
    for command, line in shown:
        assert main(shlex.split(command)) == 2
        assert capfd.readouterr().err == f"{line}\n"


def test_the_index_names_every_page(root: Path) -> None:
    index = (root / "docs/index.md").read_text(encoding="utf-8")
    pages = {path.relative_to(root / "docs").as_posix() for path in root.glob("docs/**/*.md")}
    assert pages - {"index.md"} <= set(LINK.findall(index))


@pytest.fixture
def tutorial(root: Path) -> str:
    return (root / "docs/tutorial.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_every_command_of_the_tutorial_parses(tutorial: str) -> None:
    commands = [shlex.split(line) for block in blocks(tutorial, "bash") for line in block.splitlines()]
    assert len(commands) == 11
    for program, *words in commands:
        assert program == "lvrpo"
        assert parse_command(words) is not None
        if words[0] in ("check", "train") and not words[1].endswith(".yaml"):
            read_config(TrainConfig, words[1], [word for word in words[2:] if "=" in word])


def test_three_rows_of_the_tutorial_train(root: Path, tutorial: str, small_base: Path) -> None:
    shutil.copytree(root / "examples/own_data/images", "mine/images")
    train, validation, test = blocks(tutorial, "json")
    (reward,), (config,) = blocks(tutorial, "python"), blocks(tutorial, "yaml")
    rows = {"train.jsonl": train, "validation.jsonl": validation, "test.jsonl": test}
    for name, text in {**rows, "my_reward.py": reward, "mine.yaml": config}.items():
        (Path("mine") / name).write_text(text)
    small = [f"policy={small_base}", "rollout={num_steps: 3, group_size: 4}", "validation.every=1", "steps=2"]
    assert main(["train", "mine/mine.yaml", "--out", "runs/mine", *small]) in (0, 3)  # so small a run may roll back
    assert Path("runs/mine/report.html").exists()


SRUN = f"""#!{sys.executable}
import os, signal, sys, time
def save(*_):
    time.sleep(1)
    with open("saved", "w") as file:
        file.write(os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    sys.exit()
signal.signal(signal.SIGINT, signal.SIG_IGN)  # srun reports the state of the tasks, and passes on other signals
signal.signal(signal.SIGTERM, save)
with open("begun", "w") as file:
    file.write(" ".join(sys.argv))
time.sleep(60)
"""


@pytest.mark.parametrize("begun", [False, True])
def test_the_slurm_script_waits_for_the_checkpoint_of_a_run_that_is_stopped(
    root: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    (script,) = blocks((root / "docs/guides/scaling.md").read_text(encoding="utf-8"), "bash")[:1]
    Path("job.sh").write_text(script)
    for name, code in {"srun": SRUN, "scontrol": "#!/bin/sh\necho first second\n"}.items():
        Path("bin").mkdir(exist_ok=True)
        Path("bin", name).write_text(code)
        Path("bin", name).chmod(0o755)
    Path("runs/full").mkdir(parents=True)  # of a start that was killed
    if begun:
        Path("runs/full/start").mkdir()
        Path("runs/full/start/checkpoint.json").touch()
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:/usr/bin:/bin")
    job = subprocess.Popen(["bash", "job.sh"])
    while not (Path("begun").exists() and Path("begun").read_text()):
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    job.wait(60)
    assert int(Path("saved").read_text()) < 300
    assert Path("begun").read_text().endswith("--resume runs/full" if begun else "policy=bagel --out runs/full")
