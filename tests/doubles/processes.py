"""Several processes: those of ``torchrun``, and threads that pass for them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.wire import Wire, packed, unpacked

OPTIONS = (
    "steps=6",
    "data.prompts_per_step={generate: 3, understand: 8, edit: 1, reason: 3}",
    "rollout={group_size: 4, num_steps: 4}",
    "mini_updates=2",
    "rewards=[{name: exact_answer}, {name: own_vqa}, {name: knowledge}]",
    "advantages.std_floor=1e-4",
    "guard={every: 2, prompts: {generate: 3, understand: 8}}",
    "checkpoint_every=2",
    "control_every=2",
    "device=cpu",
)
"""Of a small run of several steps, in which everything comes once."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lvrpo")


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *map(str, arguments)], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str], succeeds: bool = True) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert (process.returncode == 0) == succeeds, output
    return output


def rows(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in RunDirectory.read(run).metrics()]


def assert_begin_alike(alone: list[dict[str, Any]], shared: list[dict[str, Any]]) -> None:
    """The metrics of two runs up to their first step: later ones start from weights that differ by rounding."""
    assert [set(row) for row in shared] == [set(row) for row in alone]
    for one, other in zip(alone[:2], shared[:2], strict=True):
        for name, value in one.items():
            same = other[name] == value if isinstance(value, str) else other[name] == pytest.approx(value, 1e-3, 1e-4)
            assert same, (name, value, other[name])


class Threads:
    """What processes say to each other, for threads: everybody waits for everybody at every message."""

    def __init__(self, size: int) -> None:
        self.size, self.boxes = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, rank: int, message: Any) -> list[Any]:
        self.boxes[rank] = message
        self.barrier.wait()
        found = list(self.boxes)
        self.barrier.wait()
        return found


class ThreadWire(Wire):
    def __init__(self, threads: Threads, rank: int) -> None:
        self.rank, self.size, self.threads, self.closed = rank, threads.size, threads, False

    def close(self) -> None:
        self.closed = True

    def broadcast(self, tensor: torch.Tensor, source: int = 0) -> None:
        tensor.copy_(self.threads.exchange(self.rank, tensor.clone())[source])

    def reduce(self, tensor: torch.Tensor, owner: int = 0) -> None:
        found = self.threads.exchange(self.rank, tensor.clone())
        tensor.copy_(torch.stack(found).sum(dim=0)) if self.rank == owner else tensor.fill_(torch.nan)

    def broadcast_object(self, message: Any = None) -> Any:
        return unpacked(self.threads.exchange(self.rank, packed(message))[0])

    def scatter_objects(self, messages: Sequence[Any] = ()) -> Any:
        return unpacked(self.threads.exchange(self.rank, [packed(message) for message in messages])[0][self.rank])

    def all_gather_objects(self, message: Any) -> list[Any]:
        return [unpacked(box) for box in self.threads.exchange(self.rank, packed(message))]

    def gather_objects(self, message: Any) -> list[Any]:
        found = self.all_gather_objects(message)
        return found if self.rank == 0 else []
