"""The benchmarks of BAGEL run at a small shape: their numbers are checked, not their speed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lvrpo.policies.bagel.create import BagelSizes


def load(root: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_both_ways_of_a_step_give_the_same_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = load(root, "bagel_step")
    monkeypatch.setattr(module, "TASKS", {"understand": 1, "generate": 1, "edit": 1, "reason": 1})
    sizes = BagelSizes(width=32, depth=2, heads=2, key_heads=1, mlp_width=32, vit_width=16, vit_depth=1, vit_heads=1)
    found = module.compare(sizes, group_size=2, repeats=1)
    assert found["members"] == 8
    assert found["logprobs"] < 1e-5
    assert found["latents"] < 1e-4
    assert found["gradient"] < 1e-4
    times = [found[f"{way}_{part}_s"] for way in ("ours", "straightforward") for part in ("sample", "train")]
    assert found["ratio"] == pytest.approx((times[2] + times[3]) / (times[0] + times[1]))
    seeds = iter(range(99))
    monkeypatch.setattr(module, "seeds_of", lambda prompts: [next(seeds) for _ in prompts])
    with pytest.raises(AssertionError, match="different texts"):
        module.compare(sizes, group_size=2, repeats=1)


def test_dry_run_of_the_gpu_benchmark(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(sys, "argv", ["bagel_gpu.py", "--dry-run"])
    load(root, "bagel_gpu").main()
    page = capsys.readouterr().out.split("# BAGEL on one GPU")[1]
    lines = [line.strip("| ") for line in page.splitlines() if line.startswith("| ")][1:]
    rows = dict(line.split(" | ") for line in lines)
    assert len(rows) == 9
    assert not [name for name, value in rows.items() if value.startswith("not measured:") or "did not fit" in value]
    for name, unit in (("text", "tokens/s"), ("matmul, bfloat16", "TFLOP/s"), ("images, 64 x 64", "images/s")):
        assert float(rows[name].split()[0]) > 0
        assert unit in rows[name]
    assert "rollout" in rows["joint LoRA step, G = 8"]
    assert float(rows["predicted for that step"].split(" GiB")[0]) > 0
    assert not Path("docs").exists()


def test_operators_and_reads_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    module = load(root, "roofline")
    with module.Operators() as operators:
        total = torch.ones(3).mul(2).sum()
    assert (operators.count, operators.reads) == (3, 0)
    with operators:
        assert float(total) == 6
    assert (operators.count, operators.reads) == (4, 1)
    assert module.seconds(lambda: torch.ones(8) @ torch.ones(8), torch.device("cpu")) >= 0
