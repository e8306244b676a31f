"""What is wrong with a configuration, in one line: the value, the rule and the remedy, of errors of pydantic."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from pydantic import BaseModel

from lvrpo.errors import nearest

if TYPE_CHECKING:
    from lvrpo.config import Config

Location = tuple[str | int, ...]
"""Keys of sections, and indices of lists, down to a value."""
KIND = "kind"
"""The discriminator of a section that is a tagged union."""


def kinds_of(model: type[Config]) -> tuple[Any, ...]:
    """The kinds of a tagged union that a model is for; none for another section. Any: of a literal."""
    return get_args(model.model_fields[KIND].annotation) if KIND in model.model_fields else ()


def kinds_with(cls: type[Config], location: Location) -> list[str]:
    """The kinds of a tagged-union section that have the key."""
    *sections, last = (str(key) for key in location)
    return [str(kind) for m in models_at(cls, sections) if last in m.model_fields for kind in kinds_of(m)]


def fields_at(cls: type[Config], sections: Sequence[str]) -> list[str]:
    """The keys of the section at a path, those of all its kinds."""
    return list(dict.fromkeys(name for model in models_at(cls, sections) for name in model.model_fields))


def models_at(cls: type[Config], sections: Sequence[str]) -> list[type[Config]]:
    """The models of the section at a path: several for a tagged union."""
    models = [cls]
    for section in sections:
        models = models_at_key(models, section)
    return models


def models_at_key(models: Sequence[type[Config]], key: str) -> list[type[Config]]:
    """The models of the section ``key`` of a section; itself where it has no such key."""
    return [
        inner
        for model in models
        for inner in (_models_in(model.model_fields[key].annotation) if key in model.model_fields else [model])
    ]


def _models_in(annotation: Any) -> list[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [cast("type[Config]", annotation)]  # every section is one
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def key_paths(cls: type[Config], prefix: str = "", depth: int = 0) -> Iterator[str]:
    """The dotted paths of all keys, those of sections before those in them."""
    for name, field in cls.model_fields.items():
        yield prefix + name
        if depth < 6:  # sections may be recursive
            for model in _models_in(field.annotation):
                yield from key_paths(model, f"{prefix}{name}.", depth + 1)


SCALAR_TYPES = ("int_type", "float_type", "bool_type")
"""Errors of values that pydantic would convert."""
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


def explain(cls: type[Config], error: dict[str, Any], location: Location) -> str:
    """The line about an error at its ``real_location``. Any: pydantic's error dict."""
    dotted = ".".join(str(key) for key in location)
    kind, value, context = error["type"], error.get("input"), error.get("ctx") or {}
    hint = _hint(cls, location, value) if kind in ("extra_forbidden", "literal_error") else None
    if hint is not None:
        return f"{dotted}={show(value)}: {hint}"
    if kind == "extra_forbidden":
        of_kinds = kinds_with(cls, location)
        if of_kinds:
            section = ".".join(str(key) for key in location[:-1])
            which = "that" if len(of_kinds) == 1 else "one of them"
            kinds = " or ".join(of_kinds)
            return (
                f"{dotted}: applies to {section}.kind={kinds}, not to {error['loc'][-2]}: set {which}, or leave it out"
            )
        return f"{dotted}: unknown key: {_suggest_key(cls, location)}"
    if kind == "missing" and isinstance(error["loc"][-1], int):
        return f"{dotted}={show(value)}: must have more entries"
    if kind == "missing":
        return f"{dotted}: is missing: set it, in the file or as {dotted}=VALUE"
    if kind in ("value_error", "assertion_error"):
        message = " ".join(str(context.get("error") or error["msg"]).split())
        at = f"{dotted}: " if isinstance(value, dict) else f"{dotted}={show(value)}: "
        return at + message if dotted else message
    rule = _RULES.get(kind)
    limits = {key: int(v) if isinstance(v, float) and v.is_integer() else v for key, v in context.items()}
    message = rule.format(**limits) if rule else error["msg"][:1].lower() + " ".join(error["msg"][1:].split())
    if kind == "literal_error" and isinstance(value, str):
        near = nearest(value, re.findall(r"'([^']*)'", context["expected"]))
        message += f": did you mean {near}?" if near else ""
    shown = repr(value) if kind in SCALAR_TYPES and isinstance(value, str) else show(value)
    return f"{dotted}={shown}: {message}" if dotted else message


def as_literal_error(error: dict[str, Any]) -> dict[str, Any]:
    """Rewrites pydantic's error for an unknown ``kind`` as a ``literal_error``; other errors are returned unchanged."""
    if error.get("type") != "union_tag_invalid":
        return error
    names = error["ctx"]["expected_tags"].split(", ")
    expected = f"{', '.join(names[:-1])} or {names[-1]}"
    return {**error, "type": "literal_error", "loc": (*error["loc"], KIND), "input": error["input"][KIND]} | {
        "ctx": {"expected": expected}
    }


def real_location(tree: Any, location: Location) -> Location:
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
    siblings = fields_at(cls, sections)
    near = nearest(last, siblings)
    if near:
        return f"did you mean {'.'.join([*sections, near])}?"
    parents = {".".join(sections[:depth]) for depth in range(1, len(sections) + 1)}
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(list(key_paths(cls))) if path not in parents}
    near = nearest(last, elsewhere, cutoff=0.75)
    if near:
        return f"did you mean {elsewhere[near]}?"
    where = f"{'.'.join(sections)} has" if sections else "there are"
    return f"{where} {', '.join(siblings) or 'no keys'}"


def _hint(cls: type[Config], location: Location, value: object) -> str | None:
    *sections, last = (str(key) for key in location)
    found = (model.hints.get(name) for model in models_at(cls, sections) for name in (f"{last}={value}", last))
    hint = next((hint for hint in found if hint is not None), None)
    return None if hint is None else hint.format(section=".".join(sections))


def show(value: Any) -> str:
    """A value in one line of at most 60 characters. Any: YAML."""
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    text = " ".join(text.split()) if text.strip() else repr(text)
    return text if len(text) <= 60 else text[:57] + "..."
