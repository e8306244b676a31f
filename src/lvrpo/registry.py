"""Names to objects: one plain table per kind, written out in full, and one function that looks names up."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

from lvrpo.errors import InputError, LvrpoError


def resolve(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """The object called ``name``: an entry of ``table``, or anybody's ``my_package.module:Attribute``.

    An entry is the object itself or a string ``package.module:Attribute`` that is imported only now. ``kind`` is the
    word for messages ("reward", "policy"). Raises InputError on an unknown name, with the nearest one and the list.
    Any: what a table holds is the table's affair.
    """
    if name in table:
        entry = table[name]
        return _imported(kind, entry) if isinstance(entry, str) else entry
    if ":" in name:
        return _imported(kind, name)
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(
        f"{kind} {name!r}: unknown: {hint}there are {', '.join(sorted(table)) or 'none'}; "
        "your own is given as my_package.module:Name"
    )


def _imported(kind: str, target: str) -> Any:
    module_name, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise InputError(f"{kind} {target!r}: write it as my_package.module:Name")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise InputError(
                f"{kind} {target!r}: no module {missing!r}: install it or put its folder on PYTHONPATH"
            ) from None
        raise InputError(
            f"{kind} {target!r}: needs the package {missing!r}: install it with pip install {missing.partition('.')[0]}"
        ) from None
    except LvrpoError:
        raise
    except (Exception, SystemExit) as error:  # anybody's module may do anything
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{kind} {target!r}: {module_name} cannot be imported: {said}: correct it") from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)  # the attribute is the user's choice
        except AttributeError:
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"did you mean {near[0]}?" if near else f"name something that {module_name} defines"
            raise InputError(f"{kind} {target!r}: {module_name} has no {part!r}: {hint}") from None
    return found
