"""Janus's weights and config.json, in the layout of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lvrpo.atomic_io import require_finite, write_atomic, write_tensors
from lvrpo.errors import InputError
from lvrpo.policies.bagel.checkpoint import StoredTensor, find_tensors
from lvrpo.policies.janus.processor import json_bytes
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.reading import read_json_object

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def load_model(folder: Path, dtype: torch.dtype) -> Any:
    """The JanusForConditionalGeneration of a folder, on the CPU. Any: of an optional package.

    Raises InputError, one line, for what is missing, damaged, of other shapes or not finite.
    """
    transformers = transformers_library("a Janus")
    found = read_json_object(folder / CONFIG)
    if found.get("model_type") != "janus":
        raise InputError(f"{folder}: holds a model of type {found.get('model_type')!r}, not 'janus': give another one")
    try:
        with quiet_loading(transformers), torch.device("meta"):
            shapes = transformers.JanusForConditionalGeneration(transformers.JanusConfig.from_dict(found)).state_dict()
    except Exception as error:  # transformers checks its fields in many ways
        raise InputError(f"{folder / CONFIG}: {_line(error)}: restore the file") from None
    _require_shapes(folder, shapes, find_tensors(folder, ("model",), "the weights of a Janus"))
    try:
        with quiet_loading(transformers):
            model, report = transformers.JanusForConditionalGeneration.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise InputError(f"{folder}: cannot be loaded ({_line(error)}): restore the folder") from None
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{folder}: its weights lack {missing[0]} ({len(missing)} are missing): restore the folder")
    for name, tensor in model.state_dict().items():
        require_finite(folder, name, tensor, "fetch the files again")
    return model


def _require_shapes(folder: Path, shapes: dict[str, torch.Tensor], stored: dict[str, StoredTensor]) -> None:
    for name, tensor in stored.items():
        if name in shapes and tensor.shape != tuple(shapes[name].shape):
            raise InputError(
                f"{tensor.path}: {name} has shape {list(tensor.shape)}, {folder / CONFIG} says "
                f"{list(shapes[name].shape)}: use the files of one model"
            )
    if not stored.keys() & shapes.keys():
        raise InputError(f"{folder}: holds the weights of another model: use the files of a Janus of transformers")


def save_model(model: Any, folder: Path) -> None:
    """Writes config.json and the weights, at the dtype that they have. Any: of an optional package."""
    state: dict[str, torch.Tensor] = {}
    known: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:  # lm_head may share the embedding's weight
            known.add(id(tensor))
            state[name] = tensor.detach().cpu().contiguous()
    write_tensors(folder / WEIGHTS, state, {"format": "pt"})
    config = model.config.to_diff_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
    write_atomic(folder / CONFIG, json_bytes(config))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
