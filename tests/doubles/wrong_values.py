"""Values outside a type, derived from the type and its bounds; nothing here knows the name of a field."""

from __future__ import annotations

import collections.abc
import inspect
import json
import math
import random
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lvrpo.config import MAX_NUMBER

Kind = Any
"""Any: an annotation, of which Python has no common type."""
Value = Any
"""Any: what YAML or JSON may hold."""
Model = type[BaseModel]
Keys = tuple[str, ...]

LONG = "long " * 2000
CONTROL = "a\x1b[31mb\x07\u202e\r\n"
POOL: tuple[Value, ...] = (
    *(None, True, False, 7, -7, 7.5, -7.5, 10**30, -(10**30), 1e300, math.nan, math.inf, -math.inf),
    *("", "seven", "7", "7.5", "true", "\0", CONTROL, LONG),
    *([], [7], ["seven"], [[[[7]]]], {}, {"seven": 7}, {"seven": {"seven": {"seven": [7]}}}),
)
"""Of every kind one or more: too large, not finite, of another type, empty, absent, nested."""


@dataclass(frozen=True)
class Wrong:
    """A value that a field must refuse."""

    path: tuple[str, ...]
    """The keys from the root to the field; sections inside lists and tables are part of the value."""
    value: Value
    names: tuple[str, ...]
    """The field, or the keys inside its value that lead to what is wrong: an error names one of them."""
    beside: Mapping[tuple[str, ...], Value]
    """What must be set for the sections on the path to be whole, by path."""
    owner: str
    """The model and field that it is wrong for."""
    common: bool
    """As of ``Outside``."""
    kind: Kind
    """The annotation of the field."""


@dataclass(frozen=True)
class Bounds:
    """What annotations say about a value beside its type."""

    low: float = -MAX_NUMBER
    high: float = MAX_NUMBER
    above: float = -math.inf
    below: float = math.inf
    multiple: int | None = None
    least: int = 0
    most: float = math.inf
    pattern: str | None = None

    @classmethod
    def of(cls, metadata: Sequence[object]) -> Bounds:
        names = {"ge": "low", "le": "high", "gt": "above", "lt": "below", "multiple_of": "multiple"}
        names |= {"min_length": "least", "max_length": "most", "pattern": "pattern"}
        flat = [part for each in metadata for part in (each.metadata if isinstance(each, FieldInfo) else [each])]
        found = {names[name]: value for each in flat for name, value in vars_of(each).items() if name in names}
        return cls(**{name: value for name, value in found.items() if value is not None})


def vars_of(constraint: object) -> Mapping[str, Any]:
    """The named values of a constraint, which has slots or a dictionary."""
    slots = getattr(constraint, "__slots__", ())  # of annotated_types
    return {name: getattr(constraint, name) for name in slots} or vars(constraint)


def split(kind: Kind, metadata: Sequence[object] = ()) -> tuple[Kind, Bounds, tuple[object, ...]]:
    """An annotation without ``Annotated``, and its bounds."""
    if get_origin(kind) is Annotated:
        kind, *more = get_args(kind)
        return split(kind, (*metadata, *more))
    return kind, Bounds.of(metadata), tuple(metadata)


def members(kind: Kind) -> tuple[Kind, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_model(kind: Kind) -> bool:
    return inspect.isclass(kind) and issubclass(kind, BaseModel)


def sections(model: Model) -> set[Model]:
    """A model and all that are part of it."""

    def inside(kind: Kind) -> Iterator[Model]:
        if is_model(kind):
            yield kind
        for part in get_args(kind):
            yield from inside(part)

    found, waiting = {model}, [model]
    while waiting:
        fields = waiting.pop().model_fields.values()
        new = {section for field in fields for section in inside(field.annotation)} - found
        found |= new
        waiting += new
    return found


def subclasses(cls: type) -> set[type]:
    """All below it."""
    return {below for direct in cls.__subclasses__() for below in (direct, *subclasses(direct))}


def is_list(kind: Kind) -> bool:
    return get_origin(kind) in (list, tuple, collections.abc.Sequence)


def is_table(kind: Kind) -> bool:
    return get_origin(kind) in (dict, collections.abc.Mapping)


# --- what is inside ---


def accepts(kind: Kind, value: Value, metadata: Sequence[object] = ()) -> bool:
    """Whether a value is of the type and within its bounds."""
    kind, bounds, metadata = split(kind, metadata)
    if len(members(kind)) > 1:
        return any(accepts(member, value, metadata) for member in members(kind))
    if kind is Any:
        return bounded(value)
    if kind in (None, type(None)):
        return value is None
    if get_origin(kind) is Literal:
        return any(type(value) is type(known) and value == known for known in get_args(kind))
    if kind is bool:
        return isinstance(value, bool)
    if kind in (int, float):
        return is_number(kind, value) and (
            bounds.low <= value <= bounds.high
            and bounds.above < value < bounds.below
            and (bounds.multiple is None or value % bounds.multiple == 0)
        )
    if kind in (str, Path):
        fits = isinstance(value, str) and bounds.least <= len(value) <= bounds.most
        return fits and (bounds.pattern is None or re.search(bounds.pattern, value) is not None)
    if is_model(kind):
        return isinstance(value, dict) and fits_model(kind, value)
    if is_list(kind):
        return isinstance(value, list) and bounds.least <= len(value) <= bounds.most and fits_list(kind, value)
    if is_table(kind):
        key, inner = get_args(kind)
        fits = isinstance(value, dict) and bounds.least <= len(value)
        return fits and all(accepts(key, k) and accepts(inner, v) for k, v in value.items())
    raise NotImplementedError(f"{kind}: say here what is inside and what is outside of it")


def is_number(kind: Kind, value: Value) -> bool:
    numbers = int if kind is int else int | float
    return (
        isinstance(value, numbers) and not isinstance(value, bool) and math.isfinite(value) and abs(value) <= MAX_NUMBER
    )


def bounded(value: Value) -> bool:
    """Free options: whatever they are, their numbers are bounded."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (not isinstance(value, int | float) or is_number(float, value + 0)) and all(map(bounded, inner))


def finite(value: Value) -> bool:
    """Whether no number in it is nan or infinite, as JSON wants it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (not isinstance(value, float) or math.isfinite(value)) and all(map(finite, inner))


def fits_model(model: Model, value: dict[str, Value]) -> bool:
    fields = model.model_fields
    return value.keys() <= fields.keys() and all(
        accepts(field.annotation, value[name], field.metadata) if name in value else not field.is_required()
        for name, field in fields.items()
    )


def fits_list(kind: Kind, value: list[Value]) -> bool:
    inner = get_args(kind)
    if get_origin(kind) is tuple and inner[-1] is not Ellipsis:
        return len(value) == len(inner) and all(map(accepts, inner, value))
    return all(accepts(inner[0], each) for each in value)


def fine(kind: Kind, metadata: Sequence[object] = ()) -> Value:
    """The plainest value of a type."""
    kind, bounds, metadata = split(kind, metadata)
    kind = members(kind)[0]
    if is_model(kind):
        return minimal(kind)
    if is_list(kind):
        inner = [each for each in get_args(kind) if each is not Ellipsis]
        fixed = get_origin(kind) is tuple and Ellipsis not in get_args(kind)
        return [fine(each) for each in inner] if fixed else [fine(inner[0])] * max(1, bounds.least)
    if is_table(kind):
        return {fine(get_args(kind)[0]): fine(get_args(kind)[1])}
    if get_origin(kind) is Literal:
        return get_args(kind)[0]
    known = (1, 0.5, bounds.low, bounds.multiple, "word", True, None)
    return next(value for value in known if accepts(kind, value, metadata))


def minimal(model: Model) -> dict[str, Value]:
    """The required fields of a model, and the kind that tells it from others."""
    needed = {name: f for name, f in model.model_fields.items() if f.is_required() or name == "kind"}
    return {name: fine(f.annotation, f.metadata) for name, f in needed.items()}


# --- what is outside ---


@dataclass(frozen=True)
class Outside:
    """A value that is not of a type, or beyond its bounds."""

    value: Value
    names: Keys = ()
    """The keys in it that lead to the fault; none: it is the value itself."""
    common: bool = False
    """Whether it is one that most types refuse, from ``POOL``."""
    owner: str | None = None
    """The model and field inside it that it is wrong for; None: the one that it stands in."""

    def inside(self, value: Value, *names: str) -> Outside:
        """A larger value that holds it."""
        return Outside(value, (*names, *self.names), self.common, self.owner)


def thinned(cases: Iterable[Wrong], every: int) -> list[Wrong]:
    """What lies at a bound, and every so many of what most types refuse."""
    common = count()
    return [case for case in cases if not case.common or next(common) % every == 0]


def wrong_fields(
    model: Model, path: tuple[str, ...] = (), beside: Mapping[tuple[str, ...], Value] | None = None
) -> Iterator[Wrong]:
    """Every field of a model and of the sections in it with what it must refuse, and every unknown key."""
    required = {(*path, name): value for name, value in minimal(model).items()}
    beside = {**(beside or {}), **required}
    for name, field in model.model_fields.items():
        here, owner = (*path, name), f"{model.__name__}.{name}"
        kept = {key: value for key, value in beside.items() if key[: len(here)] != here}
        for found in outside(field.annotation, field.metadata):
            yield Wrong(
                here, found.value, found.names or (name,), kept, found.owner or owner, found.common, field.annotation
            )
        for section in filter(is_model, members(field.annotation)):
            yield from wrong_fields(section, here, kept)
        if (unknown := near_miss(name, model.model_fields)) is not None:
            yield Wrong((*path, unknown), 7, (unknown,), beside, owner, False, Any)


def outside(kind: Kind, metadata: Sequence[object] = ()) -> Iterator[Outside]:
    """What is not of a type or beyond its bounds, each value once."""
    seen: set[str] = set()
    for found in (*edges(kind, metadata), *(Outside(value, common=True) for value in POOL)):
        if repr(found.value) not in seen and not accepts(kind, found.value, metadata):
            seen.add(repr(found.value))
            yield found


def edges(kind: Kind, metadata: Sequence[object] = ()) -> Iterator[Outside]:
    """What lies just beyond the bounds of a type, or of a part of it."""
    kind, _, metadata = split(kind, metadata)
    for member in members(kind):
        member, own, _ = split(member, metadata)
        if get_origin(member) is Literal:
            names = [str(name) for name in get_args(member)]
            yield from (Outside(found) for name in names for found in (near_miss(name), name.upper()) if found)
        elif member in (int, float):
            yield from map(Outside, (*beyond(member, own), math.nan, math.inf, 10**30))
        elif member in (str, Path):
            yield from (Outside("x" * n) for n in (own.least - 1, own.most + 1) if 0 <= n < 10**6)
            yield from (Outside(f"{mark}word{mark}") for mark in " /.-\n")
        elif is_list(member):
            yield from edges_of_list(member)
        elif is_table(member):
            key, inner = get_args(member)
            yield from (found.inside({fine(key): found.value}) for found in parts_outside(inner))
            keys = (found.value for found in outside(key) if isinstance(found.value, str | int))
            yield from (Outside({wrong: fine(inner)}, common=True) for wrong in keys)


def edges_of_list(kind: Kind) -> Iterator[Outside]:
    whole = fine(kind)
    inner = [each for each in get_args(kind) if each is not Ellipsis]
    fixed = get_origin(kind) is tuple and Ellipsis not in get_args(kind)
    yield from map(Outside, [whole[:-1], [*whole, whole[-1]]] if fixed else [[]])
    for number, part in enumerate(inner):
        for found in parts_outside(part):
            yield found.inside([*whole[:number], found.value, *whole[number + 1 :]])


def parts_outside(kind: Kind) -> Iterator[Outside]:
    """What is outside of the type of a part, sections included."""
    yield from outside(kind)
    kind, _, _ = split(kind)
    for section in filter(is_model, members(kind)):
        for found in wrong_fields(section):
            yield Outside(placed(found), (*found.path[:-1], *found.names), found.common, found.owner)


def beyond(kind: Kind, bounds: Bounds) -> Iterator[float]:
    step: Callable[[float, float], float] = (lambda x, way: x + way) if kind is int else nearest_float
    edge = [bounds.above, bounds.below, step(bounds.low, -1), step(bounds.high, 1)]
    if bounds.multiple is not None:
        edge.append(max(bounds.low, 0) + bounds.multiple + 1)
    yield from (kind(number) for number in edge if abs(number) < MAX_NUMBER)


def nearest_float(x: float, way: float) -> float:
    return x + way * max(abs(x), 1) * 1e-6


def near_miss(name: str, known: Sequence[str] | Mapping[str, object] = ()) -> str | None:
    """The name with two letters exchanged, where that is another one."""
    for i in range(len(name) - 1):
        found = name[:i] + name[i + 1] + name[i] + name[i + 2 :]
        if found != name and found not in known:
            return found
    return None


def placed(wrong: Wrong, root: Value = None) -> dict[str, Value]:
    """``root`` with a wrong value in it, and what its sections need."""
    tree = json.loads(json.dumps(root or {}))
    for path, value in (*wrong.beside.items(), (wrong.path, wrong.value)):
        node = tree
        for key in path[:-1]:
            if not isinstance(node.get(key), dict):
                node[key] = {}
            node = node[key]
        if path == wrong.path or path[-1] not in node:
            node[path[-1]] = value
    return tree


# --- texts and bytes ---


def yaml_text(value: Value) -> str:
    """YAML 1.2 of one line, in which every kind of value keeps its type."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"? {yaml_text(k)} : {yaml_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    return json.dumps(value)


def damages(content: bytes, others: Mapping[str, bytes]) -> dict[str, bytes]:
    """What a file of this content may have become; ``others``: files of other kinds."""
    noise = random.Random(len(content)).randbytes(max(64, min(len(content), 4096)))
    found = {
        "nothing": b"",
        "its first half": content[: len(content) // 2],
        "zeros": bytes(max(64, min(len(content), 4096))),
        "noise": noise,
        "noise at its start": noise[:64] + content[64:],
        **{f"a {name}": other for name, other in others.items()},
    }
    return {name: damaged for name, damaged in found.items() if damaged != content}
