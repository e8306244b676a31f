"""Ways to damage the folder of a model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from refusals import refused
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def cut_off(folder: Path, name: str = WEIGHTS) -> None:
    weights = (folder / name).read_bytes()
    (folder / name).write_bytes(weights[: len(weights) // 2])


def change_weights(change: Callable[[dict[str, torch.Tensor]], object], name: str = WEIGHTS) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / name)
        change(state)
        save_file(state, folder / name, {"format": "pt"})

    return damage


def change_json(name: str, **fields: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return damage


def delete(name: str) -> Callable[[Path], None]:
    """Of a file or a folder."""
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def pickle_instead(name: str) -> Callable[[Path], None]:
    """The file of weights has the name of a pickle."""
    return lambda folder: (folder / name).rename(folder / Path(name).with_name("pytorch_model.bin")) and None


def require_refused(folder: Path, damage: Callable[[Path], object], words: str, use: Callable[[str], object]) -> None:
    """A copy of a folder is refused once it is damaged: one line that names it and holds these words."""
    shutil.copytree(folder, "bad")
    damage(Path("bad"))
    with refused(words, "bad"):
        use("bad")
