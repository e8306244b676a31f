"""CONFIG, and files of the user: read with one-line errors, written whole or not at all, never over something else."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from lvrpo.atomic_io import write_atomic
from lvrpo.commands.options import refuse_existing
from lvrpo.config import ALLOW_CODE, Config, load_config, read_tree, shipped_configs
from lvrpo.data.images import load_image, middle_square
from lvrpo.data.rows import Row, parse_row
from lvrpo.errors import InputError
from lvrpo.reading import parse_json, path_exists, read_text
from lvrpo.registry import allow_code
from lvrpo.training.checkpoint import disk_errors
from lvrpo.types import Image, Task

C = TypeVar("C", bound=Config)
MANIFEST = "manifest.json"
"""Of a run directory."""


def find_config(name: str) -> Path:
    """The file of CONFIG."""
    shipped = shipped_configs()
    path = Path(name)
    there = os.path.lexists(path) and not path.is_dir()
    if there or (name not in shipped and path.suffix in (".yaml", ".yml")):
        return path
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise InputError(f"config {name!r}: is a folder: give a YAML file, or one of {', '.join(shipped)}")
    if "=" in name:
        raise InputError(f"config {name!r}: an override stands where CONFIG belongs: name a YAML file before it")
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"config {name!r}: no such file: {hint}give a YAML file, or one of {', '.join(shipped)}")


def read_config(cls: type[C], name: str | None, overrides: Sequence[str]) -> C:
    """The configuration, checked; what it allows is allowed from now on, unless the file lies in a run."""
    if name is None:
        raise InputError(f"CONFIG is missing: give a YAML file, or one of {', '.join(shipped_configs())}")
    path = find_config(name)
    refuse_other_kind(cls, name, path)
    config = load_config(cls, path, overrides, allow_code=not path_exists(path.parent / MANIFEST))
    allow_code(getattr(config, ALLOW_CODE, ()))  # only an alignment has it
    return config


def refuse_other_kind(cls: type[Config], name: str, path: Path) -> None:
    """Raises InputError for a configuration of the other kind of run: it has sections that only those have."""
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.pretrain import PretrainConfig

    kinds: dict[type[Config], tuple[str, str]] = {
        TrainConfig: ("an alignment", "train"),
        PretrainConfig: ("a pretraining", "pretrain"),
    }
    others = {kind: words for kind, words in kinds.items() if kind is not cls}
    if cls not in kinds:
        return
    keys = read_tree(path, cls)
    for other, (words, command) in others.items():
        foreign = [key for key in keys if key in other.model_fields and key not in cls.model_fields]
        if foreign and not any(key in cls.model_fields and key not in other.model_fields for key in keys):
            raise InputError(
                f"config {name!r}: is {words} configuration (it has a section {foreign[0]!r}): start it with "
                f"lvrpo {command} {name}"
            )


def write_file(path: Path, content: bytes, force: bool) -> None:
    """Writes a file whole or not at all; refuses to replace one unless ``force``."""
    refuse_existing([path], force)
    if path.parent.exists() and not path.parent.is_dir():
        raise InputError(f"{path.parent}: is a file: choose another folder")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text) of the lines that are not blank."""
    text = read_text(path, "give a text file")
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: is empty: write one line each")
    return lines


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """(file:line, row) of JSON lines. Any: what JSON holds."""
    rows = []
    for number, line in read_lines(path):
        where = f"{path}:{number}"
        row = parse_json(line, where, "one object per line")
        if not isinstance(row, dict):
            raise InputError(f"{where}: holds {type(row).__name__}, not an object: one object per line")
        rows.append((where, row))
    return rows


def checked_row(row: dict[str, Any], task: Task, where: str) -> Row:
    """A row in the one format of rows, of this task where it names none; raises InputError. Any: what JSON holds."""
    try:
        return parse_row(row, task)
    except ValueError as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None


def fitting_image(path: Path, side: int | None) -> Image:
    """The picture as the model reads it; another size is cropped to its middle square and resized, with a warning.

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
