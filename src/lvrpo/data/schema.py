"""The user's own rows: one JSON object per line."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lvrpo.errors import InputError
from lvrpo.patterns import compile_pattern
from lvrpo.types import OutputKind, Task

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
    """One prompt, as it stands in a file."""

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
