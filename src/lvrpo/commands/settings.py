"""CONFIG -> a validated configuration: a YAML file, or the name of one that lvrpo ships."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from lvrpo.config import CONSENT, Config, load_config, read_tree, shipped_configs
from lvrpo.errors import InputError
from lvrpo.reading import is_there
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
    refuse_other_kind(cls, name, path)
    config = load_config(cls, path, overrides, own_file=not is_there(path.parent / MANIFEST))
    allow_code(getattr(config, CONSENT, ()))  # only an alignment has it
    return config


def refuse_other_kind(cls: type[Config], name: str, path: Path) -> None:
    """Raises InputError for a configuration of the other kind of run: it has sections that only those have."""
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.pretrain import PretrainConfig

    kinds: dict[type[Config], tuple[str, str]] = {
        TrainConfig: ("an alignment", "train"),
        PretrainConfig: ("a pretraining", "pretrain"),
    }
    others = {kind: words for kind, words in kinds.items() if kind is not cls}
    if cls not in kinds:
        return
    keys = read_tree(path, cls)
    for other, (words, command) in others.items():
        foreign = [key for key in keys if key in other.model_fields and key not in cls.model_fields]
        if foreign and not any(key in cls.model_fields and key not in other.model_fields for key in keys):
            raise InputError(
                f"config {name!r}: is {words} configuration (it has a section {foreign[0]!r}): start it with "
                f"lvrpo {command} {name}"
            )
