"""CONFIG -> a validated configuration: a YAML file, or the name of one that lvrpo ships."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TypeVar

from lvrpo.config import Config, load_config, read_tree
from lvrpo.errors import InputError

C = TypeVar("C", bound=Config)


def shipped_configs() -> dict[str, Path]:
    """The configurations that lvrpo ships, by name."""
    folder = Path(str(resources.files("lvrpo"))) / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file of CONFIG."""
    shipped = shipped_configs()
    path = Path(name)
    if path.is_file() or (name not in shipped and path.suffix in (".yaml", ".yml")):
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
    """The configuration, checked."""
    if name is None:
        raise InputError(f"CONFIG is missing: give a YAML file, or one of {', '.join(shipped_configs())}")
    path = find_config(name)
    refuse_other_kind(cls, name, path)
    return load_config(cls, path, overrides)


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
    keys = read_tree(path)
    for other, (words, command) in others.items():
        foreign = [key for key in keys if key in other.model_fields and key not in cls.model_fields]
        if foreign and not any(key in cls.model_fields and key not in other.model_fields for key in keys):
            raise InputError(
                f"config {name!r}: is {words} configuration (it has a section {foreign[0]!r}): start it with "
                f"lvrpo {command} {name}"
            )
