"""CONFIG and its keys, checked before torch and the training code are imported: a typing error is answered at once.

``assets/keys.json`` holds the keys of the configuration classes; it is made by ``docs/make_keys.py``.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import textwrap
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from lvrpo.config import Config, default_kind, read_tree, require_known_keys, shipped_configs
from lvrpo.config_errors import KIND
from lvrpo.errors import InputError, nearest

KEYS = Path(__file__).parent.parent / "assets" / "keys.json"
"""By class its ``hints`` and ``fields``. A field is null; the values of a ``kind``; or ``sections``: the names of the
classes that it may hold, with ``many`` for a list of them, and ``default`` for the kind of a section that names none.
"""
RUNS: Mapping[str, tuple[str, str]] = {
    "TrainConfig": ("an RL", "train"),
    "PretrainConfig": ("a supervised", "pretrain"),
}
"""Per configuration class: what messages call it, and the command that takes it."""


@cache
def key_class(name: str) -> type[Config]:
    """A class with the keys, kinds and hints of the configuration class ``name``, and values of any type."""
    described = _keys()[name]
    fields: dict[str, Any] = {key: (_type_of(field), None) for key, field in described["fields"].items()}
    base = type("Keys", (Config,), {"hints": described["hints"], "__module__": __name__})
    return create_model(name, __base__=base, **fields)


@cache
def _keys() -> dict[str, Any]:
    return json.loads(KEYS.read_text(encoding="utf-8"))


def _type_of(field: Any) -> Any:
    """The annotation of a field of ``keys.json``. Any: JSON, a type."""
    if field is None:
        return Any
    if isinstance(field, list):
        return Literal[tuple(field)]
    section: Any = Union[tuple(key_class(name) for name in field["sections"])]  # noqa: UP007  # of a tuple
    if "default" in field:
        section = Annotated[section, Field(discriminator=KIND), default_kind(field["default"])]
    return (list[section] if field.get("many") else section) | None


def known_config(name: str, config: str | None, overrides: Sequence[str]) -> Path:
    """The file of CONFIG, for the configuration class ``name``; raises InputError for an unknown key."""
    if config is None:
        raise InputError(f"CONFIG is missing: give a YAML file, or one of {', '.join(shipped_configs())}")
    path = find_config(config)
    tree = read_tree(path, key_class(name))
    _refuse_other_kind(name, config, tree)
    if not tree:
        raise InputError(f"{path}: is empty: write a setting, such as extends: quickstart")
    require_known_keys(key_class(name), path, overrides)
    return path


def find_config(name: str) -> Path:
    """The file of CONFIG."""
    shipped = shipped_configs()
    path = Path(name)
    there = os.path.lexists(path) and not path.is_dir()
    if there or (name not in shipped and path.suffix in (".yaml", ".yml")):
        return path
    if name in shipped:
        return shipped[name]
    if path.is_dir():
        raise InputError(f"config {name!r}: is a folder: give a YAML file, or one of {', '.join(shipped)}")
    if "=" in name:
        raise InputError(f"config {name!r}: is an override: name a YAML file or a built-in configuration before it")
    near = nearest(name, shipped)
    hint = f"did you mean {near}? " if near else ""
    raise InputError(f"config {name!r}: no such file: {hint}give a YAML file, or one of {', '.join(shipped)}")


def _refuse_other_kind(name: str, config: str, keys: Collection[str]) -> None:
    """Raises InputError for a configuration of the other kind of run: it has sections that only those have."""
    own = key_class(name).model_fields
    for other, (words, command) in RUNS.items():
        fields = key_class(other).model_fields
        foreign = [key for key in keys if key in fields and key not in own]
        if foreign and not any(key in own and key not in fields for key in keys):
            raise InputError(
                f"config {config!r}: is {words} configuration (it has a section {foreign[0]!r}): start it with "
                f"lvrpo {command} {config}"
            )


# --- lvrpo COMMAND --config-help ---

NAMES = {str: "text", int: "int", float: "float", bool: "bool", Path: "path", Any: "any", type(None): "null"}
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def settings_text(cls: type[Config], word: str = "", width: int = 100) -> str:
    """Every setting whose path holds ``word``, as lines for a terminal; raises InputError where there is none."""
    rows = list(_rows(cls, "", set()))
    found = [row for row in rows if word.lower() in row[0]]
    if not found:
        known = list(dict.fromkeys(part for path, *_ in rows for part in (path, path.rpartition(".")[2])))
        near = nearest(word.lower(), known)
        hint = f"did you mean {near}?" if near else "use --config-help alone to list all settings"
        raise InputError(f"--config-help {word}: no such setting: {hint}")
    return "\n".join(
        f"{path}  ({kind}; default {default})"
        + "".join(f"\n{line}" for line in textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    "))
        for path, kind, default, text in found
    )


def _rows(cls: type[Config], place: str, above: set[type[Config]]) -> Iterator[tuple[str, str, str, str]]:
    """Path, type, default and description of each setting; those of one of several kinds have it in their path."""
    texts = field_texts(cls)
    for name, field in cls.model_fields.items():
        inner = configs_in(field.annotation)
        if not inner:
            words = type_text(field.annotation, field.metadata), default_text(field, inner), texts.get(name, "")
            yield (f"{place}{name}", *(word.replace("`", "") for word in words))  # type: ignore[misc]  # four texts
        for each in inner:
            kinds = get_args(each.model_fields["kind"].annotation) if len(inner) > 1 else ()
            if each not in above:
                of_kinds = f"[{' | '.join(kinds)}]" if kinds else ""
                yield from _rows(each, f"{place}{name}{of_kinds}.", above | {cls})


def field_texts(cls: type[Config]) -> dict[str, str]:
    """The strings under the fields of a class and of those that it is derived from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, Config):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = following.value if isinstance(following, ast.Expr) else None
                if isinstance(text, ast.Constant):
                    found[field.target.id] = prose(str(text.value))
    return found


def prose(text: str | None) -> str:
    """One paragraph in Markdown, in the terms of YAML, without what is said of Python's types."""
    words = " ".join((text or "").split()).replace("``", "`")
    return re.sub(r"\bNone\b", "null", re.sub(r" ?\bAny: [^.]*\.", "", words))


def configs_in(annotation: Any) -> list[type[Config]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [each for part in get_args(annotation) for each in configs_in(part)]


def default_text(field: FieldInfo, inner: list[type[Config]]) -> str:
    """A default as YAML writes it; ``inner``: the sections that the field may hold."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Config):
        return f"kind: {value.model_dump()['kind']}" if len(inner) > 1 else "its defaults"
    if inner and value:
        return f"`{json.dumps([each.model_dump(exclude_unset=True) for each in value])}`"
    return f"`{json.dumps(value, default=str)}`"


def type_text(annotation: Any, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type in words: int >= 1, `a` or `b`, list of text."""
    from lvrpo.types import TaskKind  # loads torch, which an unknown key is answered without

    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return type_text(parts[0], parts[1:])
    if annotation == TaskKind:
        return "task"
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(type_text(part, metadata) for part in parts))
    if origin is tuple:
        items = [part for part in parts if part is not Ellipsis]
        return f"list of {type_text(items[0])}" if Ellipsis in parts else f"[{', '.join(map(type_text, items))}]"
    if origin is dict:
        return f"{type_text(parts[0])}: {type_text(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return "section"
    bounds = [
        f"{sign} {getattr(each, name)}" for each in metadata for name, sign in BOUNDS.items() if hasattr(each, name)
    ]
    bounded = annotation in (int, float) and bounds
    return NAMES.get(annotation, str(annotation)) + (f" {', '.join(bounds)}" if bounded else "")
