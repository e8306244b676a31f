"""The tensors of a checkpoint, and runs that go on from one."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lvrpo.distributed import load_sharded, stored_tensors
from lvrpo.policies.loading import FINAL, TENSORS
from lvrpo.training.checkpoint import STATE, checkpoint_step


def stored(checkpoint: Path, of: str = "") -> dict[str, torch.Tensor]:
    """All that ranks wrote, by name, whole; ``of``: of one set of weights alone, by parameter."""
    folder, prefix = checkpoint / STATE / TENSORS, f"{of}/" if of else ""
    entries = {name: entry for name, entry in stored_tensors(folder).items() if name.startswith(prefix)}
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_sharded(folder, found)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def killed_copy(run: Path, step: int) -> Path:
    """A copy of a finished run as a kill would have left it some time after the checkpoint of a step."""
    copy = run.with_name(f"{run.name}_killed")
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if (checkpoint_step(checkpoint) or 0) > step:
            shutil.rmtree(checkpoint)
    for file in ("summary.json", FINAL):
        (copy / file).unlink(missing_ok=True)
    return copy
