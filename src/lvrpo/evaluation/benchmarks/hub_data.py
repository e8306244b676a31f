"""Prompts of published benchmarks from data sets of the Hugging Face Hub, by the library ``datasets``."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvrpo.data.table_reading import datasets_library, open_table, reading
from lvrpo.data.tables import DatasetConfig
from lvrpo.errors import InputError

KEYWORD = "hub"
"""In place of a folder: every benchmark from its own data set."""
Rows = Sequence[Mapping[str, Any]]
"""Any: what the columns hold."""


@dataclass(frozen=True)
class HubData:
    """A data set with the rows of a benchmark, of which its official files can be made."""

    id: str
    tables: tuple[str, ...]
    """Its configurations, each of which has one split; (): it has one configuration."""
    columns: tuple[str, ...]
    """What each row must hold."""
    files: Callable[[Mapping[str, Rows]], Mapping[str, str]]
    """The official files by name, from the rows of each configuration ("" where there is one)."""


def hub_id(data: Path, own: HubData | None) -> str | None:
    """The id that ``data`` stands for: the benchmark's own, or ORG/NAME; None for a folder, which may be missing."""
    if data.exists():
        return None
    if str(data) == KEYWORD:
        return None if own is None else own.id
    return str(data) if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(data)) and not data.parent.is_dir() else None


def holds_tables(folder: Path) -> bool:
    """Whether a folder is a copy of a data set of the Hub."""
    return folder.is_dir() and any(folder.rglob("*.parquet"))


@contextmanager
def official_files(data: HubData, path: str, name: str) -> Iterator[Path]:
    """A folder with the official files of a benchmark, made of a data set (an id, or a folder in its layout).

    Raises InputError for a data set of another form.
    """
    rows = {table: read_table(path, table or None, data.columns, name) for table in data.tables or ("",)}
    with tempfile.TemporaryDirectory(prefix="lvrpo-benchmark-") as made:
        for file, text in data.files(rows).items():
            (Path(made) / file).write_text(text, encoding="utf-8")
        yield Path(made)


def read_table(path: str, table: str | None, columns: Sequence[str], name: str) -> list[dict[str, Any]]:
    """The rows of the only split of a configuration; raises InputError. Any: what the columns hold."""
    library = datasets_library()
    where = f"benchmark {name}: {path}" + (f" ({table})" if table else "")
    with reading(where, quiet=Path(path).exists()):
        builder = library.load_dataset_builder(path=path, name=table)
        splits = [str(split) for split in builder.config.data_files or {}]
    if len(splits) != 1:
        raise InputError(
            f"{where}: has the splits {', '.join(splits)}: a data set with one split is read: name another"
        )
    config = DatasetConfig(path=path, name=table, test=splits[0])
    found = open_table(config, "test", splits[0], where)[0]
    lost = next((column for column in columns if column not in found.column_names), None)
    if lost is not None:
        raise InputError(f"{where}: has no column {lost!r}: name the benchmark's own data set (--data {KEYWORD})")
    return found.select_columns(list(columns)).to_list()
