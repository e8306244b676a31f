"""CONFIG -> a validated configuration: a YAML file, or the name of one that lvrpo ships."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lvrpo.config import CONSENT, Config, load_config, shipped_configs
from lvrpo.errors import InputError
from lvrpo.registry import allow_code

C = TypeVar("C", bound=Config)
MANIFEST = "manifest.json"
"""Of a run directory."""


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
        raise InputError(f"config {name!r}: an override stands where CONFIG belongs: name a YAML file before it")
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"config {name!r}: no such file: {hint}give a YAML file, or one of {', '.join(shipped)}")


def read_config(cls: type[C], name: str | None, overrides: Sequence[str]) -> C:
    """The configuration, checked; what it allows is allowed from now on, unless the file lies in a run."""
    if name is None:
        raise InputError(f"CONFIG is missing: give a YAML file, or one of {', '.join(shipped_configs())}")
    path = find_config(name)
    config = load_config(cls, path, overrides, own_file=not (path.parent / MANIFEST).exists())
    allow_code(getattr(config, CONSENT, ()))  # only an alignment has it
    return config
