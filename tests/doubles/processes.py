"""Several ranks: processes of ``torchrun``, and threads that pass for them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from lvrpo.distributed import collectives
from lvrpo.training.run_directory import RunDirectory

OPTIONS = (
    "steps=4",
    "data.prompts_per_step={generate: 3, understand: 8, edit: 1, reason: 3}",
    "rollout={group_size: 4, num_steps: 4}",
    "num_minibatches=2",
    "rewards=[{name: exact_answer}, {name: self_vqa}, {name: knowledge}]",
    "advantages.std_floor=1e-4",
    "validation={every: 2, prompts: {generate: 3, understand: 8}}",
    "checkpoint_every=2",
    "reference_eval_every=2",
    "device=cpu",
)
"""Of a small run of several steps, in which everything comes once."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
ONE_MACHINE = ("--standalone", "--nproc-per-node", "2")


def start(*arguments: object, agent: Sequence[str] = ONE_MACHINE) -> subprocess.Popen[str]:
    """``torchrun`` with options of its own and ``lvrpo`` with these arguments."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*TORCHRUN, *agent, "-m", "lvrpo", *map(str, arguments)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
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


class _Exchange:
    """What ``torch.distributed`` does between processes, for threads: everybody waits for everybody at every call."""

    def __init__(self, size: int, rank: Callable[[], int]) -> None:
        self.rank, self.boxes = rank, cast(list[Any], [None] * size)
        self.barrier = threading.Barrier(size, timeout=60)

    def exchange(self, message: Any) -> list[Any]:
        self.boxes[self.rank()] = message
        self.barrier.wait()
        found = list(self.boxes)
        self.barrier.wait()
        return found

    def all_gather_object(self, boxes: list[Any], value: Any) -> None:
        boxes[:] = [pickle.loads(sent) for sent in self.exchange(pickle.dumps(value))]

    def broadcast_object_list(self, box: list[Any], src: int) -> None:
        box[:] = pickle.loads(self.exchange(pickle.dumps(box))[src])

    def all_reduce(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.exchange(tensor.clone())).sum(dim=0))


class _Peers:
    """Those of a rank, which is the thread's own."""

    def __init__(self, size: int) -> None:
        self.own, self.size, self.heartbeat = threading.local(), size, SimpleNamespace(waiting_since=None)

    @property
    def rank(self) -> int:
        return self.own.rank


def in_ranks(size: int, function: Callable[[int], Any]) -> list[Any]:
    """The results of ``function(rank)`` in so many threads that pass for processes, or what each raised."""
    peers, found = _Peers(size), cast(list[Any], [None] * size)

    def work(rank: int) -> None:
        peers.own.rank = rank
        try:
            found[rank] = function(rank)
        except Exception as error:
            found[rank] = error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_group", peers)
        patch.setattr(collectives, "dist", _Exchange(size, lambda: peers.rank))
        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    return found
