"""Strict typed configuration: every section is a frozen pydantic model that forbids unknown keys.

A run is configured by one YAML file, which may extend another, and by ``section.key=value`` overrides. Values are not
converted implicitly: neither text to a number nor true to 1.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from lvrpo.config_errors import (
    KIND,
    SCALAR_TYPES,
    Location,
    as_literal_error,
    explain,
    kinds_of,
    models_at,
    models_at_key,
    real_location,
    show,
)
from lvrpo.errors import InputError, nearest
from lvrpo.reading import MIB, read_text
from lvrpo.strict_yaml import dump_yaml, parse_yaml

MAX_NUMBER = 2**63 - 1
"""Limit of all numbers, so that each fits float32 and int64; fields may have lower limits."""


class Config(BaseModel):
    """Base of every configuration section."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    hints: ClassVar[Mapping[str, str]] = {}
    """Error hints for refused keys, such as renamed ones: by ``key`` or ``key=value``; ``{section}`` is replaced by the
    path of the section."""

    @field_validator("*")
    @classmethod
    def _limit_numbers(cls, value: Any) -> Any:
        """Any: the value of any field."""
        for place, number in _iter_numbers(value):
            if not abs(number) <= MAX_NUMBER:
                at = f"{place}={number}: " if place else ""
                raise ValueError(f"{at}numbers must lie between -{MAX_NUMBER:.3g} and {MAX_NUMBER:.3g}")
        return value


def default_kind(kind: str) -> BeforeValidator:
    """Default of the discriminator ``kind`` of a tagged union, so that a section without ``kind`` is valid."""

    def with_kind(value: Any) -> Any:  # Any: YAML
        return {"kind": kind, **value} if isinstance(value, Mapping) else value

    return BeforeValidator(with_kind)


Natural = Annotated[int, Field(ge=0, le=100_000)]
NonNegative = Annotated[float, Field(ge=0)]

C = TypeVar("C", bound=Config)
Tree = dict[str, Any]  # Any: YAML


ALLOW_CODE = "allow_code"
"""The key by which the CONFIG file of a command allows code; ignored in a run and in extended files."""


def load_config(cls: type[C], path: Path | None = None, overrides: Sequence[str] = (), allow_code: bool = True) -> C:
    """Reads ``path`` (defaults only where it is None), applies ``section.key=value`` overrides, validates.

    ``allow_code``: whether the key ``allow_code`` of the file counts; False for files that the user did not name.
    Raises InputError with one line that names the value, the rule and the remedy.
    """
    tree, raw = _overridden_tree(cls, path, overrides, allow_code)
    as_text: set[Location] = set()
    while True:
        config, first = _validate(cls, tree)
        if config is not None:
            return config
        location = real_location(tree, first["loc"])
        # `name=2024` on the command line means text where only text is allowed
        texts = first["type"] in ("string_type", "literal_error", "path_type") and location not in as_text
        text = raw.get(location, "") if texts else ""
        as_text.add(location)
        if text and not isinstance(first["input"], str):
            keys = [str(key) for key in location]
            _section(tree, keys, text)[keys[-1]] = text
            continue
        raise _config_error(cls, path, raw, first, location)


def require_known_keys(cls: type[Config], path: Path | None, overrides: Sequence[str]) -> None:
    """Raises the InputError of ``load_config`` for an unknown key; values are not checked."""
    tree, raw = _overridden_tree(cls, path, overrides)
    if (first := _validate(cls, tree)[1]).get("type") == "extra_forbidden":
        raise _config_error(cls, path, raw, first, real_location(tree, first["loc"]))


def _overridden_tree(
    cls: type[Config], path: Path | None, overrides: Sequence[str], allow_code: bool = True
) -> tuple[Tree, dict[Location, str]]:
    """The tree of a file with the overrides applied, and the text of each override by its keys."""
    tree = {} if path is None else read_tree(path, cls)
    if not allow_code:
        tree.pop(ALLOW_CODE, None)
    raw: dict[Location, str] = {}
    for override in overrides:
        keys, text = _split_override(override)
        value = _parse_override(override, text)
        section, (*sections, last) = _section(tree, keys, value), keys
        if last == KIND:
            depth = len(sections)
            overridden = {str(each[depth]) for each in raw if list(each[:depth]) == sections and len(each) > depth}
            _drop_other_kinds(section, value, models_at(cls, sections), keep=overridden)
        section[last] = value
        raw[keys] = text
    return tree, raw


def _config_error(
    cls: type[Config], path: Path | None, raw: Mapping[Location, str], error: dict[str, Any], location: Location
) -> InputError:
    """An error of the file or of an override. Any: pydantic's error dict."""
    message = explain(cls, error, location)
    from_file = path is not None and not any(keys[: len(location)] == location[: len(keys)] for keys in raw)
    return InputError(f"{path}: {message}" if from_file else message)


def parse_section(cls: type[C], tree: Mapping[str, Any], where: str | Path) -> C:
    """Validates a section that is not in a configuration file; raises InputError that begins with ``where``."""
    if not isinstance(tree, Mapping):
        raise InputError(f"{where}: must be a section of 'key: value' lines")
    config, first = _validate(cls, dict(tree))
    if config is not None:
        return config
    location = real_location(dict(tree), first["loc"])
    between = "." if location and isinstance(where, str) else ": "
    raise InputError(f"{where}{between}{explain(cls, first, location)}")


def config_tree(config: Config) -> Tree:
    """The resolved configuration as a run keeps it: a path that begins with ./ or ../ is of the current folder."""
    return _resolve_relative_paths(config.model_dump(mode="json"), Path())


def dump_config(config: Config) -> str:
    """``config_tree`` as YAML, keys in order of declaration; ``load_config`` restores an equal configuration."""
    return dump_yaml(config_tree(config))


def config_sha256(config: Config) -> str:
    """Fingerprint of the resolved configuration; it does not depend on the order of keys."""
    return tree_sha256(config_tree(config))


def tree_sha256(tree: Mapping[str, Any]) -> str:
    """``config_sha256`` of a parsed ``dump_config``, also one with keys of another version."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The differences between two configuration trees, as lines ``section.key=1 against 2``."""
    left, right = dict(_leaves(one)), dict(_leaves(other))
    absent = object()
    return [
        f"{key}={show(left[key]) if key in left else 'unset'} against {show(right[key]) if key in right else 'unset'}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key, absent) != right.get(key, absent)
    ]


def read_yaml(path: Path) -> Tree:
    """The mapping that a YAML file holds, with duplicate keys refused; raises InputError."""
    if not os.path.lexists(path):
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        hint = f"did you mean {path.parent / near}?" if near else "check the path"
        raise InputError(f"{path}: no such file: {hint}")
    tree = parse_yaml(read_text(path, "give a YAML text file", MIB), str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}:1: holds {show(tree)}: a configuration is 'key: value' lines")
    return tree


def _iter_numbers(value: Any, place: str = "", depth: int = 3) -> Iterator[tuple[str, int | float]]:
    """The numbers of a field with their paths, without nested sections, which validate their own; free options may be
    self-referential, hence the depth limit."""
    if isinstance(value, int | float):
        yield place, value
    elif depth and isinstance(value, Mapping | list | tuple):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _iter_numbers(part, f"{place}.{key}" if place else str(key), depth - 1)


# --- files and overrides ---


def read_tree(path: Path, cls: type[Config], chain: tuple[Path, ...] = ()) -> Tree:
    """The file merged over the files that it extends; ``chain``: the files that extend it. Raises InputError."""
    resolved = Path(os.path.realpath(path))  # Path.resolve fails for links that refer to themselves
    if resolved in chain:
        cycle = " -> ".join(p.name for p in (*chain[chain.index(resolved) :], resolved))
        raise InputError(f"{path}: extends itself ({cycle}): remove one 'extends'")
    tree = _resolve_relative_paths(read_yaml(path), path.parent)
    if chain:
        tree.pop(ALLOW_CODE, None)
    if "extends" not in tree:
        return tree
    parent = tree.pop("extends")
    if not isinstance(parent, str) or not parent:
        raise InputError(f"{path}: extends={show(parent)}: must be the path of a YAML file, or a built-in name")
    return _merge(read_tree(_parent_file(path, parent), cls, (*chain, resolved)), tree, [cls])


@cache
def shipped_configs() -> Mapping[str, Path]:
    """The configurations shipped with lvrpo, by name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _parent_file(path: Path, parent: str) -> Path:
    """The file that ``path`` extends: relative to its folder, or a shipped configuration."""
    beside, shipped = path.parent / parent, shipped_configs()
    if os.path.lexists(beside) and not os.path.isdir(beside):  # reading refuses pipes and devices
        return beside
    if parent.removesuffix(".yaml") in shipped:
        return shipped[parent.removesuffix(".yaml")]
    names = [*shipped, *(p.name for p in path.parent.glob("*.y*ml") if p != path)]
    near = nearest(parent, names)
    hint = f"did you mean {near}?" if near else f"name a file beside it, or one of {', '.join(shipped)}"
    raise InputError(f"{path}: extends={show(parent)}: no such file: {hint}")


def _resolve_relative_paths(tree: Any, folder: Path) -> Any:
    """The tree with strings that begin with ./ or ../ resolved relative to the file's folder, in place."""
    seen: set[int] = set()  # YAML aliases share nodes
    stack = [tree]
    while stack:
        node = stack.pop()
        if id(node) in seen or not isinstance(node, dict | list):
            continue
        seen.add(id(node))
        for key, inner in list(node.items() if isinstance(node, dict) else enumerate(node)):
            if isinstance(inner, str) and inner.startswith(("./", "../")) and key != "extends":
                node[key] = os.path.abspath(folder / inner)
            stack.append(inner)
    return tree


def _merge(base: Tree, over: Tree, models: Sequence[type[Config]]) -> Tree:
    merged = dict(base)
    if KIND in over:
        _drop_other_kinds(merged, over[KIND], models)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merge(old, value, models_at_key(models, key))
        merged[key] = value
    return merged


def _drop_other_kinds(section: Tree, kind: Any, models: Sequence[type[Config]], keep: Collection[str] = ()) -> None:
    """Deletes keys from a section that are not fields of ``kind`` but of other kinds, except those in ``keep``."""
    known = {name for model in models if kind in kinds_of(model) for name in model.model_fields}
    others = {name for model in models for name in model.model_fields} - known - set(keep)
    for name in [name for name in section if known and name in others]:
        del section[name]


def _split_override(override: str) -> tuple[tuple[str, ...], str]:
    name, equals, text = override.partition("=")
    keys = tuple(key.strip() for key in name.split("."))
    if not equals or not all(keys):
        raise InputError(f"{override!r}: an override is written section.key=value")
    return keys, text.strip()


def _parse_override(override: str, text: str) -> Any:
    try:
        return parse_yaml(text, override)
    except InputError:
        raise InputError(f"{override!r}: the value is not valid YAML: put it in quotes") from None


def _section(tree: Tree, keys: Sequence[str], value: Any) -> Tree:
    """The section that holds the last key of an override; created if missing."""
    *sections, _ = keys
    for depth, key in enumerate(sections):
        if tree.get(key) is None:
            tree[key] = {}
        if not isinstance(tree[key], dict):
            where = ".".join(sections[: depth + 1])
            raise InputError(
                f"{'.'.join(keys)}={show(value)}: {where} is {show(tree[key])}, not a section: set {where}"
            )
        tree = tree[key]
    return tree


# --- validation and error messages ---


def _validate(cls: type[C], tree: Tree) -> tuple[C | None, dict[str, Any]]:
    """The configuration, or None and the error to report: an unknown key, else a wrong type, else a violated rule.

    Any: pydantic's error dict.
    """
    try:
        config, errors = cls.model_validate(tree), []
    except ValidationError as error:
        config, errors = None, error.errors(include_url=False)
    if not errors or errors[0]["type"] == "value_error":
        errors = [*_silent_conversions(cls, tree), *errors]
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0]) if errors else {}
    return (None if errors else config), as_literal_error(dict(first))


def _silent_conversions(cls: type[Config], tree: Tree) -> list[Any]:
    """Errors for values that pydantic would convert: '3' or true to 3, 3.0 to 3, 1 to true. Any: its error dicts."""
    try:
        cls.model_validate_json(json.dumps(tree, skipkeys=True, default=str), strict=True)
    except ValidationError as error:
        return [e for e in error.errors(include_url=False) if e["type"] in SCALAR_TYPES]
    return []


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value
