"""Pairs of outputs of which people preferred one: Pick-a-Pic's columns (parquet or JSON lines), or plain JSON lines."""

from __future__ import annotations

import base64
import binascii
import codecs
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lvrpo.data.images import decode_image, load_image, middle_square
from lvrpo.data.jsonl import picture_path
from lvrpo.errors import InputError
from lvrpo.reading import MIB, open_regular, parse_json
from lvrpo.types import Image, Part, Prompt, Task

PICK_A_PIC = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
"""The columns that are read; ``has_label``, where there is one, marks rows that nobody judged."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
"""A text that ends so is the path of a picture."""
ROWS_AT_ONCE = 64
MOST_LINE = 256 * MIB
"""Bytes of a row of JSON lines."""
REMEDY = "give pairs as .parquet or .jsonl"
NAMED = 3
"""Broken rows that an error names."""

Ties = Literal["half", "drop"]
"""A tie is half a win for each, or left out."""


class PlainRow(BaseModel):
    """One line of a plain file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str = Field(min_length=1)
    better: str = Field(min_length=1)
    """A text, or the path of a picture in the folder of the file."""
    worse: str = Field(min_length=1)
    images: list[str] = Field(default_factory=list)
    """Pictures that belong to the prompt: what is asked about, or edited."""
    tie: bool = False
    """Whether neither is better."""


@dataclass(frozen=True)
class Pair:
    """Two outputs of one prompt."""

    prompt: Prompt
    outputs: tuple[Part, Part]
    share: float
    """What the first won: 1, 0, or .5 for a tie."""
    where: str

    @property
    def key(self) -> str:
        """Equal for pairs of one prompt: a hash of its words, without case and spacing, and of its pictures."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self.prompt.parts:
            words = " ".join(part.casefold().split()).encode() if isinstance(part, str) else part.numpy().tobytes()
            digest.update(words + b"\0")
        return digest.hexdigest()


@dataclass
class PairCounts:
    """What became of the rows."""

    total: int = 0
    """Rows in all files, known from the start."""
    rows: int = 0
    """Read so far."""
    pairs: int = 0
    ties: int = 0
    """Among the pairs, or dropped, as asked for."""
    unlabelled: int = 0
    """Rows that nobody judged."""
    broken: list[str] = field(default_factory=list)
    """Rows that could not be used, each with where and why."""


def read_pairs(
    path: Path, counts: PairCounts, ties: Ties = "half", max_broken: float = 0.05, side: int | None = None
) -> Iterator[Pair]:
    """The pairs of a file, or of all .parquet and .jsonl files of a folder, in the order of their names.

    ``counts`` is filled while they are read. A row that is damaged (a picture that is missing or broken, labels that
    make no sense) is left out and counted; ``side``: pictures are cropped to their middle square and resized to it.
    Raises InputError, one line: no such data, a column or field that is missing, a file that is not what it says, and
    more than ``max_broken`` of all rows damaged, naming some of them.
    """
    files = _files(Path(path))
    counts.total = sum(_count(file) for file in files)
    if not counts.total:
        raise InputError(f"{path}: no rows: give pairs of outputs")
    for file in files:
        for where, row in _rows(file):
            counts.rows += 1
            try:
                pair = _pick_a_pic(row, where, file, side) if "caption" in row else _plain(row, where, file, side)
            except DamagedRowError as error:
                _leave_out(counts, str(error), max_broken)
                continue
            if pair is None:
                counts.unlabelled += 1
                continue
            counts.ties += pair.share == 0.5
            if pair.share == 0.5 and ties == "drop":
                continue
            counts.pairs += 1
            yield pair


def _leave_out(counts: PairCounts, reason: str, max_broken: float) -> None:
    """Counts a row that cannot be used; raises InputError once they are more than a share of all rows."""
    counts.broken.append(reason)
    if len(counts.broken) > max_broken * counts.total:
        named = "; ".join(counts.broken[:NAMED])
        raise InputError(
            f"{len(counts.broken)} of {counts.total} rows cannot be used, more than max_broken={max_broken:g} "
            f"allows: {named}{'; ...' if len(counts.broken) > NAMED else ''}"
        )


class DamagedRowError(Exception):
    """One row cannot be used; the message says where and why."""


# --- files ---


def _files(path: Path) -> list[Path]:
    if path.suffix in (".parquet", ".jsonl") and not path.is_dir():
        with open_regular(path, f"{REMEDY}, or a folder of them", None):
            return [path]
    if path.is_file():
        raise InputError(f"{path}: give a .parquet or .jsonl file, or a folder of them")
    if not path.is_dir():
        raise InputError(f"{path}: no such file or folder: give pairs as .parquet or .jsonl")
    found = sorted(file for file in path.rglob("*") if file.suffix in (".parquet", ".jsonl") and file.is_file())
    if not found:
        raise InputError(f"{path}: holds no .parquet or .jsonl file: give a folder of pairs")
    return found


def _count(file: Path) -> int:
    if file.suffix == ".parquet":
        with _parquet(file) as opened:
            return opened.metadata.num_rows
    with open_regular(file, REMEDY, None) as lines:
        return sum(bool(line.strip()) for line in _lines(lines, file))


def _lines(file: BinaryIO, name: Path) -> Iterator[bytes]:
    """The lines of a file of any size; raises InputError for one that is longer than any row."""
    while line := file.readline(MOST_LINE + 1):
        if len(line) > MOST_LINE:
            raise InputError(f"{name}: has a line of more than {MOST_LINE / MIB:.0f} MiB: one object per line")
        yield line


def _rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row). Any: what a table or JSON holds."""
    if file.suffix == ".jsonl":
        yield from _json_rows(file)
        return
    with _parquet(file) as opened:
        names = opened.schema_arrow.names
        missing = [name for name in PICK_A_PIC if name not in names]
        if missing:
            raise InputError(f"{file}: no column {missing[0]!r}: it needs {', '.join(PICK_A_PIC)}")
        columns = [name for name in (*PICK_A_PIC, "has_label") if name in names]
        number = 0
        for batch in opened.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns):
            for row in batch.to_pylist():
                yield f"{file}: row {number}", row
                number += 1


def _parquet(file: Path) -> Any:  # Any: pyarrow has no types of its own
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file}: parquet needs pyarrow: pip install 'lvrpo[parquet]'") from None
    try:
        return parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = " ".join(str(error).split())[:80]
        raise InputError(f"{file}: truncated or no parquet ({reason}): fetch it again") from None


def _json_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open_regular(file, REMEDY, None) as lines:
        for number, line in enumerate(_lines(lines, file), start=1):
            where = f"{file}:{number}"
            if not line.strip():
                continue
            row = parse_json(line.removeprefix(codecs.BOM_UTF8), where, "one object per line")
            if not isinstance(row, dict):
                raise InputError(f"{where}: holds {type(row).__name__}, not an object: one object per line")
            yield where, row


# --- rows ---


def _pick_a_pic(row: Mapping[str, Any], where: str, file: Path, side: int | None) -> Pair | None:
    """The pair of a row; None where nobody judged it."""
    missing = [name for name in PICK_A_PIC if name not in row]
    if missing:
        raise InputError(f"{where}: no field {missing[0]!r}: it needs {', '.join(PICK_A_PIC)}")
    won = row["label_0"], row["label_1"]
    if row.get("has_label") is False or None in won:
        return None
    if won not in ((1, 0), (0, 1), (0.5, 0.5)):
        raise DamagedRowError(f"{where}: labels {won[0]} and {won[1]}, not 1 and 0, 0 and 1, or .5 and .5")
    caption = row["caption"]
    if not isinstance(caption, str) or not caption.strip():
        raise DamagedRowError(f"{where}: the caption is empty")
    pictures = [_stored(row[name], f"{where}, {name}", file, side) for name in ("jpg_0", "jpg_1")]
    prompt = Prompt(where, "generate", (caption,), ("image",))
    return Pair(prompt, (pictures[0], pictures[1]), float(won[0]), where)


def _stored(value: Any, where: str, file: Path, side: int | None) -> Image:  # Any: what a table or JSON holds
    """A picture from its bytes; in JSON lines from a path, or from bytes in base 64."""
    if isinstance(value, str) and value.endswith(PICTURES):
        return _picture(value, where, file, side)
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise DamagedRowError(f"{where}: neither the path of a picture nor its bytes in base 64") from None
    if not isinstance(value, bytes) or not value:
        raise DamagedRowError(f"{where}: the picture is missing")
    try:
        return _sized(decode_image(value, where), side)
    except InputError as error:
        raise DamagedRowError(str(error)) from None


def _picture(name: str, where: str, file: Path, side: int | None) -> Image:
    try:
        return _sized(load_image(picture_path(file.parent, name, where)), side)
    except InputError as error:
        raise DamagedRowError(str(error)) from None


def _sized(image: Image, side: int | None) -> Image:
    return image if side is None else middle_square(image, side)


def _plain(row: Mapping[str, Any], where: str, file: Path, side: int | None) -> Pair:
    try:
        found = PlainRow.model_validate(row)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = ".".join(map(str, problem["loc"]))
        fields = ", ".join(PlainRow.model_fields)
        raise InputError(f"{where}: field {name!r}: {problem['msg'].lower()}: fields are {fields}") from None
    drawn = [text.endswith(PICTURES) for text in (found.better, found.worse)]
    if drawn[0] != drawn[1]:
        raise DamagedRowError(f"{where}: one of better and worse is a picture, the other a text")
    shown = [_picture(name, where, file, side) for name in found.images]
    parts = (*shown, found.prompt)
    share = 0.5 if found.tie else 1.0
    if drawn[0]:
        outputs = _picture(found.better, where, file, side), _picture(found.worse, where, file, side)
        task: Task = "edit" if shown else "generate"
        return Pair(Prompt(where, task, parts, ("image",)), outputs, share, where)
    if not (found.prompt.strip() and found.better.strip() and found.worse.strip()):
        raise DamagedRowError(f"{where}: a text is empty")
    task = "understand" if shown else "reason"
    return Pair(Prompt(where, task, parts, ("text",)), (found.better, found.worse), share, where)
