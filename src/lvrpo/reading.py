"""Bounded reads of user-supplied files: regular files of limited size only; every error is one line.

Pipes (reading blocks), devices (endless) and folders are refused before they are read. Also JSON validation.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lvrpo.errors import InputError, describe_error

MIB = 2**20
TEXT_BYTES = 1024 * MIB
"""Size limit of a text file."""
JSON_BYTES = 256 * MIB
"""Size limit of a JSON file of a model or a run."""
GZIP = b"\x1f\x8b"
"""First bytes of a gzip file."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ERRORS = {
    errno.ELOOP: "is a link that leads to itself: name the file that it should lead to",
    errno.ENAMETOOLONG: "is a name that no file can have, it is too long: name a file",
    errno.ENOTDIR: "lies below a file, not a folder: correct the path",
    errno.EACCES: "cannot be read (permission denied): ask for the right to read it",
}


@contextmanager
def open_regular(path: Path, remedy: str, max_bytes: int | None = TEXT_BYTES) -> Iterator[BufferedReader]:
    """Opens a regular file of at most ``max_bytes`` for reading; raises InputError for anything else.

    ``remedy``: end of the error message, such as "give a text file".
    """
    try:
        require_regular(os.stat(path), path, remedy, max_bytes)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise InputError(read_error_message(path, error, remedy)) from None
    with os.fdopen(handle, "rb") as file:
        require_regular(os.fstat(handle), path, remedy, max_bytes)  # the file may have been replaced
        yield file


def path_exists(path: Path) -> bool:
    """Whether a path exists; broken and self-referencing links count, so that reading them raises an error."""
    return os.path.lexists(path)


def unused_path(wanted: Path, suffix: str = "") -> Path:
    """``wanted`` with the suffix, or the first of wanted-2, wanted-3 ... that does not exist."""
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (wanted.with_name(f"{wanted.name}{number}{suffix}") for number in numbers)
    return next(path for path in paths if not path_exists(path))


def require_regular(found: os.stat_result, path: Path, remedy: str, max_bytes: int | None = None) -> None:
    """Raises InputError unless a path is a regular file of at most ``max_bytes``."""
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{path}: is {_KINDS.get(kind, 'something else')}, not a regular file: {remedy}")
    if max_bytes is not None and found.st_size > max_bytes:
        raise InputError(
            f"{path}: has {found.st_size / MIB:.0f} MiB, more than {max_bytes / MIB:.0f} are read: {remedy}"
        )


def read_error_message(path: Path, error: Exception, remedy: str) -> str:
    """The one-line message for a file that could not be opened or read."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file: {remedy}"
    if isinstance(error, OSError):
        known = _ERRORS.get(error.errno or 0)
        return f"{path}: {known}" if known else f"{path}: cannot be read ({error.strerror or error}): {remedy}"
    return f"{path}: is no path ({error}): {remedy}"


def read_bytes(path: Path, remedy: str, max_bytes: int = TEXT_BYTES) -> bytes:
    """The content of a regular file; raises InputError."""
    with open_regular(path, remedy, max_bytes) as file:
        try:
            content = file.read(max_bytes + 1)  # bounded, as the size may be wrong (/proc) or grow
        except OSError as error:
            raise InputError(read_error_message(path, error, remedy)) from None
    if len(content) > max_bytes:
        raise InputError(f"{path}: has more than the {max_bytes / MIB:.0f} MiB that are read: {remedy}")
    return content


def read_text(path: Path, remedy: str, max_bytes: int = TEXT_BYTES) -> str:
    """The UTF-8 text of a regular file, without a byte order mark; raises InputError."""
    content = read_bytes(path, remedy, max_bytes)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        hint = "decompress it first" if content.startswith(GZIP) else "save the file as UTF-8"
        raise InputError(f"{path}: byte {error.start} is not UTF-8: {hint}") from None


def read_lines(path: Path, remedy: str) -> list[tuple[int, str]]:
    """(number, text) of the lines of a text file that are not blank; raises InputError, also where there is none."""
    # not splitlines: a row may hold other separators, such as U+2028
    lines = enumerate(read_text(path, remedy).split("\n"), start=1)
    found = [(number, line.strip()) for number, line in lines if line.strip()]
    if not found:
        raise InputError(f"{path}: is empty: {remedy}")
    return found


def read_json(path: Path, remedy: str = "restore the file", max_bytes: int = JSON_BYTES, finite: bool = True) -> Any:
    """The value of a JSON file. Any: JSON. Raises InputError."""
    return parse_json(read_text(path, remedy, max_bytes), str(path), remedy, finite)


def read_json_object(path: Path, remedy: str = "restore the file", finite: bool = True) -> dict[str, Any]:
    """The object of a JSON file; raises InputError, also for another type."""
    found = read_json(path, remedy, finite=finite)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}, not an object: {remedy}")
    return found


def parse_json(
    text: str | bytes, where: str, remedy: str = "correct it", finite: bool = True, unique_keys: bool = False
) -> Any:
    """Parses JSON text. Any: JSON.

    ``finite``: refuse nan and infinities; reports accept them as missing values. ``unique_keys``: refuse an object with
    a key that stands twice, as rows that people write may have. Raises InputError with one line that begins with
    ``where``.
    """
    hook = partial(_require_unique, where) if unique_keys else None
    try:
        if not finite:
            return json.loads(text, object_pairs_hook=hook)
        return json.loads(text, parse_constant=_reject_constant, parse_float=_parse_finite, object_pairs_hook=hook)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON at column {error.colno} ({error.msg}): {remedy}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not JSON (byte {error.start} is not UTF-8): {remedy}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for JSON: {remedy}") from None
    except ValueError as error:
        reason = "a number of too many digits" if "digits" in str(error) else str(error)
        raise InputError(f"{where}: {reason}: {remedy}") from None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _require_unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{where}: key {twice!r} stands twice: keep one of the two")
    return found


def _parse_finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text[:20]} is beyond every number")
    return number


DAMAGED = "restore the file"
MAX_SHOWN = 60
"""Characters of a wrong value in an error message."""


class Record(BaseModel):
    """Base of the schemas of JSON objects; additional keys are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)


Kind = Any
"""Any: a pydantic type, such as ``list[SomeRecord]``; it is only used for validation, values stay plain JSON."""


def parse_typed_json(text: str | bytes, kind: Kind, where: str, remedy: str = DAMAGED, finite: bool = True) -> Any:
    """``parse_json`` and ``validate_type``."""
    return validate_type(parse_json(text, where, remedy, finite), kind, where, remedy)


def validate_type(value: Any, kind: Kind, where: str, remedy: str = DAMAGED) -> Any:
    """Returns the value; raises InputError that begins with ``where`` if it is not of the type. Any: JSON."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
        shown = json.dumps(first["input"], default=str, ensure_ascii=False)
        shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
        at = f"{place.removeprefix('.')}={shown}" if place else shown
        rule = first["msg"][:1].lower() + first["msg"][1:]
        raise InputError(f"{where}: {at}: {rule}: {remedy}") from None
    return value


@contextmanager
def structure_errors(where: str, remedy: str = DAMAGED) -> Iterator[None]:
    """Converts errors of accessing a malformed nested structure (KeyError, TypeError ...) to InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: is not as a run writes it ({describe_error(error)[:200]}): {remedy}") from error
