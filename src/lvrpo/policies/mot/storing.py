"""Writing safetensors files that others may read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a file with the rights of any other: safetensors alone gives a new one to its owner only."""
    path.touch()
    rights = path.stat().st_mode & 0o777
    save_file(dict(tensors), str(path), metadata=dict(metadata))
    path.chmod(rights)
