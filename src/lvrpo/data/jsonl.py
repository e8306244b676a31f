"""The user's own prompts from JSON lines: the fields of a row, and the files."""

from __future__ import annotations

import difflib
import os
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path, PureWindowsPath
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lvrpo.config import Config
from lvrpo.data.images import check_image, load_image, load_mask, middle_square, upright_size
from lvrpo.errors import InputError
from lvrpo.patterns import compile_pattern
from lvrpo.reading import parse_json, read_text
from lvrpo.types import TASKS, Example, Fact, Image, OutputKind, Part, Prompt, Task

# --- one row ---


_DEFAULT_OUTPUT: dict[Task, tuple[OutputKind, ...]] = {
    "understand": ("text",),
    "generate": ("image",),
    "edit": ("image",),
    "reason": ("text",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RowFact(_Strict):
    """One statement about the picture to be drawn, as a question with its answer."""

    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    kind: str = "question"
    choices: list[str] = Field(default_factory=list)
    """The answers to choose from, for a question that is not open."""

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> RowFact:
        if self.choices and (self.answer not in self.choices or len({*self.choices}) < max(2, len(self.choices))):
            raise ValueError(
                f"field 'choices' of a fact is {self.choices}: must hold two or more different answers, "
                f"'answer' ({self.answer!r}) among them"
            )
        return self


class TextRules(_Strict):
    """What a text output must keep to, checked by rules; what is not given is not checked."""

    min_words: int = Field(default=0, ge=0, le=1_000_000)
    max_words: int | None = Field(default=None, ge=1, le=1_000_000)
    """Words are what stands between spaces."""
    form: str | None = Field(default=None, min_length=1)
    """A form of the reward ``text_format`` by name, or a regular expression that the whole text must match."""
    include: list[str] = Field(default_factory=list)
    """Words or phrases that must occur, whole, in any case."""
    exclude: list[str] = Field(default_factory=list)
    """Words or phrases that must not."""

    @model_validator(mode="after")
    def _can_be_kept(self) -> TextRules:
        if self.max_words is not None and self.max_words < self.min_words:
            raise ValueError(f"min_words={self.min_words} is above max_words={self.max_words}: no text can keep to it")
        if any(not phrase.strip() for phrase in (*self.include, *self.exclude)):
            raise ValueError("include and exclude must hold words: one is blank")
        try:
            compile_pattern(self.form or "")
        except InputError as error:
            raise ValueError(f"form={self.form!r} is {error}") from None
        return self


class Row(_Strict):
    """One prompt, as written in a file."""

    id: str | None = Field(default=None, min_length=1)
    """Unique in the file; by default the file's name and the line number."""
    task: Task
    prompt: str = Field(min_length=1)
    """The question, the description or the instruction."""
    images: list[str] = Field(default_factory=list)
    """Picture files, relative to the folder of the file; they come before the text."""
    answer: str | None = None
    """The right answer, where there is one."""
    facts: list[RowFact] = Field(default_factory=list)
    rules: TextRules | None = None
    """What the text output must keep to, for the reward ``instruction``."""
    category: str = ""
    """The row of the results table that it counts in."""
    output: list[OutputKind] = Field(default_factory=list)
    """What to produce, in order; by default text (understand, reason) or image (generate, edit)."""
    edited: str | list[list[int]] | None = None
    """Where an edit may change its source (the last of ``images``), for the reward ``edit_consistency``: boxes
    [left, top, right, bottom] in pixels, the last two excluded; or a picture file of its size, white where it may."""
    target: str | list[str] | None = None
    """Outputs to imitate, for supervised rows: a text or a picture file for each entry of ``output``."""

    @property
    def kinds(self) -> tuple[OutputKind, ...]:
        """``output``, or the task's own."""
        return tuple(self.output) or _DEFAULT_OUTPUT[self.task]

    @property
    def targets(self) -> tuple[str, ...]:
        """``target`` as a tuple, empty where there is none."""
        if self.target is None:
            return ()
        return (self.target,) if isinstance(self.target, str) else tuple(self.target)

    @model_validator(mode="after")
    def _task_has_what_it_needs(self) -> Row:
        if not self.prompt.strip():
            raise ValueError("field 'prompt' is blank: write the question, the description or the instruction")
        if self.task in ("understand", "edit") and not self.images:
            raise ValueError(f"task '{self.task}' needs a picture: give field 'images', such as [\"0.png\"]")
        if self.output and self.task != "reason" and tuple(self.output) != _DEFAULT_OUTPUT[self.task]:
            raise ValueError(f"task '{self.task}' produces {_DEFAULT_OUTPUT[self.task][0]}: leave out field 'output'")
        if self.rules is not None and "text" not in self.kinds:
            raise ValueError(
                "field 'rules' is about texts, and this row produces a picture: leave it out, or give facts"
            )
        if self.edited is not None and self.task != "edit":
            raise ValueError(f"field 'edited' is about edits, and task is '{self.task}': leave it out")
        if self.edited is not None and not self.edited:
            raise ValueError("field 'edited' is empty: give boxes [[left, top, right, bottom]], or leave it out")
        for box in self.edited if isinstance(self.edited, list) else ():
            if len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
                raise ValueError(
                    f"field 'edited' has the box {box}: must be [left, top, right, bottom] with 0 <= left < right and "
                    "0 <= top < bottom"
                )
        if self.target is not None and len(self.targets) != len(self.kinds):
            raise ValueError(
                f"field 'target' has {len(self.targets)} entries for {len(self.kinds)} outputs "
                f"({', '.join(self.kinds)}): give one for each"
            )
        return self


def parse_row(data: Any, task: Task | None = None) -> Row:
    """The row, or a ValueError with one line that names the value, the rule and the remedy. Any: decoded JSON.

    ``task``: that of a row that names none.
    """
    if not isinstance(data, dict):
        raise ValueError(f'{_short(data)} is no JSON object: write {{"task": ..., "prompt": ...}}')
    if task is not None:
        data = {"task": task, **data}
    older = next((name for name in OLDER_NAMES if name in data), None)
    if older is not None:
        raise ValueError(f"field '{older}' is of an older format: write {OLDER_NAMES[older]}")
    try:
        return Row.model_validate(data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    problems.sort(key=lambda p: p["type"] != "extra_forbidden")
    raise ValueError(_explain(problems[0], data))


def _explain(problem: Any, data: dict[str, Any]) -> str:
    either = problem["loc"][:1] in (("target",), ("edited",))  # of several types, which stand in the path
    where = [str(part) for part in problem["loc"] if not (either and str(part).startswith(_TYPE_NAMES))]
    name, value = ".".join(where), problem.get("input")
    if problem["type"] == "extra_forbidden":
        models: dict[str, type[_Strict]] = {"facts": RowFact, "rules": TextRules}
        fields = sorted((models.get(where[0], Row) if len(where) > 1 else Row).model_fields)
        near = difflib.get_close_matches(where[-1], fields, n=1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        return f"unknown field '{name}': {hint}there are {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"field '{name}' is missing: add it"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    rule = problem["msg"][0].lower() + problem["msg"][1:].replace("Input should", "should")
    return f"field '{name}' is {_short(value)}: {rule.replace('input should', 'it should')}"


OLDER_NAMES = {"image": '"images": ["0.png"]', "question": '"prompt"'}
"""Names that fields of questions once had, and what is written now."""
_TYPE_NAMES = ("str", "list[")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- files of rows ---


class JsonlConfig(Config):
    """Which files hold the rows (docs/guides/your_data.md); pictures lie beside their file, or in ``root``."""

    train: Path | None = None
    """File of the rows to train on."""
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

    def rows(self) -> Iterator[tuple[str, Task, str, tuple[Path, ...]]]:
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
        facts = tuple(Fact(f.kind, f.question, f.answer, choices=tuple(f.choices)) for f in row.facts)
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
