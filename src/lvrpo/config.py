"""Strict typed configuration: every section is a frozen pydantic model that forbids unknown keys.

A run is configured by one YAML file, which may extend another, and by ``section.key=value`` overrides. Values are not
converted implicitly: neither text to a number nor true to 1.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from lvrpo.errors import InputError
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
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]

C = TypeVar("C", bound=Config)
Tree = dict[str, Any]  # Any: YAML
Location = tuple[str | int, ...]


KIND = "kind"
"""The discriminator of a section that is a tagged union."""
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
        location = _real_location(tree, first["loc"])
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
        raise _config_error(cls, path, raw, first, _real_location(tree, first["loc"]))


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
            _drop_other_kinds(section, value, _models_at(cls, sections), keep=overridden)
        section[last] = value
        raw[keys] = text
    return tree, raw


def _config_error(
    cls: type[Config], path: Path | None, raw: Mapping[Location, str], error: dict[str, Any], location: Location
) -> InputError:
    """An error of the file or of an override. Any: pydantic's error dict."""
    message = _explain(cls, error, location)
    from_file = path is not None and not any(keys[: len(location)] == location[: len(keys)] for keys in raw)
    return InputError(f"{path}: {message}" if from_file else message)


def parse_section(cls: type[C], tree: Mapping[str, Any], where: str | Path) -> C:
    """Validates a section that is not in a configuration file; raises InputError that begins with ``where``."""
    if not isinstance(tree, Mapping):
        raise InputError(f"{where}: must be a section of 'key: value' lines")
    config, first = _validate(cls, dict(tree))
    if config is not None:
        return config
    location = _real_location(dict(tree), first["loc"])
    between = "." if location and isinstance(where, str) else ": "
    raise InputError(f"{where}{between}{_explain(cls, first, location)}")


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, keys in order of declaration; ``load_config`` restores an equal one."""
    return dump_yaml(config.model_dump(mode="json"))


def config_sha256(config: Config) -> str:
    """Fingerprint of the resolved configuration; it does not depend on the order of keys."""
    return tree_sha256(config.model_dump(mode="json"))


def tree_sha256(tree: Mapping[str, Any]) -> str:
    """``config_sha256`` of a parsed ``dump_config``, also one with keys of another version."""
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def config_differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The differences between two configuration trees, as lines ``section.key=1 against 2``."""
    left, right = dict(_leaves(one)), dict(_leaves(other))
    absent = object()
    return [
        f"{key}={_show(left[key]) if key in left else 'unset'} against {_show(right[key]) if key in right else 'unset'}"
        for key in dict.fromkeys([*left, *right])
        if left.get(key, absent) != right.get(key, absent)
    ]


def read_yaml(path: Path) -> Tree:
    """The mapping that a YAML file holds, with duplicate keys refused; raises InputError."""
    if not os.path.lexists(path):
        near = _nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else [])
        hint = f"did you mean {path.parent / near}?" if near else "check the path"
        raise InputError(f"{path}: no such file: {hint}")
    tree = parse_yaml(read_text(path, "give a YAML text file", MIB), str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise InputError(f"{path}:1: holds {_show(tree)}: a configuration is 'key: value' lines")
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
        raise InputError(f"{path}: extends={_show(parent)}: must be the path of a YAML file, or a built-in name")
    return _merge(read_tree(_parent_file(path, parent), cls, (*chain, resolved)), tree, [cls])


def shipped_configs() -> dict[str, Path]:
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
    near = _nearest(parent, names)
    hint = f"did you mean {near}?" if near else f"name a file beside it, or one of {', '.join(shipped)}"
    raise InputError(f"{path}: extends={_show(parent)}: no such file: {hint}")


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
            value = _merge(old, value, _models_at_key(models, key))
        merged[key] = value
    return merged


def _drop_other_kinds(section: Tree, kind: Any, models: Sequence[type[Config]], keep: Collection[str] = ()) -> None:
    """Deletes keys from a section that are not fields of ``kind`` but of other kinds, except those in ``keep``."""
    known = {name for model in models if kind in _kinds(model) for name in model.model_fields}
    others = {name for model in models for name in model.model_fields} - known - set(keep)
    for name in [name for name in section if known and name in others]:
        del section[name]


def _kinds(model: type[Config]) -> tuple[Any, ...]:
    return get_args(model.model_fields[KIND].annotation) if KIND in model.model_fields else ()


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
                f"{'.'.join(keys)}={_show(value)}: {where} is {_show(tree[key])}, not a section: set {where}"
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
    return (None if errors else config), _as_literal_error(dict(first))


def _as_literal_error(error: dict[str, Any]) -> dict[str, Any]:
    """Rewrites pydantic's error for an unknown ``kind`` as a ``literal_error``; other errors are returned unchanged."""
    if error.get("type") != "union_tag_invalid":
        return error
    names = error["ctx"]["expected_tags"].split(", ")
    expected = f"{', '.join(names[:-1])} or {names[-1]}"
    return {**error, "type": "literal_error", "loc": (*error["loc"], KIND), "input": error["input"][KIND]} | {
        "ctx": {"expected": expected}
    }


def _silent_conversions(cls: type[Config], tree: Tree) -> list[Any]:
    """Errors for values that pydantic would convert: '3' or true to 3, 3.0 to 3, 1 to true. Any: its error dicts."""
    try:
        cls.model_validate_json(json.dumps(tree, skipkeys=True, default=str), strict=True)
    except ValidationError as error:
        return [e for e in error.errors(include_url=False) if e["type"] in _SCALAR_TYPES]
    return []


_SCALAR_TYPES = ("int_type", "float_type", "bool_type")
_RULES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text: put it in quotes",
    "path_type": "must be a path",
    "recursion_loop": "holds itself: remove the YAML alias",
    "invalid_key": "must be a text key: put it in quotes",
    "list_type": "must be a list [a, b]",
    "tuple_type": "must be a list [a, b]",
    "set_type": "must be a list [a, b]",
    "frozen_set_type": "must be a list [a, b]",
    "dict_type": "must be a section of 'key: value' lines",
    "model_type": "must be a section of 'key: value' lines",
    "model_attributes_type": "must be a section of 'key: value' lines",
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-', the first a letter or digit",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
}


def _explain(cls: type[Config], error: dict[str, Any], location: Location) -> str:
    dotted = ".".join(str(key) for key in location)
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    hint = _hint(cls, location, value) if kind in ("extra_forbidden", "literal_error") else None
    if hint is not None:
        return f"{dotted}={_show(value)}: {hint}"
    if kind == "extra_forbidden":
        of_kinds = _kinds_with(cls, location)
        if of_kinds:
            section = ".".join(str(key) for key in location[:-1])
            which = "that" if len(of_kinds) == 1 else "one of them"
            kinds = " or ".join(of_kinds)
            return (
                f"{dotted}: applies to {section}.kind={kinds}, not to {error['loc'][-2]}: set {which}, or leave it out"
            )
        return f"{dotted}: unknown key: {_suggest_key(cls, location)}"
    if kind == "missing" and isinstance(error["loc"][-1], int):
        return f"{dotted}={_show(value)}: must have more entries"
    if kind == "missing":
        return f"{dotted}: is missing: set it, in the file or as {dotted}=VALUE"
    if kind in ("value_error", "assertion_error"):
        message = " ".join(str(context.get("error") or error["msg"]).split())
        at = f"{dotted}: " if isinstance(value, dict) else f"{dotted}={_show(value)}: "
        return at + message if dotted else message
    rule = _RULES.get(kind)
    limits = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in context.items()}
    message = rule.format(**limits) if rule else error["msg"][:1].lower() + " ".join(error["msg"][1:].split())
    if kind == "literal_error" and isinstance(value, str):
        near = _nearest(value, re.findall(r"'([^']*)'", context["expected"]))
        message += f": did you mean {near}?" if near else ""
    shown = repr(value) if kind in _SCALAR_TYPES and isinstance(value, str) else _show(value)
    return f"{dotted}={shown}: {message}" if dotted else message


def _real_location(tree: Any, location: Location) -> Location:
    """The location without the union member names that pydantic inserts."""
    real: list[str | int] = []
    for number, key in enumerate(location):
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            if number < len(location) - 1 or not isinstance(tree, dict):
                continue
        real.append(key)
    return tuple(real)


def _suggest_key(cls: type[Config], location: Location) -> str:
    *sections, last = (str(key) for key in location)
    siblings = _fields_at(cls, sections)
    near = _nearest(last, siblings)
    if near:
        return f"did you mean {'.'.join([*sections, near])}?"
    parents = {".".join(sections[:depth]) for depth in range(1, len(sections) + 1)}
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(list(_key_paths(cls))) if path not in parents}
    near = _nearest(last, elsewhere, cutoff=0.75)
    if near:
        return f"did you mean {elsewhere[near]}?"
    where = f"{'.'.join(sections)} has" if sections else "there are"
    return f"{where} {', '.join(siblings) or 'no keys'}"


def _hint(cls: type[Config], location: Location, value: object) -> str | None:
    *sections, last = (str(key) for key in location)
    found = (model.hints.get(name) for model in _models_at(cls, sections) for name in (f"{last}={value}", last))
    hint = next((hint for hint in found if hint is not None), None)
    return None if hint is None else hint.format(section=".".join(sections))


def _kinds_with(cls: type[Config], location: Location) -> list[str]:
    """The kinds of a tagged-union section that have the key."""
    *sections, last = (str(key) for key in location)
    return [str(kind) for m in _models_at(cls, sections) if last in m.model_fields for kind in _kinds(m)]


def _fields_at(cls: type[Config], sections: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name for model in _models_at(cls, sections) for name in model.model_fields))


def _models_at(cls: type[Config], sections: Sequence[str]) -> list[type[Config]]:
    models = [cls]
    for section in sections:
        models = _models_at_key(models, section)
    return models


def _models_at_key(models: Sequence[type[Config]], key: str) -> list[type[Config]]:
    return [
        inner
        for model in models
        for inner in (_models_in(model.model_fields[key].annotation) if key in model.model_fields else [model])
    ]


def _models_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _key_paths(cls: type[Config], prefix: str = "", depth: int = 0) -> Iterator[str]:
    for name, field in cls.model_fields.items():
        yield prefix + name
        if depth < 6:  # sections may be recursive
            for model in _models_in(field.annotation):
                yield from _key_paths(model, f"{prefix}{name}.", depth + 1)


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def _nearest(name: str, known: Collection[str], cutoff: float = 0.6) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    text = " ".join(text.split()) if text.strip() else repr(text)
    return text if len(text) <= 60 else text[:57] + "..."
