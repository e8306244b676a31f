"""What processes do that die in the middle of a write, or write what another process has."""

from __future__ import annotations

import fcntl
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.rewards.questions import TextCache
from lvrpo.training.checkpoint import checkpoint_writer, save_state
from lvrpo.training.run_directory import RunDirectory


def write_checkpoints(run: Path, ready: Connection) -> None:
    """Replaces seven checkpoints in turn, each with two files that hold the same step."""
    ready.send(None)
    for step in range(1, 10_000):
        with checkpoint_writer(run / "checkpoints" / f"step_{step % 7:06d}") as folder:
            (folder / "policy").mkdir()
            for name in ("policy", "."):
                save_state(folder / name, {"step": step, "weights": torch.full((40_000,), float(step))})


def replace_and_die(target: Path, call: str, nth: int) -> None:
    """Replaces a checkpoint by one of value 2; the nth call of a function of the operating system is the last."""
    module: Any = fcntl if call == "flock" else os
    real, count = getattr(module, call), 0

    def dying(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments)

    setattr(module, call, dying)
    with checkpoint_writer(target) as folder:
        save_state(folder, {"value": 2})


class Root(Config):
    seed: int = 0


def create_run_and_die(path: Path) -> None:
    run = RunDirectory.create(path, Root())
    os.kill(os.getpid(), signal.SIGKILL)
    run.close()


def open_run(path: Path, said: Path) -> None:
    """Writes why it cannot be opened."""
    try:
        RunDirectory.open(path)
    except InputError as error:
        said.write_text(str(error))


def write_texts(folder: Path, who: int) -> None:
    cache = TextCache(folder)
    for round_ in range(50):
        for key in range(4):
            cache.put(f"{key} " * 500, str(key))
            assert cache.get(str(key)) == f"{key} " * 500, (who, round_)
