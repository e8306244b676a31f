"""The user's own prompts from data sets that the library ``datasets`` reads: tables, shards, folders, the Hub.

Columns become the fields of a row by a mapping; from there on rows are those of JSON lines (``lvrpo.data.rows``).
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.data.jsonl import image_path
from lvrpo.data.presets import PRESETS, without_nulls
from lvrpo.data.rows import Line, Row, RowPrompts, make_line
from lvrpo.data.table_reading import Table, count_rows, datasets_library, is_image, open_table, parse_range, suggest
from lvrpo.errors import InputError
from lvrpo.images import ImageFile, StoredImage, check_image, load_image
from lvrpo.types import Split, TaskKind

IMAGE_FIELDS = ("images", "target", "edited")


class DatasetConfig(Config):
    """One data set of the source "datasets" (docs/guides/your_data.md)."""

    path: str | None = Field(default=None, min_length=1)
    """A Hub id or a local folder; null: train, validation and test name files."""
    name: str | None = None
    """The configuration of a data set on the Hub, where it has several."""
    revision: str | None = None
    """Commit or tag of a data set on the Hub."""
    train: str | None = Field(default=None, min_length=1)
    """With ``path``: a split and a range of its rows, such as train, train[:2000] or train[90%:]. Without: a file, or
    a glob of files (json, jsonl, csv, parquet, arrow, txt, or tar shards of WebDataset), or a folder of images."""
    validation: str | None = Field(default=None, min_length=1)
    """Held-out rows that validation scores; as ``train``."""
    test: str | None = Field(default=None, min_length=1)
    """Held-out rows that are scored before and after; as ``train``."""
    preset: str | None = None
    """A mapping of usual columns by name: an entry of ``lvrpo.data.presets.PRESETS``; null: columns are named as the
    fields of rows."""
    columns: dict[str, str | None] = Field(default={})
    """Field of a row: column that holds it, before what the preset says; parts of a column by dots, such as
    answers.text.0; null: the field is left out."""
    task: TaskKind | None = None
    """Task of rows that name none, in place of the task of the preset."""
    shuffle: bool = False
    """Take ranges of a split from its rows in a random order, which is always the same, so that a folder of one class
    after the other can be divided."""
    streaming: bool = False
    """Read only the rows of the range, which must end, such as train[:20000], without fetching the rest; they are kept
    in the cache of ``datasets``, from which a resumed run reads the same rows in the same order."""
    root: Path | None = None
    """Folder of the images that rows name by path; by default that of the files."""
    check: Literal["headers", "pixels"] = "headers"
    """Validation of every image before the run starts; ``headers`` leaves damaged pixels to be found at first use."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.preset is not None and self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset}: unknown: {suggest(self.preset, PRESETS)}")
        for name in self.columns:
            if name not in Row.model_fields:
                raise ValueError(f"columns.{name}: no field of a row: {suggest(name, Row.model_fields)}")
        if self.path is None and (self.name is not None or self.revision is not None):
            raise ValueError("name and revision are of a data set on the Hub: give its id as path")
        for split in ("train", "validation", "test"):
            expression = getattr(self, split)  # three of the fields
            if self.path is not None and expression is not None:
                _, _, end = parse_range(split, expression)
                if self.streaming and (end is None or "%" in expression):
                    raise ValueError(
                        f"{split}={expression}: with streaming a range must end at a number of rows: write "
                        f"{expression.partition('[')[0]}[:20000]"
                    )
        for name in ("streaming", "shuffle"):
            if getattr(self, name) and self.path is None:  # two of the fields
                raise ValueError(f"{name}=true: is about ranges of a split of a path: leave it out")
        if self.streaming and self.shuffle:
            raise ValueError("shuffle=true: needs all rows, and with streaming=true they are not there: leave one out")
        return self


class DatasetPrompts(RowPrompts):
    """Rows of one or several data sets."""

    def __init__(
        self,
        config: Sequence[DatasetConfig],
        split: Split = "train",
        seed: int = 0,
        side: int | None = None,
        problems: list[str] | None = None,
    ) -> None:
        """Reads and checks every row. Raises InputError, one line that names file and row.

        ``side``: of the square images that the model reads, to which others are brought (None: as they are).
        ``problems``: as for ``RowPrompts``.
        """
        named = [(n, each) for n, each in enumerate(config) if getattr(each, split) is not None]
        if not named:
            raise InputError(f"no {split} rows: set data.datasets {split} to a split or a file")
        sets = [_Records.open(each, split, f"{n}/" if len(config) > 1 else "") for n, each in named]
        super().__init__(", ".join(each.label for each in sets), _Chain(sets), seed, side, problems=problems)


class _Chain(Sequence[Line]):
    """The concatenated lines of several data sets, read at each access."""

    def __init__(self, sets: Sequence[_Records]) -> None:
        self._sets = sets
        self._ends = list(accumulate(len(each) for each in sets))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Line]:
        return (line for each in self._sets for line in each.lines())

    def __getitem__(self, number: Any) -> Any:  # Any: of an integer a Line; slices are not asked for
        which = next(i for i, end in enumerate(self._ends) if number < end)
        return self._sets[which].line(number - (self._ends[which] - len(self._sets[which])))


@dataclass(frozen=True)
class _Records:
    """The records of one split of a data set."""

    config: DatasetConfig
    label: str
    """Name in messages and ids."""
    prefix: str
    """Prefix of ids if there are several sets."""
    table: Table
    files: Sequence[str]
    """Files that hold the whole split; () where they are not known."""
    builder: str
    rows: Sequence[int]
    """The rows of the split that the records are."""
    folder: Path
    """Folder that image files are relative to."""
    others: Path | None = None
    """Another such folder."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """Any: features of ``datasets``."""

    @classmethod
    def open(cls, config: DatasetConfig, split: Split, prefix: str) -> _Records:
        """The records of a split; raises InputError."""
        expression = str(getattr(config, split))  # three of the fields
        where = expression if config.path is None else f"{config.path} ({split}={expression})"
        label = Path(expression).name if config.path is None else f"{Path(config.path).name}[{expression}]"
        table, files, builder, rows = open_table(config, split, expression, where)
        library, local = datasets_library(), config.path is None or Path(config.path).exists()
        if local:
            places = [Path(config.path)] if config.path is not None else [Path(file).parent for file in files]
            folder, others = Path(os.path.commonpath([os.path.abspath(place) for place in places])), config.root
        else:
            hub = importlib.import_module("huggingface_hub")
            folder, others = Path(hub.constants.HF_HUB_CACHE), config.root or Path(library.config.HF_DATASETS_CACHE)
        opened = cls(
            *(config, label, prefix, table.with_format("arrow"), files, builder, rows, folder, others),
            features=dict(table.features),
        )
        opened.require_columns(where)
        return opened

    def __len__(self) -> int:
        return self.table.num_rows

    def require_columns(self, where: str) -> None:
        """Raises InputError for a mapped column that does not exist, and for an empty set."""
        if not len(self):
            raise InputError(f"{where}: no rows: give a split or a file that has some")
        made = ("target",) if self.config.preset is not None else ()
        for name, column in self.config.columns.items():
            if column is not None and column.partition(".")[0] not in (*self.features, *made):
                raise InputError(f"{where}: columns.{name}={column}: no such column: {suggest(column, self.features)}")

    def lines(self) -> Iterator[Line]:
        number = 0
        for batch in self.table.iter(batch_size=32):
            for record in batch.to_pylist():
                yield self._line(number, record)
                number += 1

    def line(self, number: int) -> Line:
        return self._line(number, self.table[number].to_pylist()[0])

    def _line(self, number: int, stored: Mapping[str, Any]) -> Line:
        where = self._where(number, stored)
        key = f"{self.prefix}{self.label}:{number + 1}"
        record = {name: plain(value, self.features[name]) for name, value in stored.items()}
        try:
            fields = mapped(record, self.config)
            images: dict[str, ImageFile] = {}
            for name in IMAGE_FIELDS:
                if name in fields:
                    # the prefix: two sets may have one label, or show different columns of one file
                    fields[name] = _named_images(fields[name], f"{where}: {self.prefix}{name}", images)
            line = make_line(fields, where, key, self.label, lambda name: self._image(name, images, where))
        except (ValueError, InputError) as error:
            message = " ".join(str(error).split()).removeprefix(f"{where}: ")
            raise InputError(f"{self._where(number, stored, exact=True)}: {message}{self._hint(message)}") from None
        return line if line.row.id is None or not self.prefix else _renamed(line, self.prefix)

    def _hint(self, message: str) -> str:
        """Lists the existing columns after a missing field."""
        if not message.endswith("is missing: add it"):
            return ""
        return f" (columns: {{FIELD: COLUMN}}, or a preset; its columns are {', '.join(self.features)})"

    def _image(self, name: str, images: Mapping[str, ImageFile], where: str) -> ImageFile:
        decode, stored = self.config.check == "pixels", images.get(name)
        if stored is None:
            return image_path(self.folder, name, where, decode, self.others)
        load_image(stored) if decode else check_image(stored)
        return stored

    # --- where a record lies ---

    def _where(self, number: int, stored: Mapping[str, Any], exact: bool = False) -> str:
        """File and row; of several files the data set and the row, unless ``exact``, which may read them all."""
        if "__key__" in stored and "__url__" in stored:
            return f"{stored['__url__']}: sample {stored['__key__']}"
        row = self.rows[number]
        if len(self.files) == 1 or (exact and self.files and self.builder != "imagefolder"):
            which = next((i for i, end in enumerate(self._ends) if row < end), 0) if len(self.files) > 1 else 0
            return f"{self.files[which]}: row {row - (self._ends[which - 1] if which else 0) + 1}"
        return f"{self.label}: row {row + 1}"

    @cached_property
    def _ends(self) -> list[int]:
        """Cumulative row counts of the files."""
        return list(accumulate(count_rows(datasets_library(), self.builder, file) for file in self.files))


def _renamed(line: Line, prefix: str) -> Line:
    """The row with the number of its data set before its id."""
    return Line(*(line.row, f"{prefix}{line.id}", line.where, line.source, line.images, line.targets), mask=line.mask)


# --- from a record to a row ---


def plain(value: Any, feature: Any) -> Any:
    """A value of a column as JSON has it: names of classes for their numbers. Any: of ``datasets``."""
    kind = type(feature).__name__
    if value is None:
        return None
    if kind == "Value" and feature.dtype in ("float16", "float32"):
        return float(str(np.dtype(feature.dtype).type(value)))  # .1 and not .10000000149011612
    if kind == "Json":
        return json.loads(value) if isinstance(value, str) else value
    if kind == "ClassLabel":
        return feature.int2str(value) if value >= 0 else None
    if kind == "List" and isinstance(value, list):
        return [plain(each, feature.feature) for each in value]
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: plain(value[name], inner) for name, inner in feature.items() if name in value}
    return value


def mapped(record: Mapping[str, Any], config: DatasetConfig) -> dict[str, Any]:
    """The fields of a row; raises ValueError. Any: values of columns."""
    if config.preset is None:
        fields = {name: record[name] for name in Row.model_fields if name in record}
    else:
        fields = PRESETS[config.preset](record)
    if config.task is not None:
        fields = {**fields, "task": config.task} if config.preset is not None else {"task": config.task, **fields}
    available = {**fields, **record}
    for name, column in config.columns.items():
        fields[name] = None if column is None else _part(available, column)
    if config.task is not None and fields.get("task") is None:
        fields["task"] = config.task
    images = {name: value for name, value in fields.items() if name in IMAGE_FIELDS and value is not None}
    fields = without_nulls({name: value for name, value in fields.items() if name not in IMAGE_FIELDS}) | images
    if "images" in fields and not isinstance(fields["images"], list):
        fields["images"] = [fields["images"]]
    for name in ("id", "prompt", "answer", "category"):
        if isinstance(fields.get(name), bool | int | float):
            fields[name] = str(fields[name])
    return fields


def _part(record: Mapping[str, Any], column: str) -> Any:
    """A column, or a part of it by dots; None where a part is absent."""
    if column in record:
        return record[column]
    found: Any = record
    for key in column.split("."):
        if isinstance(found, Mapping):
            found = found.get(key)
        elif isinstance(found, list) and key.isdecimal():
            found = found[int(key)] if int(key) < len(found) else None
        else:
            return None
    return found


def _named_images(value: Any, name: str, images: dict[str, ImageFile]) -> Any:
    """The value of a field with names in place of images, which are added to ``images``. Any: of a column."""
    if isinstance(value, list):
        return [_named_images(each, f"{name}.{i}", images) for i, each in enumerate(value)]
    if is_image(value):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    if isinstance(value, bytes):
        images[name] = StoredImage(name, value)
        return name
    return value
