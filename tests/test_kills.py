"""The real command line, killed over and over: what it goes on to write is what it writes undisturbed, bit for bit.

A process is killed with SIGKILL while it starts, samples and updates, writes a checkpoint, and evaluates at the end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lvrpo.policies.loading import START
from lvrpo.training.run_directory import METRICS, SUMMARY

CHECKPOINT_EVERY = 2
LONGEST = 600
"""Seconds that one process may take."""
TIMES = ("seconds", "memory")
"""In the names of numbers that differ from run to run."""
TRAIN = (
    *("train", "quickstart", "policy=small", "steps=24", "device=cpu", "advantages.std_floor=1e-6"),
    "data.prompts_per_step={generate: 2, understand: 4, edit: 1, reason: 2}",
    "rollout={group_size: 4, num_steps: 3}",
    "rewards=[{name: self_vqa}, {name: exact_answer}]",
    "validation={every: 6, prompts: {generate: 2, understand: 4, reason: 2}}",
    *(f"checkpoint_every={CHECKPOINT_EVERY}", "reference_eval_every=3", "samples_every=4"),
    *("--benchmark", "rows.jsonl", "--out"),
)
PRETRAIN = (
    *("pretrain", "pretrain", "steps=40", "device=cpu", f"checkpoint_every={CHECKPOINT_EVERY}", "held_out_every=20"),
    "policy={tower_width: 64, transformer: {width: 64, depth: 2, heads: 2, key_heads: 2, mlp_width: 128}}",
    "batch={generate: 8, caption: 4, question: 32, edit: 4, reason: 8}",
    "corpus={scenes: 100, edits: 40, reasons: 40}",
    "held_out={generate: 8, understand: 20, edit: 4, reason: 8}",
    "--out",
)
QUICKSTART = ("quickstart", "--quick", "--steps", "6", "--policy", "small", "--out")


# --- when to kill ---


def last_step(run: Path) -> int:
    """Of the last whole line of metrics; -1 without one."""
    path = run / METRICS
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def anything(run: Path, before: int) -> bool:
    """From the first moment on."""
    return True


def another_step(run: Path, before: int) -> bool:
    """A step was done by this process; the next one samples or updates."""
    return last_step(run) > before


def a_checkpoint(run: Path, before: int) -> bool:
    """A step was done after which a checkpoint is written."""
    return last_step(run) > before and last_step(run) % CHECKPOINT_EVERY == 0


def the_end(run: Path, before: int) -> bool:
    """All steps are done; what is left is to be measured."""
    return (run / "policy.json").exists()


@dataclass(frozen=True)
class Moment:
    """When a process is killed: so many seconds after something."""

    after: Callable[[Path, int], bool]
    longest: float


STARTING = Moment(anything, 4.0)
STEPPING = Moment(another_step, 0.4)
SAVING = Moment(a_checkpoint, 0.04)
MEASURING = Moment(the_end, 0.3)


def spread(seed: int, moments: Mapping[Moment, int]) -> list[tuple[Moment, float]]:
    """So many of each, mixed; those of the end come last. Each with its delay."""
    draw = random.Random(seed)
    mixed = [moment for moment, times in moments.items() for _ in range(times) if moment is not MEASURING]
    draw.shuffle(mixed)
    mixed += [MEASURING] * moments.get(MEASURING, 0)
    return [(moment, draw.uniform(0, moment.longest)) for moment in mixed]


# --- processes ---


def started(arguments: Sequence[object]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lvrpo", *map(str, arguments)]
    with open("said.txt", "ab") as said:
        return subprocess.Popen(command, env=environment, stdout=said, stderr=said)


def command_of(first: Sequence[str], run: Path) -> list[object]:
    """The command that began the run, or, once it has its start, the one that goes on."""
    begun = (run / START / "checkpoint.json").exists()
    return [first[0], "--resume", run] if begun else [*first, run]


def finish(first: Sequence[str], run: Path) -> None:
    process = started(command_of(first, run))
    code = process.wait(timeout=LONGEST)
    assert code in (0, 3), Path("said.txt").read_text()[-2000:]  # 3: so few steps may not be well


def kill(process: subprocess.Popen[bytes], run: Path, moment: Moment, delay: float) -> None:
    before, begun = last_step(run), time.monotonic()
    while not moment.after(run, before):
        assert process.poll() is None, f"{process.returncode}: {Path('said.txt').read_text()[-2000:]}"
        assert time.monotonic() - begun < LONGEST
        time.sleep(0.0005)
    time.sleep(delay)
    assert process.poll() is None, f"{process.returncode}: {Path('said.txt').read_text()[-2000:]}"
    process.kill()
    assert process.wait() == -9


def killed_run(first: Sequence[str], run: Path, kills: Sequence[tuple[Moment, float]]) -> None:
    """The run, killed at these moments, and brought to its end."""
    for moment, delay in kills:
        kill(started(command_of(first, run)), run, moment, delay)
    finish(first, run)


# --- what is compared ---


def without_times(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if not any(t in key for t in TIMES)}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size, bytes]]:
    return {name: (t.dtype, t.shape, t.reshape(-1).view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}


def files(run: Path) -> set[Path]:
    return {path.relative_to(run) for path in run.rglob("*") if path.is_file()}


def json_of(path: Path) -> list[Any]:
    """What a file of JSON, or of lines of it, holds."""
    text = path.read_text(encoding="utf-8")
    return [without_times(json.loads(part)) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Every tensor of every checkpoint (weights, averages, optimizers), every line of metrics, every recorded score."""
    assert files(one) == files(other)
    states = 0
    for name in sorted(files(one)):
        left, right = one / name, other / name
        if name.suffix == ".safetensors":
            assert bits(load_file(left)) == bits(load_file(right)), name
            states += name.name == "state.safetensors"
        elif name.suffix == ".npz":
            a, b = np.load(left), np.load(right)
            assert {key: a[key].tobytes() for key in a.files} == {key: b[key].tobytes() for key in b.files}, name
        elif name.name in (METRICS, "state.json") or (name.parent.name == "eval" and name.suffix == ".json"):
            assert json_of(left) == json_of(right), name
        elif name.suffix == ".png":
            assert left.read_bytes() == right.read_bytes(), name
    assert states > 0
    if (one / SUMMARY).exists():
        results = [json.loads((run / SUMMARY).read_text()) for run in (one, other)]
        assert results[0]["after"] == results[1]["after"]


@pytest.fixture
def workplace(small_base: Path) -> None:
    """A base and rows to measure, in the working directory."""
    shutil.copytree(small_base, "small")
    Image.new("RGB", (32, 32), "red").save("red.png")
    row = {"task": "understand", "prompt": "what color is the circle ?", "images": ["red.png"], "answer": "red"}
    Path("rows.jsonl").write_text("".join(json.dumps({**row, "id": str(n)}) + "\n" for n in range(1000)))


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(
    ("first", "moments"),
    [
        pytest.param(TRAIN, {STARTING: 5, STEPPING: 6, SAVING: 6, MEASURING: 3}, id="train"),
        pytest.param(PRETRAIN, {STARTING: 2, STEPPING: 4, SAVING: 4}, id="pretrain"),
        pytest.param(QUICKSTART, {STARTING: 2, STEPPING: 2, SAVING: 2, MEASURING: 2}, id="quickstart"),
    ],
)
def test_a_run_that_is_killed_over_and_over_ends_as_an_undisturbed_one(
    first: tuple[str, ...], moments: Mapping[Moment, int]
) -> None:
    finish(first, Path("whole"))
    killed_run(first, Path("killed"), spread(0, moments))
    assert_equal_runs(Path("whole"), Path("killed"))
