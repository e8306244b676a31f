"""The page docs/guides/your_data.md, walked as a new user would: every command and every block of it works."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.cli import main
from lvrpo.commands.inputs import read_config
from lvrpo.report.run import load_run
from lvrpo.training.config import TrainConfig

Output = pytest.CaptureFixture[str]


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs/guides/your_data.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def test_every_command_of_the_page_works(
    root: Path, page: str, small_base: Path, capfd: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a smaller policy and fewer steps, which are appended to the commands."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("cache").resolve())
    shutil.copytree(root / "examples/own_data", ".", dirs_exist_ok=True)
    small = [f"policy={small_base}", "rollout={num_steps: 3, group_size: 4}", "validation.every=1"]
    commands = [line for block in blocks(page, "bash") for line in block.splitlines() if line]
    assert len(commands) == 13
    for command in commands:
        words = shlex.split(command)[1:]
        if words[:2] in (["check", "own.yaml"], ["train", "own.yaml"], ["train", "folder.yaml"]):
            words += [*small, f"steps={3 if '--resume' in words else 2}"]
        code, said = main(words), capfd.readouterr().err
        # validation may roll so small a policy back, and the run then says that it is not well
        assert (code, said) == (0, "") or (code == 3 and words[0] == "train" and "validation, step" in said), command
    check_run(Path("runs/own"))
    folder = json.loads(Path("runs/folder/summary.json").read_text())
    assert {name: (result["metric"], result["n"]) for name, result in folder["after"].items()} == {
        "test": ("reward", 2)
    }
    assert Path("rows.png").exists()
    assert len(list(Path("new").glob("*.png"))) == 1
    assert all("output" in json.loads(line) for line in Path("answers.jsonl").read_text().splitlines())
    assert len(list(Path("drawings").glob("*.png"))) == 2
    assert Path("edited.png").exists()


def check_run(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    metrics = {name: result["metric"] for name, result in summary["after"].items()}
    assert metrics == {"test/generate": "reward", "test/understand": "success", "test/edit": "reward"}
    assert all(part["score"] is not None for part in summary["difference"].values())
    assert summary["steps"] == 3
    record = load_run(run)
    assert record.finished
    looks = [row for row in record.metrics.rows if "validation/generate" in row]
    assert [row["step"] for row in looks] == [0, 1, 2, 3]
    assert all("validation/understand" in row and "validation/edit" in row for row in looks)
    kept = json.loads((run / "eval/after.json").read_text())["prompts"]
    assert sum(case["reward"] is not None for case in kept) == 3
    page = (run / "report.html").read_text()
    assert "mean reward" in page
    assert "Held out: Generation" in page


def test_the_yaml_and_the_rows_on_the_page_are_those_of_the_example(root: Path, page: str) -> None:
    folder = root / "examples/own_data"
    whole = read_config(TrainConfig, str(folder / "own.yaml"), [])
    shown_folder, block = blocks(page, "yaml")
    given = (folder / "folder.yaml").read_text()
    assert shown_folder.splitlines() == [line for line in given.splitlines() if not line.startswith("#")]
    assert len(shown_folder.splitlines()) + 3 <= 10  # and three commands
    shutil.copy(folder / "my_rewards.py", "my_rewards.py")
    Path("page.yaml").write_text(block)
    shown = read_config(TrainConfig, "page.yaml", [])
    assert shown.data.prompts_per_step == whole.data.prompts_per_step
    assert [r.title for r in shown.rewards] == [r.title for r in whole.rewards if r.weight]
    rows = [line for name in ("train", "test") for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    (lines,) = blocks(page, "json")
    assert set(lines.splitlines()) <= set(rows)
    assert len((folder / "train.jsonl").read_text().splitlines()) == 10


def test_the_python_of_the_page_works(page: str, capfd: Output) -> None:
    reward, own_task, notebook = blocks(page, "python")
    exec(reward, {})
    made: dict[str, Any] = {}
    exec(own_task, made)
    task = made["Bright"]({"colors": ["red", "blue"]}, "train", 0)
    assert task.prompts("generate", 2, start=3)[0].parts == ("a blue circle",)
    assert (task.success(torch.ones(3, 8, 8)), task.success(torch.zeros(3, 8, 8))) == (True, False)
    names: dict[str, object] = {}
    exec(notebook, names)
    assert "'metric': 'reward'" in capfd.readouterr().out
    assert Path("runs/notebook/report.html").exists()
