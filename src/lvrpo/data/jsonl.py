"""The user's own prompts from files of JSON lines."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import ClassVar, Literal

from lvrpo.config import Config
from lvrpo.data.rows import Line, RowPrompts, make_line
from lvrpo.errors import InputError
from lvrpo.images import check_image, load_image
from lvrpo.reading import parse_json, read_text
from lvrpo.types import Split


class JsonlConfig(Config):
    """The files of rows (docs/guides/your_data.md); images are found relative to their file, or to ``root``."""

    hints: ClassVar[Mapping[str, str]] = {"cached_images": "is gone: each set of rows keeps 1 GiB of decoded images"}
    train: Path | None = None
    """File of the rows to train on."""
    validation: Path | None = None
    """Held-out rows that validation scores."""
    test: Path | None = None
    """Held-out rows that are scored before and after."""
    root: Path | None = None
    """Another folder in which images may lie: absolute paths and links may lead into it, and a relative path that is
    not beside its file is looked up there."""
    check: Literal["headers", "pixels"] = "headers"
    """Validation of every image before the run starts; ``headers`` leaves damaged pixels to be found at first use."""


class JsonlPrompts(RowPrompts):
    """Rows of one file."""

    def __init__(
        self,
        config: JsonlConfig,
        split: Split = "train",
        seed: int = 0,
        side: int | None = None,
        problems: list[str] | None = None,
    ):
        """Reads and checks every row. Raises InputError, one line that names file and line number.

        ``side``: of the square images that the model reads, to which others are brought (None: as they are).
        ``problems``: as for ``RowPrompts``.
        """
        path: Path | None = getattr(config, split)  # the three splits are three of the fields
        if path is None:
            raise InputError(f"no {split} file: set {split} to a .jsonl file")
        lines = _read(Path(path), config.root, config.check == "pixels", problems)
        super().__init__(str(path), lines, seed, side, problems)


def _read(path: Path, root: Path | None, decode: bool, problems: list[str] | None = None) -> list[Line]:
    content = read_text(path, "give a file of JSON lines")
    lines: list[Line] = []
    for number, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        find = partial(image_path, path.parent, where=where, decode=decode, root=root)
        try:
            found = parse_json(text, where, "one object per line", unique_keys=True)
            lines.append(make_line(found, where, f"{path.stem}:{number}", path.name, find))
        except InputError as error:
            if problems is None:
                raise
            problems.append(str(error))
    return lines


def image_path(folder: Path, name: str, where: str, decode: bool = False, root: Path | None = None) -> Path:
    """The path of an image that lies in the folder or in ``root``, links followed.

    Raises InputError that begins with ``where``.
    """
    if "://" in name or name.startswith("data:"):
        raise InputError(f"{where}: image {name!r} is an address: fetch the images and give their paths")
    if not name or "\0" in name:
        raise InputError(f"{where}: image {name!r} is no path: give a path relative to {folder}")
    if root is not None and not root.is_dir():
        raise InputError(f"root={root}: no such folder: give the folder that holds the images")
    roots = [folder] if root is None else [folder, root]
    path = next((path for base in roots if os.path.isfile(path := base / name)), folder / name)
    foreign = PureWindowsPath(name).is_absolute() and not os.path.isfile(path)
    real = Path(os.path.realpath(path))
    if foreign or not any(real.is_relative_to(os.path.realpath(base)) for base in roots):
        raise InputError(
            f"{where}: image {name!r} lies outside {' and '.join(map(str, roots))} (at {real}): put it "
            "there and give a relative path, or set root to a folder that holds it"
        )
    try:
        load_image(path) if decode else check_image(path)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return path
