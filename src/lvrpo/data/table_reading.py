"""Reads tables, shards, folders and data sets of the Hub through the library ``datasets``, as rows at random access."""

from __future__ import annotations

import glob
import hashlib
import importlib
import json
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lvrpo.errors import InputError, LvrpoError, nearest

if TYPE_CHECKING:
    from lvrpo.data.tables import DatasetConfig

Table = Any
"""A ``datasets.Dataset`` in the format "arrow". Any: the library is optional and has no stubs."""

BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
    ".tar": "webdataset",
}
"""The builder of ``datasets`` that reads a file, by the end of its name."""
ALLOWED = (*BUILDERS.values(), "imagefolder")
"""Builders that are used; others read formats that may hold code (pickles), or no images and texts."""
_EXPRESSION = re.compile(r"([\w.\-]+)(?:\[(\d+%?)?:(\d+%?)?\])?")
NUMBER = "lvrpo_row"
"""A column of rows that were streamed: their numbers in the split."""
TAR_END = bytes(512)
"""The last block of a tar archive that is whole."""


def suggest(name: str, known: Sequence[str] | Mapping[str, object]) -> str:
    near = nearest(name, known)
    return f"{f'did you mean {near}? ' if near else ''}there are {', '.join(known)}"


def parse_range(split: str, expression: str) -> tuple[str, str | None, str | None]:
    """The name of a split, and where its range begins and ends; raises ValueError."""
    found = _EXPRESSION.fullmatch(expression)
    if found is None:
        raise ValueError(
            f"{split}={expression}: must be a split with a range, such as train, train[:2000], train[90%:]"
        )
    return found[1], found[2], found[3]


def datasets_library() -> ModuleType:
    """The library ``datasets``; raises InputError with the command that installs it."""
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise InputError(
            "data.source=datasets: needs the package datasets: install it with pip install 'lvrpo[data]'"
        ) from None
    library.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else reading a local file asks the network
    return library


def is_image(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"bytes", "path"}


def open_table(
    config: DatasetConfig, split: str, expression: str, where: str
) -> tuple[Table, list[str], str, Sequence[int]]:
    """The rows of a split or of files, the files that hold it, their builder, and the numbers of the rows."""
    library = datasets_library()
    if config.path is None:
        files, arguments, name = _local_files(split, expression)
        begin = end = None
    else:
        _require_path(config.path, split)
        files, arguments = [], {"path": config.path, "name": config.name, "revision": config.revision}
        name, begin, end = parse_range(split, expression)
    with reading(where, quiet=config.path is None or Path(config.path).exists()):
        builder = library.load_dataset_builder(**arguments)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in ALLOWED:
            raise InputError(f"{where}: is read by {kind}: only {', '.join(dict.fromkeys(ALLOWED))} are: convert it")
        known = builder.config.data_files or {}
        if known and name not in known:
            raise InputError(f"{where}: no split {name!r}: {suggest(name, [str(each) for each in known])}")
        files = files or [str(file) for file in known.get(name, ())]
        if kind == "webdataset":
            _require_whole_archives(files)
        if config.streaming:
            table = _streamed(arguments, name, range(int(begin or 0), int(end or 0)), files, kind)
            return table.remove_columns(NUMBER), files, kind, table[NUMBER]
        try:
            table = library.load_dataset(**arguments, split=name)
        except Exception:  # of readers of many formats, which do not name the file
            _require_readable(library, kind, files)
            raise
    rows = list(range(len(table)))
    if kind == "text":
        rows = [row for row, line in zip(rows, table["text"], strict=True) if line.strip()]
    if config.shuffle:
        random.Random(0).shuffle(rows)
    rows = rows[_row(begin, len(rows), 0) : _row(end, len(rows), len(rows))]
    return table.select(rows), files, kind, rows


def _require_readable(library: ModuleType, kind: str, files: Sequence[str]) -> None:
    """Raises InputError for the first of several local files that cannot be read alone."""
    for file in files if len(files) > 1 and kind != "imagefolder" else ():
        if os.path.isfile(file):
            with reading(file, quiet=True):
                count_rows(library, kind, file)


def count_rows(library: ModuleType, kind: str, file: str) -> int:
    """The number of rows of a file; reads it to its end."""
    return sum(1 for _ in _stream(library, path=kind, data_files=[file], split="train"))


def _stream(library: ModuleType, **arguments: Any) -> Any:
    """A stream of rows whose images are not decoded, which is left to ``lvrpo.images`` and its safe formats."""
    stream = library.load_dataset(**arguments, streaming=True)
    if stream.features is None:
        stream = stream._resolve_features()
    return stream.decode(False)


def _row(text: str | None, rows: int, default: int) -> int:
    """The row that an end of a range names."""
    if text is None:
        return default
    return round(int(text[:-1]) / 100 * rows) if text.endswith("%") else int(text)


def _require_path(path: str, split: str) -> None:
    """Raises InputError for a path that is a file, or that looks like a folder and is none."""
    if os.path.isfile(path):
        raise InputError(f"data.datasets path={path}: is a file: leave path out and write {split}: {path}")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InputError(f"data.datasets path={path}: is no folder: give a folder, or the id of a Hub data set")
    if not os.path.isdir(path) and (os.path.isabs(path) or path.startswith((".", "~")) or path.count("/") > 1):
        raise InputError(f"data.datasets path={path}: no such folder: correct it, or give the id of a Hub data set")


def _local_files(split: str, expression: str) -> tuple[list[str], dict[str, Any], str]:
    """The files of an expression, what ``load_dataset`` is called with, and the split that they then are."""
    if os.path.isdir(expression):
        return [], {"path": "imagefolder", "data_dir": expression}, "train"
    files = sorted(glob.glob(expression, recursive=True)) if glob.has_magic(expression) else [expression]
    missing = next((file for file in files if not os.path.isfile(file)), None)
    if not files or missing is not None:
        raise InputError(f"data.datasets {split}={expression}: no such file: correct the path")
    empty = next((file for file in files if not os.path.getsize(file)), None)
    if empty is not None:
        raise InputError(f"{empty}: is empty: no rows: give a file that has some")
    kinds = {BUILDERS.get(_suffix(file)) for file in files}
    if len(kinds) > 1 or None in kinds:
        raise InputError(f"data.datasets {split}={expression}: files must all end in one of {', '.join(BUILDERS)}")
    return files, {"path": kinds.pop(), "data_files": {"train": files}}, "train"


def _suffix(file: str) -> str:
    """The end of a file's name, without that of its compression."""
    name = Path(file)
    return name.with_suffix("").suffix if name.suffix in (".gz", ".bz2", ".xz", ".zst") else name.suffix


def _require_whole_archives(files: Sequence[str]) -> None:
    """Raises InputError for a local tar archive that was cut off: its reader takes the end of the file as its end."""
    for file in files:
        if os.path.isfile(file) and file.endswith(".tar"):
            with open(file, "rb") as archive:
                archive.seek(max(os.path.getsize(file) - len(TAR_END), 0))
                if archive.read() != TAR_END:
                    raise InputError(f"{file}: the archive is cut off (it has no end mark): copy or write it again")


def _streamed(arguments: Mapping[str, Any], split: str, taken: range, files: Sequence[str], kind: str) -> Table:
    """The rows of a range and their ``NUMBER``, read from a stream into the cache of ``datasets``; read from there once
    they are there."""
    library = datasets_library()
    stream = _stream(library, **arguments, split=split)
    marks = [(file, os.path.getsize(file), os.path.getmtime(file)) for file in files if os.path.isfile(file)]
    key = json.dumps([{**arguments}, split, taken.start, taken.stop, marks, NUMBER], sort_keys=True, default=str)

    def rows() -> Iterator[dict[str, Any]]:
        numbered = ((n, record) for n, record in enumerate(stream) if kind != "text" or record["text"].strip())
        for number, record in islice(numbered, taken.start, taken.stop):
            yield {**{name: _fetched(value) for name, value in record.items()}, NUMBER: number}

    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    features = library.Features({**stream.features, NUMBER: library.Value("int64")})
    return library.Dataset.from_generator(rows, features=features, fingerprint=fingerprint)


def _fetched(value: Any) -> Any:
    """A value whose images are held by their bytes, wherever their files lie."""
    if isinstance(value, list):
        return [_fetched(each) for each in value]
    if is_image(value) and value["bytes"] is None and value["path"] is not None:
        with importlib.import_module("fsspec").open(value["path"], "rb") as file:
            return {"bytes": file.read(), "path": None}
    return value


@contextmanager
def reading(where: str, quiet: bool) -> Iterator[None]:
    """Turns whatever reading raises into one line; ``quiet``: without bars of progress."""
    bars = importlib.import_module("datasets.utils")
    hide = quiet and not bars.are_progress_bars_disabled()
    level = bars.logging.get_verbosity()
    bars.logging.set_verbosity(bars.logging.CRITICAL)  # what it has to say is raised too
    hub = logging.getLogger("huggingface_hub")  # warns of each attempt to connect
    hub_level = hub.level
    hub.setLevel(logging.CRITICAL)
    if hide:
        bars.disable_progress_bars()
    try:
        yield
    except LvrpoError:
        raise
    except Exception as error:  # of readers of many formats, of the network and of the disk
        cause: BaseException = error
        while cause.__cause__ is not None and str(cause.__cause__):
            cause = cause.__cause__
        network = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
        offline = network or "Hub" in type(error).__name__ or "Offline" in type(error).__name__
        empty = type(cause).__name__ in ("EmptyDatasetError", "DataFilesNotFoundError")
        fix = "give a folder that holds data files" if empty else "fix the file"
        elsewhere = "no folder here has this name: check it, or the Hub id, the network and your login (hf auth login)"
        remedy = elsewhere if offline and not quiet else fix
        message = " ".join(str(cause).split())[:200] or type(cause).__name__
        raise InputError(f"{where}: cannot be read ({type(cause).__name__}: {message}): {remedy}") from error
    finally:
        bars.logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if hide:
            bars.enable_progress_bars()
