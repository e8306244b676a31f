"""Atomic file writes (temporary name, fsync, rename) with the permissions of the umask, and safetensors files.

All safetensors files are read here, except by ``policies.safetensors_reader``, which calls ``require_weights`` itself.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lvrpo.errors import InputError

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Allowed dtypes of stored weights."""


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to; on exit it is synced and renamed to ``path``, on failure removed.

    An existing file is replaced. ``checkpoint.clean_leftovers`` recognizes the temporary name.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(mode)  # safetensors creates files with mode 0600
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a file atomically; raises OSError."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file atomically; raises OSError, also for one that safetensors wraps in its own error."""
    with atomic_file(path) as temporary:
        try:
            save_file(dict(tensors), str(temporary), None if metadata is None else dict(metadata))
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def read_tensors(path: Path, remedy: str, device: str = "cpu") -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises InputError, which ends in ``remedy``, for a damaged file."""
    try:
        with safe_open(str(path), "pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118  # no dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: truncated or damaged ({error}): {remedy}") from None


def read_weights(path: Path, remedy: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """``read_tensors`` with ``require_weights`` for each tensor."""
    tensors, metadata = read_tensors(path, remedy)
    for name, tensor in tensors.items():
        require_weights(path, name, tensor, remedy)
    return tensors, metadata


def require_weights(path: Path, name: str, tensor: torch.Tensor, remedy: str) -> None:
    """Raises InputError, which names file and tensor, for another dtype or values that are not finite."""
    if tensor.dtype not in WEIGHT_DTYPES:
        found, *known = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, *WEIGHT_DTYPES))
        raise InputError(f"{path}: tensor {name} has dtype {found}: weights are {' or '.join(known)}: {remedy}")
    require_finite(path, name, tensor, remedy)


def require_finite(path: Path, name: str, tensor: torch.Tensor, remedy: str) -> None:
    """Raises InputError, which names file and tensor, for values that are not finite."""
    # aminmax returns nan if any value is nan
    if tensor.is_floating_point() and tensor.numel() and not all(end.isfinite() for end in torch.aminmax(tensor)):
        wrong = tensor[~tensor.isfinite()]
        raise InputError(
            f"{path}: tensor {name} holds {float(wrong[0])} ({len(wrong)} of {tensor.numel()} numbers are not finite): "
            f"{remedy}"
        )


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
