"""Whole runs and commands on a simulated GPU: no tensor stays behind on the CPU, and numbers are those of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from families import FAMILIES

from lvrpo.cli import main

PROGRAM = Path(__file__).parent / "doubles" / "simulated_gpu.py"
RUN = (
    "steps=1",
    "data.prompts_per_step={generate: 1, understand: 2, edit: 1, reason: 2}",
    "validation={every: 1, prompts: {generate: 1, understand: 1, edit: 1, reason: 1}}",
    "rollout={group_size: 4, num_steps: 3}",
    "flow.top_bottom_k=1",
    "rewards=[{name: self_vqa}, {name: exact_answer}, {name: edit_consistency}]",
    "--no-evaluate",
)
METHODS = (
    "self",
    "flow_grpo",
    "mix_grpo",
    "dance_grpo",
    "dpo",
    "best_of",
    "dapo",
    "gspo",
    "cispo",
    "corl",
    "lvrpo_paper",
)


def on_gpu(*arguments: object) -> str:
    """The output of a command of lvrpo on the simulated GPU: a process of its own, since PyTorch keeps a device."""
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def metrics(run: Path) -> dict[str, float]:
    """Of the last step."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


def last_row(run: Path) -> dict[str, float]:
    compared = ("loss/", "reward/", "grad_norm/", "kl/")
    return {name: value for name, value in metrics(run).items() if name.startswith(compared)}


def test_a_run_on_a_gpu_has_the_numbers_of_one_on_the_cpu(tmp_path: Path) -> None:
    assert main(["train", "quickstart", "device=cpu", *RUN, "--out", str(tmp_path / "cpu")]) == 0
    on_gpu("train", "quickstart", "device=cuda", *RUN, "--out", tmp_path / "gpu")
    assert last_row(tmp_path / "gpu") == pytest.approx(last_row(tmp_path / "cpu"), rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_a_gpu(name: str, tmp_path: Path) -> None:
    sizes = (
        "rollout.group_size=8",
        "rollout.num_steps=6",
        "data.prompts_per_step={generate: 2, understand: 2, reason: 3}",
    )
    on_gpu("train", name, "device=cuda", "steps=2", *sizes, "--no-evaluate", "--out", tmp_path / "run")
    assert any(name.startswith("loss/") for name in last_row(tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_on_a_gpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    for package in (*family.needs, *(["torchvision"] if name == "qwen3_vl" else [])):
        pytest.importorskip(package)
    family.make(tmp_path / "model")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PROGRAM.parent), *sys.path]))
    on_gpu(
        "train",
        family.recipe,
        *family.overrides(tmp_path / "model"),
        "device=cuda",
        "--no-evaluate",
        "--out",
        tmp_path / "run",
    )
    assert metrics(tmp_path / "run").keys() >= family.losses


@pytest.mark.slow
def test_the_commands_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    on_gpu("generate", "tiny", "--device", "cuda", "--prompt", "two red circles", "--out", "drawn")
    image = "drawn/00000.png"
    on_gpu("ask", "tiny", "--device", "cuda", "--image", image, "how many circles are there ?")
    on_gpu("edit", "tiny", "--device", "cuda", "--image", image, "make the circle blue", "--out", "edited.png")
    on_gpu("evaluate", "tiny", "--device", "cuda", "--n", "5", "--json", "scores.json")
    small = (
        "corpus={scenes: 50, edits: 20, reasons: 20}",
        "batch={generate: 4, caption: 2, question: 4, edit: 2, reason: 2}",
    )
    for config in ("pretrain", "repa"):
        on_gpu("pretrain", config, "device=cuda", "steps=2", "held_out_every=0", *small, "--out", config)
