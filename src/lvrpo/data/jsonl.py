"""The user's own prompts from JSON lines."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal

import torch
from pydantic import Field

from lvrpo.config import Config
from lvrpo.data.images import check_image, load_image, load_mask, upright_size
from lvrpo.data.schema import Row, parse_row
from lvrpo.errors import InputError
from lvrpo.types import TASKS, Example, Fact, Image, Part, Prompt, Task


class JsonlConfig(Config):
    """Which files hold the rows; pictures lie in the folder of their file or below."""

    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    check: Literal["headers", "pixels"] = "headers"
    """What is checked of every picture before the run starts; damaged pixels are otherwise found at first use."""
    cached_images: int = Field(default=1024, ge=0)
    """How many decoded pictures are kept in memory."""


@dataclass(frozen=True)
class _Line:
    row: Row
    id: str
    where: str
    """file:line"""
    images: tuple[Path, ...]
    targets: tuple[str | Path, ...]
    mask: Path | None = None
    """Of field 'edited', where it names a file."""


class JsonlPrompts:
    """Rows of one file, shuffled anew for each pass, the same way for the same seed."""

    def __init__(self, config: JsonlConfig, split: Literal["train", "validation", "test"] = "train", seed: int = 0):
        """Reads and checks every row. Raises InputError, one line that names file and line number."""
        path: Path | None = getattr(config, split)  # the three splits are the three fields
        if path is None:
            raise InputError(f"no {split} file: set {split} to a .jsonl file")
        self.path, self.seed = Path(path), seed
        self._lines = _read(self.path, config.check == "pixels")
        self._by_task = {t: [x for x in self._lines if x.row.task == t] for t in TASKS}
        self._load = lru_cache(maxsize=config.cached_images)(load_image)
        self._load_mask = lru_cache(maxsize=config.cached_images)(load_mask)
        self._order = lru_cache(maxsize=16)(self._shuffled)

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks of the rows."""
        return tuple(t for t in TASKS if self._by_task[t])

    def size(self, task: Task) -> int:
        """How many rows a task has."""
        return len(self._by_task[task])

    def asked(self) -> Iterator[tuple[str, Task, str, tuple[Path, ...]]]:
        """(file:line, task, text, picture files) of every row, in the order of the file."""
        return ((line.where, line.row.task, line.row.prompt, line.images) for line in self._lines)

    def prompt(self, task: Task, index: int) -> Prompt:
        """The row at an index >= 0, after ``size(task)`` rows in another order. Raises InputError without such rows."""
        line = self._line(task, index)
        row = line.row
        facts = tuple(Fact(f.kind, f.question, f.answer) for f in row.facts)
        parts: tuple[Part, ...] = (*(self._image(p, line) for p in line.images), row.prompt)
        rules = {} if row.rules is None else row.rules.model_dump(exclude_unset=True)
        return Prompt(
            *(line.id, task, parts, row.kinds, row.answer, facts, row.category, self.path.name),
            rules=rules,
            edited=self._edited(line, parts),
        )

    def prompts(self, task: Task, n: int, start: int = 0) -> list[Prompt]:
        """``n`` prompts from ``start`` on."""
        return [self.prompt(task, index) for index in range(start, start + n)]

    def example(self, task: Task, index: int) -> Example:
        """The prompt with the row's target. Raises InputError for a row without one."""
        line = self._line(task, index)
        if not line.targets:
            raise InputError(
                f"{line.where}: no field 'target': supervised training needs the text or picture to imitate"
            )
        outputs = tuple(t if isinstance(t, str) else self._image(t, line) for t in line.targets)
        return Example(self.prompt(task, index), outputs)

    def _image(self, path: Path, line: _Line) -> Image:
        try:
            return self._load(path)
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from None

    def _edited(self, line: _Line, parts: tuple[Part, ...]) -> torch.Tensor | None:
        """bool (height, width) of the source, where the row says what may change."""
        boxes = line.row.edited
        if line.mask is not None:
            try:
                mask = self._load_mask(line.mask)
            except InputError as error:
                raise InputError(f"{line.where}: {error}") from None
            if not mask.any():
                raise InputError(f"{line.where}: mask {line.mask.name} is black: make white what the edit may change")
            return mask
        if boxes is None or isinstance(boxes, str):
            return None
        source = next(part for part in reversed(parts) if not isinstance(part, str))
        mask = torch.zeros(source.shape[1:], dtype=torch.bool)
        for left, top, right, bottom in boxes:
            mask[top:bottom, left:right] = True
        return mask

    def _shuffled(self, task: Task, epoch: int) -> list[_Line]:
        lines = list(self._by_task[task])
        random.Random(f"{self.seed}/{task}/{epoch}").shuffle(lines)
        return lines

    def _line(self, task: Task, index: int) -> _Line:
        n = len(self._by_task.get(task, ()))
        if not n:
            raise InputError(f"{self.path}: no rows of task '{task}': it has {', '.join(self.tasks)}")
        if index < 0:
            raise IndexError(f"index={index} is negative")
        epoch, position = divmod(index, n)
        return self._order(task, epoch)[position]


def _read(path: Path, decode: bool) -> list[_Line]:
    if not path.is_file():
        raise InputError(f"{path}: no such file: give a file of JSON lines")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    lines: list[_Line] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = parse_row(json.loads(text, parse_constant=_no_constant))
        except json.JSONDecodeError as error:
            raise InputError(f"{where}: not JSON at column {error.colno} ({error.msg}): one object per line") from None
        except RecursionError:
            raise InputError(f"{where}: nested too deeply: write one flat JSON object per line") from None
        except ValueError as error:
            raise InputError(f"{where}: {' '.join(str(error).split())}") from None
        key = row.id or f"{path.stem}:{number}"
        if key in seen:
            raise InputError(f"{where}: id {key!r} is already that of line {seen[key]}: ids must be unique")
        seen[key] = number
        images = tuple(picture_path(path.parent, name, where, decode) for name in row.images)
        named = zip(row.kinds, row.targets, strict=False)
        targets = tuple(picture_path(path.parent, t, where, decode) if kind == "image" else t for kind, t in named)
        lines.append(_Line(row, key, where, images, targets, _region(path.parent, row, images, where, decode)))
    if not lines:
        raise InputError(f"{path}: no rows: write one JSON object per line")
    return lines


def _region(folder: Path, row: Row, images: tuple[Path, ...], where: str, decode: bool) -> Path | None:
    """The file of the mask of an edit; raises InputError where a mask or box does not fit the source."""
    if row.edited is None:
        return None
    height, width = upright_size(images[-1])
    if isinstance(row.edited, str):
        mask = picture_path(folder, row.edited, where, decode)
        h, w = upright_size(mask)
        if (h, w) != (height, width):
            raise InputError(
                f"{where}: mask {row.edited!r} of field 'edited' has {w} x {h} pixels, its source {width} x {height}: "
                "make both equal"
            )
        return mask
    for box in row.edited:
        if box[2] > width or box[3] > height:
            raise InputError(
                f"{where}: field 'edited' has the box {list(box)}, which leaves the source of {width} x {height} "
                "pixels: [left, top, right, bottom] must lie inside"
            )
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON: use a number or leave the field out")


def picture_path(folder: Path, name: str, where: str, decode: bool = False) -> Path:
    """The path of a picture that lies in the folder, links followed; raises InputError that begins with ``where``."""
    absolute = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute()
    path = folder / name
    if not name or "\0" in name:
        raise InputError(f"{where}: picture {name!r} is no path: give a path relative to {folder}")
    if absolute or not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{where}: picture {name!r} lies outside {folder}: put it there and give a relative path")
    try:
        load_image(path) if decode else check_image(path)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return path
