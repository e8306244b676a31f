"""How the trainer is built, few calls deep with no function too long to read; the average that it keeps."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from settings import SMALL

from lvrpo.cli import main
from lvrpo.config import load_config
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses.grpo import GRPO
from lvrpo.training.trainer import Trainer

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


def test_the_average_follows_the_policy_more_slowly_as_it_grows_older(small_base: Path, tmp_path: Path) -> None:
    """Its decay is min(ema_decay, step / (step + 10)): the first update is taken whole."""
    settings = [*SMALL, f"policy={small_base}", "steps=4", "ema_decay=0.15", "optimizer.warmup_steps=0"]
    trainer = Trainer.start(load_config(TrainConfig, None, settings), tmp_path / "run")
    weights = trainer.state.policies.weights
    policies: list[dict[str, torch.Tensor]] = []
    averages: list[dict[str, torch.Tensor]] = []

    def observe(row: dict[str, Any]) -> None:
        for name, kept in (("policy", policies), ("ema", averages)):
            kept.append({key: tensor.detach().clone() for key, tensor in weights[name].items()})

    with trainer.run:
        assert trainer.train(observe)
    expected = policies[0]
    for step, decay in enumerate((0.0, 1 / 11, 0.15, 0.15)):
        expected = {key: decay * expected[key] + (1 - decay) * fast for key, fast in policies[step].items()}
        for key, tensor in averages[step].items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(policies[0][key], policies[1][key]) for key in expected)
