"""The small loop and the library give the same numbers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lvrpo.policies.loading import load_policy
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training.components import open_components
from lvrpo.training.config import TrainConfig
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import TrainState
from lvrpo.training.trainer import Trainer


def example(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def grpo_loop(root: Path) -> ModuleType:
    return example(root, "grpo_loop")


def test_the_parts_work_alone(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example(root, "use_the_parts").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 + 3
    assert lines[-3].startswith("mean exact_answer: 0.")


def tiny() -> TinyPolicy:
    policy = load_policy("tiny")
    assert isinstance(policy, TinyPolicy)
    return policy


def test_small_loop_equals_library_bit_for_bit(grpo_loop: ModuleType, tmp_path: Path) -> None:
    config = TrainConfig.model_validate(
        {
            "steps": 3,
            "data": {"prompts_per_step": {"generate": 2, "understand": 4, "edit": 2, "reason": 3}},
            "rollout": {"group_size": 4, "num_steps": 5},
            "flow": {"top_bottom_k": 1},
            "validation": {"every": 100, "prompts": {"understand": 4}},
            "samples_every": 100,
            "reference_eval_every": 100,
            "checkpoint_every": 100,
        }
    )
    small, library = tiny(), tiny()
    rows = list(grpo_loop.train(small, config))

    run = RunDirectory.create(tmp_path / "run", config)
    trainer = Trainer(config, run, TrainState.start(library, config), open_components(config))
    assert trainer.train()

    for (name, one), (_, other) in zip(small.named_parameters(), library.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    logged = [row for row in run.metrics() if row["step"] > 0]
    for row, expected in zip(logged, rows, strict=True):
        for name, value in expected.items():
            assert row[name] == value, name


@pytest.mark.parametrize("name", ["tour", "own_data"])
def test_the_cells_of_a_notebook_run(root: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((root / "examples" / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec(compile("".join(cell["source"]), f"{name}/{cell['id']}", "exec"), names)
    assert names["done"].summary  # type: ignore[attr-defined]  # of lvrpo.train
