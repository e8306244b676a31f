"""Files that a user names, read with bounds: only regular files, only so many bytes, every fault one line.

A pipe would be waited for, a device never ends, a folder is no file; all of them are refused before they are read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lvrpo.errors import InputError

MIB = 2**20
TEXT_BYTES = 1024 * MIB
"""Of a file of rows or lines."""
JSON_BYTES = 256 * MIB
"""Of a JSON file of a model or a run."""
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
def open_regular(path: Path, remedy: str, most_bytes: int | None = TEXT_BYTES) -> Iterator[BufferedReader]:
    """A regular file, open for reading, that is not larger than ``most_bytes``.

    ``remedy``: what to give instead, "give a text file". Raises InputError, one line, for anything else.
    """
    try:
        require_regular(os.stat(path), path, remedy, most_bytes)
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise InputError(unreadable(path, error, remedy)) from None
    with os.fdopen(handle, "rb") as file:
        require_regular(os.fstat(handle), path, remedy, most_bytes)  # it may be another one by now
        yield file


def is_there(path: Path) -> bool:
    """Whether anything has this name: a link that leads to itself or nowhere counts, so that its reader refuses it."""
    return os.path.lexists(path)


def require_regular(found: os.stat_result, path: Path, remedy: str, most_bytes: int | None = None) -> None:
    """Raises InputError where something is no regular file, or a larger one."""
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise InputError(f"{path}: is {_KINDS.get(kind, 'something else')}, not a regular file: {remedy}")
    if most_bytes is not None and found.st_size > most_bytes:
        raise InputError(
            f"{path}: has {found.st_size / MIB:.0f} MiB, more than {most_bytes / MIB:.0f} are read: {remedy}"
        )


def unreadable(path: Path, error: Exception, remedy: str) -> str:
    """The line for a file that could not be opened or read."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file: {remedy}"
    if isinstance(error, OSError):
        known = _ERRORS.get(error.errno or 0)
        return f"{path}: {known}" if known else f"{path}: cannot be read ({error.strerror or error}): {remedy}"
    return f"{path}: is no path ({error}): {remedy}"


def read_bytes(path: Path, remedy: str, most_bytes: int = TEXT_BYTES) -> bytes:
    """The content of a regular file; raises InputError."""
    with open_regular(path, remedy, most_bytes) as file:
        try:
            content = file.read(most_bytes + 1)  # what says that it is empty, or grows, is bounded too
        except OSError as error:
            raise InputError(unreadable(path, error, remedy)) from None
    if len(content) > most_bytes:
        raise InputError(f"{path}: has more than the {most_bytes / MIB:.0f} MiB that are read: {remedy}")
    return content


def read_text(path: Path, remedy: str, most_bytes: int = TEXT_BYTES) -> str:
    """The UTF-8 text of a regular file, without a byte order mark; raises InputError."""
    try:
        return read_bytes(path, remedy, most_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None


def read_json(path: Path, remedy: str = "restore the file", most_bytes: int = JSON_BYTES, finite: bool = True) -> Any:
    """What a JSON file holds. Any: whatever JSON may hold. Raises InputError."""
    return parse_json(read_text(path, remedy, most_bytes), str(path), remedy, finite)


def read_json_object(path: Path, remedy: str = "restore the file", finite: bool = True) -> dict[str, Any]:
    """The object that a JSON file holds; raises InputError."""
    found = read_json(path, remedy, finite=finite)
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}, not an object: {remedy}")
    return found


def parse_json(text: str | bytes, where: str, remedy: str = "correct it", finite: bool = True) -> Any:
    """What JSON text holds, its numbers of bounded length. Any: whatever JSON may hold.

    ``finite``: whether nan and infinities are refused; what shows a run takes them for missing numbers.
    Raises InputError with one line that begins with ``where``.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, parse_float=_finite) if finite else json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON at column {error.colno} ({error.msg}): {remedy}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not JSON (byte {error.start} is not UTF-8): {remedy}") from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply for JSON: {remedy}") from None
    except ValueError as error:
        reason = "a number of too many digits" if "digits" in str(error) else str(error)
        raise InputError(f"{where}: {reason}: {remedy}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise ValueError(f"{text[:20]} is beyond every number")
    return number


DAMAGED = "restore the file"
SHOWN = 60
"""Characters of a wrong value that are shown."""


class Record(BaseModel):
    """What an object of a file must hold; further keys may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)


Kind = Any
"""Any: a type as pydantic takes it, such as ``list[SomeRecord]``; the value comes back as JSON holds it."""


def parse_typed_json(text: str | bytes, kind: Kind, where: str, remedy: str = DAMAGED, finite: bool = True) -> Any:
    """What a JSON text holds, of a type; raises InputError that begins with ``where``.

    ``finite``: whether nan and infinities are refused.
    """
    found = parse_json(text, where, remedy, finite)
    return typed(found, kind, where, remedy)


def typed(value: Any, kind: Kind, where: str, remedy: str = DAMAGED) -> Any:
    """The value, if it is of the type; else InputError that begins with ``where``. Any: what JSON holds."""
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in first["loc"])
        shown = json.dumps(first["input"], default=str, ensure_ascii=False)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        at = f"{place.removeprefix('.')}={shown}" if place else shown
        rule = first["msg"][:1].lower() + first["msg"][1:]
        raise InputError(f"{where}: {at}: {rule}: {remedy}") from None
    return value


@contextmanager
def shaped(where: str, remedy: str = DAMAGED) -> Iterator[None]:
    """Within it, what does not find its way through a deep structure of another shape is an InputError."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{where}: is not as a run writes it ({said[:200]}): {remedy}") from error
