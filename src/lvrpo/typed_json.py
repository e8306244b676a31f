"""JSON that a run wrote, read back as what it must be: another shape is one line that names file, place and rule."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from lvrpo import reading
from lvrpo.errors import InputError

DAMAGED = "restore the file"
SHOWN = 60
"""Characters of a wrong value that are shown."""


class Record(BaseModel):
    """What an object of a file must hold; further keys may stand beside them."""

    model_config = ConfigDict(strict=True, extra="allow", arbitrary_types_allowed=True)


Kind = Any
"""Any: a type as pydantic takes it, such as ``list[SomeRecord]``; the value comes back as JSON holds it."""


def parse_json(text: str | bytes, kind: Kind, where: str, remedy: str = DAMAGED, finite: bool = True) -> Any:
    """What a JSON text holds, of a type; raises InputError that begins with ``where``.

    ``finite``: whether nan and infinities are refused.
    """
    found = reading.parse_json(text, where, remedy, finite)
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
