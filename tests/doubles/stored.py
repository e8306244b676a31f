"""The tensors of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from lvrpo.distributed import load_sharded, stored_tensors
from lvrpo.policies.loading import TENSORS
from lvrpo.training.checkpoint import STATE


def stored(checkpoint: Path, of: str = "") -> dict[str, torch.Tensor]:
    """All that ranks wrote, by name, whole; ``of``: of one set of weights alone, by parameter."""
    folder, prefix = checkpoint / STATE / TENSORS, f"{of}/" if of else ""
    entries = {name: entry for name, entry in stored_tensors(folder).items() if name.startswith(prefix)}
    found = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    load_sharded(folder, found)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}
