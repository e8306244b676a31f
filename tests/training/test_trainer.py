"""How the trainer is built: few calls deep, no function too long to read."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from settings import SMALL

from lvrpo.cli import main
from lvrpo.training.losses.grpo import GRPO

LONGEST = 80
"""Lines of a function."""


def test_the_loss_is_four_calls_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_base: Path
) -> None:
    stacks: list[list[str]] = []
    loss = GRPO.loss

    def spied(*given: Any) -> Any:
        stacks.append([frame.function for frame in inspect.stack()[1:]])
        return loss(*given)

    monkeypatch.setattr(GRPO, "loss", spied)
    options = ["train", "quickstart", f"policy={small_base}", *SMALL, "steps=1", "--no-evaluate"]
    assert main([*options, "--out", str(tmp_path / "run")]) == 0
    stack = stacks[0]
    assert stack[: stack.index("main") + 1] == ["train_step", "train", "train", "main"]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_no_function_is_too_long_to_read(root: Path) -> None:
    lengths = {
        f"{path.relative_to(root)}:{function.lineno} {function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in (root / "src" / "lvrpo").rglob("*.py")
        for function in functions(path)
    }
    assert [name for name, lines in lengths.items() if lines > LONGEST] == []
