"""Files that are whole or not there, with the rights of any other new file: those that the umask leaves."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Gives a temporary name to write to; what lies there is synced and renamed to ``path``, on failure removed.

    A file that is there already is replaced. The temporary name is one that ``checkpoint.clean_leftovers`` knows.
    """
    temporary = path.with_name(f".{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        temporary.touch()
        rights = temporary.stat().st_mode & 0o777
        yield temporary
        temporary.chmod(rights)  # safetensors gives what it writes to its owner only
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole(path: Path, content: bytes) -> None:
    """A file of these bytes; raises OSError."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file; raises OSError also where safetensors hides it in a text of its own."""
    with whole_file(path) as temporary:
        try:
            save_file(dict(tensors), str(temporary), None if metadata is None else dict(metadata))
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def sync(path: Path) -> None:
    """fsync of a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
