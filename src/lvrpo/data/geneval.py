"""The prompts of GenEval (arXiv:2310.11513): its metadata rows, and the questions that follow from them exactly.

A row names the objects that an image must show, each with the least number, a color, a position beside an earlier
object, and objects that it must not show as often. flow_grpo's training rows have the same format.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lvrpo.errors import InputError
from lvrpo.reading import parse_json, read_lines
from lvrpo.types import Fact, Prompt

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
"""The colors of GenEval, among which the color of an object is chosen."""
NUMBERS = tuple(str(n) for n in range(10))
"""The numbers of objects to choose from."""
Relation = Literal["left of", "right of", "above", "below"]
METADATA = "evaluation_metadata.jsonl"
"""The file of the official prompts (github.com/djghosh13/geneval, folder prompts, MIT license)."""
OFFICIAL = "94bc1c23d27e"
"""``fingerprint`` of its 553 rows."""
_RELATION_WORDS: Mapping[Relation, str] = {
    "left of": "to the left of",
    "right of": "to the right of",
    "above": "above",
    "below": "below",
}
_PLURAL_ONLY = frozenset(("skis", "scissors"))
_PLURALS = {"person": "people", "sheep": "sheep", "knife": "knives", "computer mouse": "computer mice"}


class Clause(BaseModel):
    """An object that an image must show, or must not show as often."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(alias="class", min_length=1)
    count: int = Field(ge=1, le=99)
    """The minimum number; for an excluded object, the number that must not be reached."""
    color: Literal["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"] | None = (
        None
    )
    position: tuple[Relation, Annotated[int, Field(ge=0)]] | None = Field(default=None, strict=False)
    """A relation to the object of an earlier clause, by its index."""


class Metadata(BaseModel):
    """One row: all of ``include`` must hold and none of ``exclude``."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    tag: str = Field(min_length=1)
    include: tuple[Clause, ...] = Field(min_length=1, strict=False)
    exclude: tuple[Clause, ...] = Field(default=(), strict=False)
    prompt: str = Field(min_length=1)


@dataclass(frozen=True)
class GenEvalRow:
    """One prompt of a file."""

    index: int
    """The line, from 0: the name of its folder in the official layout."""
    metadata: Metadata
    raw: Mapping[str, Any]
    """The row as it stands in the file. Any: JSON values."""
    prompt: Prompt
    """The prompt, with its questions as facts."""


def read_metadata(path: Path) -> list[GenEvalRow]:
    """The rows of a file in its order; raises InputError, with file and line, for a row of another format."""
    rows = []
    for number, line in read_lines(path, f"give a file such as {METADATA} of GenEval"):
        where = f"{path}:{number}"
        raw = parse_json(line, where, "one object per line")
        metadata = _metadata(raw, where)
        prompt = Prompt(
            f"geneval/{number - 1:05d}",
            "generate",
            (metadata.prompt,),
            ("image",),
            facts=facts_of(metadata),
            category=metadata.tag,
            source=path.name,
        )
        rows.append(GenEvalRow(number - 1, metadata, raw, prompt))
    return rows


def _metadata(raw: Any, where: str) -> Metadata:
    """Any: JSON."""
    try:
        metadata = TypeAdapter(Metadata).validate_python(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the row"
        raise InputError(
            f"{where}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}: is no row of GenEval's metadata (tag, "
            "include, exclude, prompt): give its file"
        ) from None
    for place, clause in enumerate(metadata.include):
        if clause.position is not None and clause.position[1] >= place:
            raise InputError(
                f"{where}: include.{place}.position names object {clause.position[1]}: must be an earlier one"
            )
    return metadata


def fingerprint(rows: Sequence[GenEvalRow]) -> str:
    """12 hexadecimal digits that identify the rows and their order, whatever the spacing of the file."""
    text = "\n".join(json.dumps(row.raw, sort_keys=True) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def interleave_categories(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts reordered so that categories take turns: the first n are spread over all of them."""
    turns: Counter[str] = Counter()
    keys = []
    for place, prompt in enumerate(prompts):
        keys.append((turns[prompt.category], place))
        turns[prompt.category] += 1
    return [prompts[place] for _, place in sorted(keys)]


# --- questions ---


def facts_of(metadata: Metadata) -> tuple[Fact, ...]:
    """The questions about an image whose right answers hold exactly when the metadata does.

    Existence and position are yes-no questions, a color is one of ``COLORS``, a number one of ``NUMBERS``. Whether an
    object is there is not asked where its number or color is.
    """
    names = Counter(clause.name for clause in metadata.include)
    facts: list[Fact] = []
    for clause in metadata.include:
        limits = [other.count for other in metadata.exclude if other.name == clause.name]
        exact = (clause.count + 1) in limits
        if exact:
            facts.append(
                Fact("count", f"How many {plural(clause.name)} are in the picture?", str(clause.count), {}, NUMBERS)
                if clause.count < len(NUMBERS)
                else Fact("count", f"Are there exactly {clause.count} {plural(clause.name)} in the picture?", "yes")
            )
        elif clause.count > 1:
            facts.append(
                Fact("count", f"Are there at least {clause.count} {plural(clause.name)} in the picture?", "yes")
            )
        if clause.color is None:
            facts += [] if exact or clause.count > 1 else [Fact("exists", _exists(clause.name), "yes")]
        elif names[clause.name] == 1 and clause.count == 1:
            be = "are" if clause.name in _PLURAL_ONLY else "is"
            facts.append(Fact("color", f"What color {be} the {clause.name} in the picture?", clause.color, {}, COLORS))
        else:
            facts.append(Fact("color", _colored(clause), "yes"))
        if clause.position is not None:
            relation, target = clause.position
            be = "Are" if clause.name in _PLURAL_ONLY else "Is"
            other = metadata.include[target].name
            words = f"{be} the {clause.name} {_RELATION_WORDS[relation]} the {other} in the picture?"
            facts.append(Fact("position", words, "yes"))
    for clause in metadata.exclude:
        if not any(c.name == clause.name and c.count + 1 == clause.count for c in metadata.include):
            words = (
                _exists(clause.name)
                if clause.count == 1
                else f"Are there {clause.count} or more {plural(clause.name)} in the picture?"
            )
            facts.append(Fact("count", words, "no"))
    return tuple(facts)


def plural(name: str) -> str:
    """The plural of the name of an object."""
    if name in _PLURALS or name in _PLURAL_ONLY:
        return _PLURALS.get(name, name)
    return f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"


def _exists(name: str) -> str:
    return f"Are there {name} in the picture?" if name in _PLURAL_ONLY else f"Is there {_a(name)} in the picture?"


def _colored(clause: Clause) -> str:
    if clause.count > 1:
        return f"Are there at least {clause.count} {clause.color} {plural(clause.name)} in the picture?"
    words = f"{clause.color} {clause.name}"
    return (
        f"Are there {words} in the picture?" if clause.name in _PLURAL_ONLY else f"Is there {_a(words)} in the picture?"
    )


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
