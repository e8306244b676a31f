"""A policy of our own as a folder: config.json, model.safetensors and the tokenizer."""

from __future__ import annotations

import json
from abc import abstractmethod
from pathlib import Path
from typing import Self

import torch

from lvrpo.atomic_io import read_weights, write_tensors, write_whole
from lvrpo.errors import InputError
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.reading import read_json_object


class FolderPolicy(MoTPolicy):
    """The core with the layout that lvrpo saves by itself."""

    def save_whole(self, folder: Path) -> None:
        """Writes config.json, model.safetensors and the tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", state, {"format": "pt"})
        config = {"model_type": self.model_type, **self._config_dict()}
        write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        self.words.save(folder)

    @abstractmethod
    def _config_dict(self) -> dict[str, object]:
        """What config.json holds beside the model type."""

    @classmethod
    @abstractmethod
    def _from_folder(cls, folder: Path, config: dict[str, object]) -> Self:
        """A policy of the saved configuration with the folder's tokenizer, no weights loaded; raises InputError."""

    @classmethod
    def picture_side(cls, folder: Path) -> int | None:
        """Side of the square pictures that a saved policy reads, from its config.json; None where that says nothing."""
        try:
            side = read_json_object(folder / "config.json").get("image_size")
        except InputError:
            return None  # loading says what is wrong
        return side if type(side) is int else None

    @classmethod
    def skeleton(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """As ``MoTPolicy.skeleton``; the dtype is float32."""
        if dtype not in (None, torch.float32):
            raise InputError(f"dtype={str(dtype).removeprefix('torch.')}: {folder} computes in float32: leave it out")
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            if not (folder / name).is_file():
                raise InputError(f"{folder}: holds no {name}: give a folder that lvrpo saved")
        config = read_json_object(folder / "config.json")
        found = config.pop("model_type", None)
        if found != cls.model_type:
            raise InputError(f"{folder}: holds a model of type {found!r}, not {cls.model_type!r}: give another folder")
        return cls._from_folder(folder, config)

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads what ``save`` wrote; the dtype is float32."""
        policy = cls.skeleton(folder, device, dtype)
        state, _ = read_weights(folder / "model.safetensors", "restore the file")
        own = policy.state_dict()
        wrong = sorted(set(own) ^ set(state) | {k for k in set(own) & set(state) if own[k].shape != state[k].shape})
        if wrong:
            raise InputError(f"{folder}: weights do not fit config.json at {wrong[0]}: use the two files of one model")
        policy.load_state_dict(state)
        return policy.to(device)
