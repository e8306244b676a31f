"""The user's own prompts, one row each: the fields of a row, and rows as a source of prompts."""

from __future__ import annotations

import hashlib
import json
import random
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lvrpo.data.base import LazyPrompts, Task
from lvrpo.data.leakage import compared_file
from lvrpo.errors import InputError, nearest
from lvrpo.images import ImageCache, ImageFile, StoredImage, load_image, load_mask, middle_square, upright_size
from lvrpo.patterns import compile_pattern
from lvrpo.types import TASKS, Example, Fact, Image, OutputKind, Part, Prompt, TaskKind

# --- one row ---


_DEFAULT_OUTPUT: dict[TaskKind, tuple[OutputKind, ...]] = {
    "understand": ("text",),
    "generate": ("image",),
    "edit": ("image",),
    "reason": ("text",),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RowFact(_Strict):
    """One statement about the image to be drawn, as a question with its answer."""

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
    """Rules that a text output must follow; a rule that is not given is not checked."""

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
    task: TaskKind
    prompt: str = Field(min_length=1)
    """The question, the description or the instruction."""
    images: list[str] = Field(default_factory=list)
    """Image files, relative to the folder of the file; they come before the text."""
    answer: str | None = None
    """The right answer, where there is one."""
    facts: list[RowFact] = Field(default_factory=list)
    rules: TextRules | None = None
    """The rules of the text output, for the reward ``instruction``."""
    category: str = ""
    """The row of the results table that it counts in."""
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Further values, for reward functions with a parameter ``metadata``. Any: JSON."""
    output: list[OutputKind] = Field(default_factory=list)
    """The outputs in order; by default text (understand, reason) or image (generate, edit)."""
    edited: str | list[list[int]] | None = None
    """The region of its source (the last of ``images``) that an edit may change, for ``edit_consistency``: boxes
    [left, top, right, bottom] in pixels, the last two excluded; or an image file of its size, white where it may."""
    target: str | list[str] | None = None
    """Outputs to imitate, for supervised rows: a text or an image file for each entry of ``output``."""

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
            raise ValueError(f"task '{self.task}' needs an image: give field 'images', such as [\"0.png\"]")
        if self.output and self.task != "reason" and tuple(self.output) != _DEFAULT_OUTPUT[self.task]:
            raise ValueError(f"task '{self.task}' produces {_DEFAULT_OUTPUT[self.task][0]}: leave out field 'output'")
        if self.rules is not None and "text" not in self.kinds:
            raise ValueError(
                "field 'rules' is about texts, and this row produces an image: leave it out, or give facts"
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


def parse_row(data: Any, task: TaskKind | None = None) -> Row:
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
    for name, value in data.items():
        if _SURROGATE.search(json.dumps(value, ensure_ascii=False, default=repr)):
            raise ValueError(f"field {name!r} is {_short(value)}: holds half of a character: write it whole")
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
        near = nearest(where[-1], fields)
        hint = f"did you mean '{near}'? " if near else ""
        return f"unknown field '{name}': {hint}there are {', '.join(fields)}"
    if problem["type"] == "missing":
        return f"field '{name}' is missing: add it"
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    rule = problem["msg"][0].lower() + problem["msg"][1:].replace("Input should", "should")
    remedy = f': write "{_short(value)}"' if problem["type"] == "string_type" and isinstance(value, int | float) else ""
    return f"field '{name}' is {_short(value)}: {rule.replace('input should', 'it should')}{remedy}"


OLDER_NAMES = {"image": '"images": ["0.png"]', "question": '"prompt"'}
"""Former names of fields of questions, with their present names."""
_TYPE_NAMES = ("str", "list[")
_SURROGATE = re.compile("[\ud800-\udfff]")
"""What a text that was cut inside an emoji ends with: no file can hold it."""


def _short(value: Any) -> str:
    text = " ".join((repr(value) if isinstance(value, str) else json.dumps(value, default=repr)).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- rows with their images ---


@dataclass(frozen=True)
class Line:
    """A validated row with its images."""

    row: Row
    id: str
    where: str
    """file:line, or the data set and the number of the row."""
    source: str
    """The name of the file or data set."""
    images: tuple[ImageFile, ...]
    targets: tuple[str | ImageFile, ...]
    mask: ImageFile | None = None
    """The file that the field 'edited' names, if it names one."""


def make_line(data: Any, where: str, default_id: str, source: str, find: Callable[[str], ImageFile]) -> Line:
    """The row of decoded JSON with its images; raises InputError that begins with ``where``. Any: decoded JSON.

    ``find``: the image of a name.
    """
    try:
        row = parse_row(data)
    except ValueError as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    images = tuple(map(find, row.images))
    named = zip(row.kinds, row.targets, strict=False)
    targets = tuple(find(t) if kind == "image" else t for kind, t in named)
    return Line(row, row.id or default_id, where, source, images, targets, _region(find, row, images, where))


def _region(find: Callable[[str], ImageFile], row: Row, images: tuple[ImageFile, ...], where: str) -> ImageFile | None:
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


@contextmanager
def errors_at(where: str) -> Iterator[None]:
    """Begins an InputError with ``where``, unless it does."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None


def require_texts(check: Callable[[str], None], where: str, texts: Sequence[str], judged: Row | Prompt | None) -> None:
    """Raises InputError, which begins with ``where``, where ``check`` refuses one of ``texts``.

    ``judged``: its answer and facts are checked too.
    """
    answers = [] if judged is None or not judged.answer else [judged.answer]
    facts = [] if judged is None else [text for fact in judged.facts for text in (fact.question, fact.answer)]
    for text in (*texts, *answers, *facts):
        with errors_at(where):
            check(text)


class RowPrompts(Task):
    """Rows as prompts, reshuffled for each pass, deterministically by seed."""

    def __init__(
        self,
        name: str,
        lines: Sequence[Line],
        seed: int = 0,
        side: int | None = None,
        problems: list[str] | None = None,
    ):
        """Goes through all lines once. Raises InputError for two rows with one id, and where there are none.

        ``name``: in messages. ``lines``: at random access; they may be read anew at each access. ``side``: of the
        square images that the model reads, to which others are brought (None: as they are). ``problems``: errors of
        rows are added here, and those rows left out, instead of an exception for the first.
        """
        self.name, self.seed, self.side = name, seed, side
        self._lines = lines
        self._by_task: dict[TaskKind, list[int]] = {task: [] for task in TASKS}
        self._load = ImageCache(self._fitted)
        self._load_mask = ImageCache(load_mask)
        self._order = lru_cache(maxsize=16)(self._shuffled)
        self._numbers = self._valid_numbers(problems)
        """The lines that are used."""

    def _valid_numbers(self, problems: list[str] | None) -> list[int]:
        """Sorts the lines by task; one warning for all images of another size than the model's."""
        seen: dict[str, str] = {}
        sizes: dict[ImageFile, tuple[int, int]] = {}
        numbers: list[int] = []
        for number, line in enumerate(self._lines) if problems is None else self._sound(problems):
            if line.id in seen:
                before = seen[line.id].removeprefix(f"{self.name}:")
                before = f"line {before}" if before.isdecimal() else before
                message = f"{line.where}: id {line.id!r} is already that of {before}: ids must be unique"
                if problems is None:
                    raise InputError(message)
                problems.append(message)
                continue
            seen[line.id] = line.where
            numbers.append(number)
            self._by_task[line.row.task].append(number)
            for file in (*line.images, *line.targets) if self.side is not None else ():
                if not isinstance(file, str) and file not in sizes:
                    key = StoredImage(file.name, b"") if isinstance(file, StoredImage) else file
                    sizes[key] = upright_size(file)
        if not seen and not problems:
            raise InputError(f"{self.name}: no rows: write one JSON object per line")
        odd = sorted((str(file), size) for file, size in sizes.items() if size != (self.side, self.side))
        if odd:
            file, (height, width) = odd[0]
            which = f"{file} has" if len(odd) == 1 else f"{len(odd)} images, such as {file} with"
            warnings.warn(
                f"{self.name}: {which} {width} x {height} pixels: the middle square is resized to {self.side} x "
                f"{self.side}",
                stacklevel=4,
            )
        return numbers

    def _sound(self, problems: list[str]) -> Iterator[tuple[int, Line]]:
        """The lines without errors; errors are added to ``problems``."""
        for number in range(len(self._lines)):
            try:
                line = self._lines[number]
            except InputError as error:
                problems.append(str(error))
                continue
            yield number, line

    def _all(self) -> Iterator[Line]:
        """The lines that are used, in order."""
        whole = len(self._numbers) == len(self._lines)
        return iter(self._lines) if whole else (self._lines[number] for number in self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def tasks(self) -> tuple[TaskKind, ...]:
        """The tasks of the rows."""
        return tuple(t for t in TASKS if self._by_task[t])

    def size(self, task: TaskKind) -> int:
        """The number of rows of a task."""
        return len(self._by_task[task])

    def has(self, task: TaskKind) -> dict[str, int]:
        """The number of rows of a task, of those with answer, facts and target, and of categories."""
        rows = [self._lines[number].row for number in self._by_task[task]]
        given = {name: sum(bool(getattr(row, name)) for row in rows) for name in ("answer", "facts", "target")}
        return {"rows": len(rows), **given, "category": len({row.category for row in rows if row.category})}

    def rows(self) -> Iterator[tuple[str, TaskKind, str, tuple[ImageFile, ...]]]:
        """(file:line, task, text, image files) of every row, in order."""
        return ((line.where, line.row.task, line.row.prompt, line.images) for line in self._all())

    def fingerprint(self) -> str:
        """SHA-256 of all rows in order, images included by the bytes of their files."""
        total = hashlib.sha256()
        for line in self._all():
            files = [file for file in (*line.images, *line.targets, line.mask) if isinstance(file, ImageFile)]
            digests = [compared_file(file).digest for file in files]
            unused = None if line.row.metadata else {"metadata"}  # rows without it keep their hash
            total.update(f"{line.id} {line.row.model_dump_json(exclude=unused)} {digests}\n".encode())
        return total.hexdigest()

    def prompt(self, task: TaskKind, index: int) -> Prompt:
        """The row at an index >= 0, after ``size(task)`` rows in another order. Raises InputError without such rows."""
        return self._prompt(self._line(task, index))

    def in_order(self) -> Sequence[Prompt]:
        """Every row, in order; images are decoded at each access."""
        return LazyPrompts(lambda number: self._prompt(self._lines[number]), self._numbers)

    def examples(self, task: TaskKind, n: int) -> list[Example]:
        """The first rows of a task in order, with their targets where they have some."""
        return [self._example(self._lines[number]) for number in self._by_task[task][:n]]

    def require_possible(self, check: Callable[[Prompt], None], tasks: Collection[str]) -> None:
        """Raises InputError, with file and line, where ``check`` refuses a row of these tasks.

        Of rows whose images have the same sizes, which a model reads as equally many tokens, the one with the longest
        text is checked alone, so that not every image is decoded.
        """
        longest: dict[object, Line] = {}
        for line in self._all():
            row, fits = line.row, self.side is not None  # all images are then of this size
            sizes = tuple(None if fits else upright_size(file) for file in line.images)
            key = (row.task, row.kinds, sizes) if sizes else line.id
            if row.task in tasks and (key not in longest or len(row.prompt) > len(longest[key].row.prompt)):
                longest[key] = line
        for line in longest.values():
            with errors_at(line.where):
                check(self._prompt(line))

    def require_readable(self, check: Callable[[str], None], everything: bool = False) -> None:
        """Raises InputError, with file and line, where ``check`` refuses a text that the model reads.

        ``everything``: answers and facts too, which rewards may put to the model.
        """
        for line in self._all():
            require_texts(check, line.where, [line.row.prompt], line.row if everything else None)

    def _prompt(self, line: Line) -> Prompt:
        row, task = line.row, line.row.task
        facts = tuple(Fact(f.kind, f.question, f.answer, choices=tuple(f.choices)) for f in row.facts)
        parts: tuple[Part, ...] = (*(self._image(p, line) for p in line.images), row.prompt)
        rules = {} if row.rules is None else row.rules.model_dump(exclude_unset=True)
        return Prompt(
            *(line.id, task, parts, row.kinds, row.answer, facts, row.category, line.source),
            rules=rules,
            metadata=row.metadata,
            edited=self._edited(line),
        )

    def example(self, task: TaskKind, index: int) -> Example:
        """The prompt with the row's target. Raises InputError for a row without one."""
        line = self._line(task, index)
        if not line.targets:
            raise InputError(f"{line.where}: no field 'target': supervised training needs the text or image to imitate")
        return self._example(line)

    def _example(self, line: Line) -> Example:
        outputs = tuple(t if isinstance(t, str) else self._image(t, line) for t in line.targets)
        return Example(self._prompt(line), outputs)

    def _fitted(self, file: ImageFile) -> Image:
        image = load_image(file)
        return image if self.side is None else middle_square(image, self.side)

    def _image(self, file: ImageFile, line: Line) -> Image:
        with errors_at(line.where):
            return self._load(file)

    def _edited(self, line: Line) -> torch.Tensor | None:
        """bool (height, width) of the source, where the row says what may change."""
        boxes = line.row.edited
        if line.mask is not None:
            with errors_at(line.where):
                mask = self._load_mask(line.mask)
            if not mask.any():
                raise InputError(f"{line.where}: mask {line.mask.name} is black: make white what the edit may change")
        elif boxes is None or isinstance(boxes, str):
            return None
        else:
            mask = torch.zeros(upright_size(line.images[-1]), dtype=torch.bool)
            for left, top, right, bottom in boxes:
                mask[top:bottom, left:right] = True
        return mask if self.side is None else middle_square(mask[None].float(), self.side)[0] > 0.5

    def _shuffled(self, task: TaskKind, epoch: int) -> list[int]:
        numbers = list(self._by_task[task])
        random.Random(f"{self.seed}/{task}/{epoch}").shuffle(numbers)
        return numbers

    def _line(self, task: TaskKind, index: int) -> Line:
        n = len(self._by_task.get(task, ()))
        if not n:
            raise InputError(f"{self.name}: no rows of task '{task}': it has {', '.join(self.tasks)}")
        if index < 0:
            raise IndexError(f"index={index} is negative")
        epoch, position = divmod(index, n)
        return self._lines[self._order(task, epoch)[position]]
