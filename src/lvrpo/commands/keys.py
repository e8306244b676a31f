"""CONFIG and its keys, checked before torch and the training code are imported: a typing error is answered at once.

``assets/keys.json`` holds the keys of the configuration classes; it is made by ``docs/make_keys.py``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from pydantic import Field, create_model

from lvrpo.config import Config, default_kind, read_tree, require_known_keys, shipped_configs
from lvrpo.config_sections import KIND
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
