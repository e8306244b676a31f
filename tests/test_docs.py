"""The pages of docs: links lead somewhere, and the commands and files of the tutorial work."""

from __future__ import annotations

import re
import shlex
import shutil
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
