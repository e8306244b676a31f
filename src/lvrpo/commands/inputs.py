"""Reads CONFIG and files of the user with one-line errors; writes files whole or not at all, never over others."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lvrpo.atomic_io import write_atomic
from lvrpo.commands.keys import known_config
from lvrpo.commands.options import Options, refuse_existing
from lvrpo.config import ALLOW_CODE, Config, load_config
from lvrpo.data.rows import Row, parse_row
from lvrpo.errors import InputError
from lvrpo.images import load_image, middle_square
from lvrpo.policies.base import Policy
from lvrpo.reading import parse_json, path_exists, read_lines
from lvrpo.registry import allow_code
from lvrpo.training.checkpoint import atomic_folder, disk_errors
from lvrpo.training.config import ROLLOUT_OF
from lvrpo.training.run_directory import MANIFEST, json_text
from lvrpo.types import Image, TaskKind

C = TypeVar("C", bound=Config)


def read_config(cls: type[C], name: str | None, overrides: Sequence[str]) -> C:
    """Loads and validates a configuration; its ``allow_code`` takes effect unless the file is part of a run."""
    path = known_config(cls.__name__, name, overrides)
    config = load_config(cls, path, overrides, allow_code=not path_exists(path.parent / MANIFEST))
    allow_code(getattr(config, ALLOW_CODE, ()))  # only an alignment has it
    return config


def write_file(path: Path, content: bytes, force: bool) -> None:
    """Writes a file whole or not at all; refuses to replace one unless ``force``."""
    refuse_existing([path], force)
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent}: is a file: choose another folder")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


def write_json(options: Options, content: Any) -> None:
    """Writes ``--json``, where it was given. Any: values of JSON."""
    if options.json is not None:
        write_file(options.json, json_text(content).encode(), options.force)


def require_png(path: Path) -> None:
    """Raises InputError for the name of an image to write that ends in anything but .png."""
    if path.suffix.lower() != ".png":
        raise InputError(f"--out {path}: images are written as PNG: end the name in .png")


def require_used(option: str, setting: str, policies: Sequence[Policy]) -> None:
    """Raises InputError for an option that none of the policies uses; ``setting``: its field of ``rollout``."""
    concerned = ROLLOUT_OF[setting]
    kinds = dict.fromkeys(kind for policy in policies for kind in policy.segment_kinds)
    if not kinds.keys() & set(concerned):
        does = f"applies to {' and '.join(concerned)}, and this model generates {', '.join(kinds)}"
        raise InputError(f"{option}: {does}: leave it out")


@contextmanager
def new_model_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder to write a model into, which gets its name when it is whole; ``require_new`` was called."""
    if folder.exists():  # empty, and perhaps a volume, which cannot be renamed
        with disk_errors(folder):
            yield folder
    else:
        with atomic_folder(folder) as part:
            yield part


def require_new(folder: Path) -> None:
    """Raises InputError for a path that is taken by anything but an empty folder."""
    if path_exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists already: choose another name")


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, row) of JSON lines. Any: what JSON holds."""
    rows = []
    for number, line in read_lines(path, "give a text file"):
        where = f"{path}:{number}"
        row = parse_json(line, where, "one object per line", unique_keys=True)
        if not isinstance(row, dict):
            raise InputError(f"{where}: holds {type(row).__name__}, not an object: one object per line")
        rows.append((where, row))
    return rows


def checked_row(row: dict[str, Any], task: TaskKind, where: str) -> Row:
    """A row in the one format of rows, of this task where it names none; raises InputError. Any: what JSON holds."""
    try:
        return parse_row(row, task)
    except ValueError as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None


def fitting_image(path: Path, side: int | None) -> Image:
    """The image as the model reads it; another size is cropped to its middle square and resized, with a warning.

    A model of any size (None) gets it whole.
    """
    image = load_image(path)
    height, width = image.shape[1:]
    if side is None or (height, width) == (side, side):
        return image
    print(
        f"warning: {path}: {width} x {height} pixels: the middle square is resized to {side} x {side}", file=sys.stderr
    )
    return middle_square(image, side)
