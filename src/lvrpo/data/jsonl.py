"""The user's own prompts from JSON lines."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from typing import Literal

import torch
from pydantic import Field

from lvrpo.config import Config
from lvrpo.data.images import check_image, load_image, load_mask, middle_square, upright_size
from lvrpo.data.schema import Row, parse_row
from lvrpo.errors import InputError
from lvrpo.reading import parse_json, read_text
from lvrpo.types import TASKS, Example, Fact, Image, Part, Prompt, Task


class JsonlConfig(Config):
    """Which files hold the rows (docs/guides/your_data.md); pictures lie beside their file, or in ``root``."""

    train: Path | None = None
    validation: Path | None = None
    """Held-out rows that validation scores."""
    test: Path | None = None
    """Held-out rows that are scored before and after."""
    root: Path | None = None
    """Another folder in which pictures may lie: absolute paths and links may lead into it, and a relative path that is
    not beside its file is looked up there."""
    check: Literal["headers", "pixels"] = "headers"
    """What is checked of every picture before the run starts; damaged pixels are otherwise found at first use."""
    cached_images: int = Field(default=1024, ge=0, le=1_000_000)
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

    def __init__(
        self,
        config: JsonlConfig,
        split: Literal["train", "validation", "test"] = "train",
        seed: int = 0,
        side: int | None = None,
        task: Task | None = None,
    ):
        """Reads and checks every row. Raises InputError, one line that names file and line number.

        ``side``: of the square pictures that the model reads, to which others are brought (None: as they are).
        ``task``: of rows that name none.
        """
        path: Path | None = getattr(config, split)  # the three splits are three of the fields
        if path is None:
            raise InputError(f"no {split} file: set {split} to a .jsonl file")
        self.path, self.seed, self.side = Path(path), seed, side
        self._lines = _read(self.path, config.root, config.check == "pixels", task)
        self._by_task = {t: [x for x in self._lines if x.row.task == t] for t in TASKS}
        self._load = lru_cache(maxsize=config.cached_images)(self._fitted)
        self._load_mask = lru_cache(maxsize=config.cached_images)(load_mask)
        self._order = lru_cache(maxsize=16)(self._shuffled)
        self._say_resized()

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
        return self._prompt(self._line(task, index))

    def in_order(self) -> list[Prompt]:
        """Every row, in the order of the file."""
        return [self._prompt(line) for line in self._lines]

    def require_readable(self, check: Callable[[str], None], everything: bool = False) -> None:
        """Raises InputError, with file and line, where ``check`` refuses a text that the model reads.

        ``everything``: answers and facts too, which rewards may put to the model.
        """
        for line in self._lines:
            row, texts = line.row, [line.row.prompt]
            if everything:
                texts += [row.answer] if row.answer else []
                texts += [text for fact in row.facts for text in (fact.question, fact.answer)]
            for text in texts:
                try:
                    check(text)
                except InputError as error:
                    raise InputError(f"{line.where}: {error}") from None

    def _prompt(self, line: _Line) -> Prompt:
        row, task = line.row, line.row.task
        facts = tuple(Fact(f.kind, f.question, f.answer) for f in row.facts)
        parts: tuple[Part, ...] = (*(self._image(p, line) for p in line.images), row.prompt)
        rules = {} if row.rules is None else row.rules.model_dump(exclude_unset=True)
        return Prompt(
            *(line.id, task, parts, row.kinds, row.answer, facts, row.category, self.path.name),
            rules=rules,
            edited=self._edited(line),
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

    def _fitted(self, path: Path) -> Image:
        image = load_image(path)
        return image if self.side is None else middle_square(image, self.side)

    def _say_resized(self) -> None:
        """One warning for all pictures of another size than the model's."""
        paths = {path for line in self._lines for path in (*line.images, *line.targets) if isinstance(path, Path)}
        sizes = {path: upright_size(path) for path in sorted(paths)} if self.side is not None else {}
        odd = [(path, size) for path, size in sizes.items() if size != (self.side, self.side)]
        if odd:
            path, (height, width) = odd[0]
            which = f"{path} has" if len(odd) == 1 else f"{len(odd)} pictures, such as {path} with"
            warnings.warn(
                f"{self.path}: {which} {width} x {height} pixels: the middle square is resized to {self.side} x "
                f"{self.side}",
                stacklevel=3,
            )

    def _image(self, path: Path, line: _Line) -> Image:
        try:
            return self._load(path)
        except InputError as error:
            raise InputError(f"{line.where}: {error}") from None

    def _edited(self, line: _Line) -> torch.Tensor | None:
        """bool (height, width) of the source, where the row says what may change."""
        boxes = line.row.edited
        if line.mask is not None:
            try:
                mask = self._load_mask(line.mask)
            except InputError as error:
                raise InputError(f"{line.where}: {error}") from None
            if not mask.any():
                raise InputError(f"{line.where}: mask {line.mask.name} is black: make white what the edit may change")
        elif boxes is None or isinstance(boxes, str):
            return None
        else:
            mask = torch.zeros(upright_size(line.images[-1]), dtype=torch.bool)
            for left, top, right, bottom in boxes:
                mask[top:bottom, left:right] = True
        return mask if self.side is None else middle_square(mask[None].float(), self.side)[0] > 0.5

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


def _read(path: Path, root: Path | None, decode: bool, task: Task | None) -> list[_Line]:
    content = read_text(path, "give a file of JSON lines")
    lines: list[_Line] = []
    seen: dict[str, int] = {}
    for number, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        where = f"{path}:{number}"
        found = parse_json(text, where, "one object per line")
        try:
            row = parse_row(found, task)
        except ValueError as error:
            raise InputError(f"{where}: {' '.join(str(error).split())}") from None
        key = row.id or f"{path.stem}:{number}"
        if key in seen:
            raise InputError(f"{where}: id {key!r} is already that of line {seen[key]}: ids must be unique")
        seen[key] = number
        find = partial(picture_path, path.parent, where=where, decode=decode, root=root)
        images = tuple(map(find, row.images))
        named = zip(row.kinds, row.targets, strict=False)
        targets = tuple(find(t) if kind == "image" else t for kind, t in named)
        lines.append(_Line(row, key, where, images, targets, _region(find, row, images, where)))
    if not lines:
        raise InputError(f"{path}: no rows: write one JSON object per line")
    return lines


def _region(find: Callable[[str], Path], row: Row, images: tuple[Path, ...], where: str) -> Path | None:
    """The file of the mask of an edit; raises InputError where a mask or box does not fit the source."""
    if row.edited is None:
        return None
    height, width = upright_size(images[-1])
    if isinstance(row.edited, str):
        mask = find(row.edited)
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


def picture_path(folder: Path, name: str, where: str, decode: bool = False, root: Path | None = None) -> Path:
    """The path of a picture that lies in the folder or in ``root``, links followed.

    Raises InputError that begins with ``where``.
    """
    if not name or "\0" in name:
        raise InputError(f"{where}: picture {name!r} is no path: give a path relative to {folder}")
    if root is not None and not root.is_dir():
        raise InputError(f"root={root}: no such folder: give the folder that holds the pictures")
    roots = [folder] if root is None else [folder, root]
    path = next((path for base in roots if os.path.isfile(path := base / name)), folder / name)
    foreign = PureWindowsPath(name).is_absolute() and not os.path.isfile(path)
    real = Path(os.path.realpath(path))
    if foreign or not any(real.is_relative_to(os.path.realpath(base)) for base in roots):
        raise InputError(
            f"{where}: picture {name!r} lies outside {' and '.join(map(str, roots))} (at {real}): put it "
            "there and give a relative path, or set root to a folder that holds it"
        )
    try:
        load_image(path) if decode else check_image(path)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return path
