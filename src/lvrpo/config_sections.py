"""The sections of a configuration class: which models are at a path of keys, and which kinds a tagged union has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast, get_args

from pydantic import BaseModel

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
