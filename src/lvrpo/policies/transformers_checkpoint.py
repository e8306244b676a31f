"""Weights and config.json of a model of transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lvrpo.atomic_io import require_finite, write_atomic, write_tensors
from lvrpo.errors import InputError
from lvrpo.policies.safetensors_reader import find_tensors
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.reading import read_json_object

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def read_config(folder: Path, what: str) -> Any:
    """The configuration of transformers in a folder's config.json; raises InputError, one line. Any: optional package.

    ``what``: a name for messages, such as a Janus.
    """
    transformers = transformers_library(what)
    found = read_json_object(folder / CONFIG)
    try:
        with quiet_loading(transformers):
            return transformers.CONFIG_MAPPING[found["model_type"]].from_dict(found)
    except Exception as error:  # transformers checks its fields in many ways
        raise InputError(f"{folder / CONFIG}: {line_of(error)}: restore the file") from None


def load_model(folder: Path, dtype: torch.dtype, what: str, kind: str | None = None, *, weights: bool = True) -> Any:
    """The image-text-to-text model of a folder, on the CPU. Any: of an optional package.

    ``what``: as in ``read_config``; ``kind``: the model type that the folder must have. Without ``weights``, from
    config.json alone: parameters are on the meta device. Runs no code of the folder. Raises InputError, one line, for
    what is missing, damaged, of other shapes or not finite.
    """
    found = read_json_object(folder / CONFIG).get("model_type")
    if kind not in (None, found):
        raise InputError(f"{folder}: holds a model of type {found!r}, not {kind!r}: give another one")
    transformers, config = transformers_library(what), read_config(folder, what)
    if not weights:
        return _empty_model(folder, config, dtype)
    find_tensors(folder, ("model",), f"the weights of {what}")  # refuses damaged files
    try:
        with quiet_loading(transformers):
            model, report = transformers.AutoModelForImageTextToText.from_pretrained(
                str(folder),
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        raise InputError(f"{folder}: cannot be loaded ({line_of(error)}): restore the folder") from None
    for name, stored, own in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{folder}: {name} has shape {list(stored)}, {CONFIG} says {list(own)}: use the files of one model"
        )
    if missing := sorted(report["missing_keys"]):
        raise InputError(f"{folder}: its weights lack {missing[0]} ({len(missing)} are missing): restore the folder")
    for name, tensor in model.state_dict().items():
        require_finite(folder, name, tensor, "fetch the files again")
    return model


def _empty_model(folder: Path, config: Any, dtype: torch.dtype) -> Any:
    """Any: of an optional package."""
    transformers = transformers_library("a model")
    try:
        with quiet_loading(transformers), torch.device("meta"):
            return transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    except Exception as error:  # models of transformers check their sizes in many ways
        raise InputError(f"{folder / CONFIG}: {line_of(error)}: restore the file") from None


IMAGE_SIZES = (
    ("patch_size", "patch_size"),
    ("merge_size", "spatial_merge_size"),
    ("temporal_patch_size", "temporal_patch_size"),
)
"""Numbers of a processor of images, and of the vision encoder that they must equal."""


def require_same_images(folder: Path, processor: Any, config: Any) -> None:
    """Raises InputError where a processor reads no images, or makes other tokens of one than the model has features.

    Any: a processor and a configuration of an optional package; not all have these numbers.
    """
    vision, images = getattr(config, "vision_config", None), getattr(processor, "image_processor", None)
    if images is None:
        raise InputError(f"{folder}: a {type(processor).__name__} reads no images: use the model's own processor")
    pairs = [(own, getattr(images, own, None), getattr(vision, other, None)) for own, other in IMAGE_SIZES]
    known = getattr(config, "image_token_id", None)
    if known not in _image_tokens(processor):
        pairs.append(("image_token_id", getattr(processor, "image_token_id", None), known))
    for name, own, other in pairs:
        if isinstance(own, int) and isinstance(other, int) and own != other:
            raise InputError(
                f"{folder}: its processor has {name}={own}, config.json says {other}: use one model's files"
            )


def _image_tokens(processor: Any) -> set[Any]:
    """Ids that may stand for features of an image. A Gemma 3 or a Llama 4 writes one token and puts others there.

    Any: ids, and a processor of an optional package; not all have these names.
    """
    tokenizer, patch = processor.tokenizer, getattr(processor, "img_patch_token", None)
    own = {getattr(processor, "image_token_id", None), getattr(tokenizer, "image_token_id", None)}
    return own if patch is None else {*own, tokenizer.convert_tokens_to_ids(patch)}


def save_model(model: Any, folder: Path) -> None:
    """Writes config.json and the weights, at the dtype and under the published names that they were loaded with.

    Any: of an optional package.
    """
    from transformers.core_model_loading import revert_weight_conversion

    folder.mkdir(parents=True, exist_ok=True)
    state: dict[str, torch.Tensor] = {}
    known: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in known:  # the head may share the embedding's weight
            known.add(id(tensor))
            state[name] = tensor.detach()
    stored = {name: tensor.cpu().contiguous() for name, tensor in revert_weight_conversion(model, state).items()}
    write_tensors(folder / WEIGHTS, stored, {"format": "pt"})
    config = model.config.to_diff_dict()
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(model.dtype).removeprefix("torch.")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if config.get("tie_word_embeddings") and head.weight is not table.weight:  # an adapter of the head was merged
        config["tie_word_embeddings"] = False
    write_atomic(folder / CONFIG, json_bytes(config))


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """An object as a file. Any: what JSON may hold."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def line_of(error: Exception) -> str:
    """The message of an error of transformers in one line."""
    return " ".join(str(error).split())[:200]
