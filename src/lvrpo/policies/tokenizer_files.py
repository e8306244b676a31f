"""The files of a tokenizer or a processor, which a policy keeps and saves as they were read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer

from lvrpo.errors import InputError
from lvrpo.reading import read_bytes


class StoredFiles:
    """Made of files and never changed: copies of a policy share it."""

    files: Mapping[str, bytes]
    """Contents by name."""

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def save(self, folder: Path) -> None:
        """Writes the files into a folder."""
        for name, content in self.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)


def stored_files(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of those of the files that a folder has."""
    return {name: read_bytes(folder / name, "restore it") for name in names if (folder / name).exists()}


def parse_tokenizer(content: bytes, path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json; raises InputError, one line. ``path``: of the file, for messages."""
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{path}: truncated or damaged ({error}): restore the file") from None
