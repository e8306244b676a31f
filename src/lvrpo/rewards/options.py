"""The options of a reward, held to the types of its signature before it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, get_type_hints

from pydantic import Field, create_model

from lvrpo.config import Config, parse_section

Count = Annotated[int, Field(ge=1, le=100_000)]
"""Of draws, samples, tokens: one or more."""
Natural = Annotated[int, Field(ge=0, le=100_000)]
"""None or more."""
Amount = Annotated[float, Field(ge=0)]
Size = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Below1 = Annotated[float, Field(ge=0, lt=1)]
"""A share that is not everything."""


def option_names(made: Callable[..., Any]) -> list[str]:
    """The options of a reward that its signature names; none where it takes anything."""
    parameters = inspect.signature(made).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def require_options(cls: type, options: Mapping[str, Any], where: str) -> None:
    """Raises InputError that begins with ``where`` for an option that is unknown, missing or of another type.

    ``cls``: a reward of lvrpo, whose signature is annotated. Any: whatever YAML may hold.
    """
    parse_section(_model(cls), options, where)


@cache
def _model(cls: type) -> type[Config]:
    kinds = get_type_hints(cls.__init__, include_extras=True)
    parameters = inspect.signature(cls).parameters.values()
    fields: dict[str, Any] = {p.name: (kinds[p.name], ... if p.default is p.empty else p.default) for p in parameters}
    return create_model(f"{cls.__name__}Options", __base__=Config, **fields)
