"""Folders of pipelines: the parts named in model_index.json, classes of diffusers and transformers alone."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lvrpo.atomic_io import require_finite, write_atomic, write_tensors
from lvrpo.errors import InputError, optional_package
from lvrpo.policies.diffusers_flow import INDEX, PIPELINES, require_supported
from lvrpo.policies.diffusers_flow.pipelines import TRAINED, FlowPipeline
from lvrpo.policies.safetensors_reader import find_tensors
from lvrpo.policies.transformers_checkpoint import line_of
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.reading import read_json_object
from lvrpo.registry import resolve

WEIGHTS = "diffusion_pytorch_model"
"""Stem of the files of a model of diffusers."""
SCHEDULER = "FlowMatchEulerDiscreteScheduler"
"""The class of scheduler whose sigmas are the times of a rectified flow."""
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("tokenizer.model",))
"""Files of a tokenizer: one of these sets. Without them, transformers makes one that knows no words."""
COPIED = (".json", ".txt", ".model", ".safetensors", ".jinja")
"""Endings of the files of a frozen part."""


def load_pipeline(
    folder: Path, device: torch.device, dtype: torch.dtype | None, *, weights: bool = True
) -> FlowPipeline:
    """The pipeline of a folder, on the device; without ``weights``, its parameters are on the meta device.

    Raises InputError, one line.
    """
    with quiet_diffusers():  # parts of diffusers are imported when they are first asked for
        return _load_pipeline(folder, device, dtype, weights)


def _load_pipeline(folder: Path, device: torch.device, dtype: torch.dtype | None, weights: bool) -> FlowPipeline:
    name = require_supported(folder)
    adapter: type[FlowPipeline] = resolve("pipeline", name, PIPELINES)
    diffusers = diffusers_library()
    index = read_json_object(folder / INDEX)
    on_cpu = device.type == "cpu"
    low = torch.float32 if on_cpu else torch.bfloat16
    parts: dict[str, Any] = {}
    for part in (TRAINED, *adapter.components):
        cls = adapter.part_class(part, _part_class(folder, index, part, part in adapter.optional))
        if part == TRAINED and cls.__name__ != adapter.transformer_class:
            raise InputError(
                f"{folder / INDEX}: {part} is a {cls.__name__}, a {name} has a {adapter.transformer_class}: restore it"
            )
        wanted = (dtype or low) if part == TRAINED else torch.float32 if part == "vae" else low
        parts[part] = None if cls is None else _load_part(folder / part, cls, wanted, weights)
        if isinstance(parts[part], nn.Module):
            parts[part].requires_grad_(part == TRAINED).eval()
            if weights:
                parts[part].to(device)
    try:
        pipe = getattr(diffusers, name)(**parts)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}: its parts do not fit together ({line_of(error)}): restore the folder") from None
    return adapter(pipe, folder)


def _part_class(folder: Path, index: dict[str, Any], part: str, optional: bool) -> Any:
    """The class of a part; None where it is absent and may be. Any: of an optional package."""
    entry = index.get(part)
    if optional and (entry is None or entry == [None, None]):
        return None
    if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)):
        raise InputError(f"{folder / INDEX}: {part} is {entry!r}, not [library, class]: restore the file")
    library, name = entry
    if part == "scheduler" and name != SCHEDULER:
        raise InputError(f"{folder / INDEX}: scheduler {name}: lvrpo samples by the sigmas of {SCHEDULER}: name that")
    packages = {"diffusers": diffusers_library, "transformers": lambda: transformers_library("a text encoder")}
    cls = getattr(packages[library](), name, None) if library in packages and not name.startswith("_") else None
    if not hasattr(cls, "from_pretrained"):
        raise InputError(
            f"{folder / INDEX}: {part} is {library}.{name}: only classes of diffusers and transformers are loaded, and "
            "no code of a folder: use another pipeline"
        )
    return cls


def empty_part(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A model of diffusers or transformers as the json files of its folder describe it, on the meta device.

    Any: a class, and an object, of an optional package.
    """
    if cls.__module__.startswith("diffusers."):
        config = cls.load_config(str(folder), local_files_only=True)
        with torch.device("meta"):
            return cls.from_config(config).to(dtype)
    config = cls.config_class.from_pretrained(str(folder), local_files_only=True)
    with torch.device("meta"):
        return cls(config).to(dtype)


def _load_part(folder: Path, cls: Any, dtype: torch.dtype, weights: bool) -> Any:
    """One part of a pipeline on the CPU, or without ``weights`` on the meta device.

    Any: a class, and an object, of an optional package.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: fetch the whole pipeline")
    if folder.name.startswith(("tokenizer", "processor")):
        if not any(all((folder / name).is_file() for name in names) for names in VOCABULARIES):
            raise InputError(f"{folder}: holds no tokenizer.json, nor vocab.json and merges.txt: fetch the files again")
        if not (folder / "tokenizer_config.json").is_file():
            raise InputError(f"{folder}: holds no tokenizer_config.json: fetch the files again")
    options: dict[str, Any] = {}
    read = cls.from_pretrained
    is_model = issubclass(cls, nn.Module)
    if is_model and weights:
        stem = WEIGHTS if cls.__module__.startswith("diffusers.") else "model"
        find_tensors(folder, (stem,), "its weights")  # headers: a file that is cut off, or numbers that are no weights
        name = "torch_dtype" if stem == WEIGHTS else "dtype"
        options = {name: dtype, "use_safetensors": True, "output_loading_info": True}
    try:
        if is_model and not weights:
            return empty_part(cls, folder, dtype)
        found = read(str(folder), local_files_only=True, **options)
    except Exception as error:  # both libraries raise many kinds, of many packages
        raise InputError(f"{folder}: cannot be loaded ({line_of(error)}): restore the folder") from None
    if not is_model:
        return found
    model, report = found
    wrong = [*report["missing_keys"], *report["mismatched_keys"]]
    if wrong:
        raise InputError(f"{folder}: {sorted(map(str, wrong))[0]} is missing or of another shape: restore the folder")
    for name, tensor in model.state_dict().items():
        require_finite(folder, name, tensor, "fetch the files again")
    return model


def save_pipeline(transformer: Any, pipeline: FlowPipeline, folder: Path) -> None:
    """Writes the transformer at its dtype; the frozen parts are hard links to the files that were loaded, or copies.

    Any: of an optional package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in pipeline.components:
        source = pipeline.folder / part
        for file in sorted(source.iterdir()) if source.is_dir() else ():
            if file.suffix in COPIED:
                (folder / part).mkdir(exist_ok=True)
                link_file(file, folder / part / file.name)
    link_file(pipeline.folder / INDEX, folder / INDEX)
    save_transformer(transformer, folder)


def save_transformer(transformer: Any, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes the transformer of a pipeline below the folder. ``dtype``: None: its own. Any: of an optional package."""
    target = folder / TRAINED
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads(transformer.to_json_string())
    config.pop("_name_or_path", None)  # a folder of this machine
    write_atomic(target / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    state = {name: tensor.detach().to(dtype or tensor.dtype) for name, tensor in transformer.state_dict().items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    write_tensors(target / f"{WEIGHTS}.safetensors", tensors, {"format": "pt"})


def link_file(source: Path, target: Path) -> None:
    """A hard link to a file, or a copy where the file system has none; a file of the Hub's cache is itself a link."""
    try:
        source = source.resolve(strict=True)
    except OSError:
        raise InputError(f"{source}: is gone: the frozen parts of a model stay in its folder: restore it") from None
    if target.exists() and target.samefile(source):
        return
    target.unlink(missing_ok=True)
    with suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)


def diffusers_library() -> Any:
    """The package. Any: it is optional."""
    with warnings.catch_warnings(), _quiet_logs():
        warnings.simplefilter("ignore")
        return optional_package("diffusers", "a pipeline of diffusers needs diffusers", "diffusers")


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Suppresses progress bars, logs below errors, and warnings of both libraries."""
    with quiet_loading(diffusers_library()), quiet_loading(transformers_library("a text encoder")), _quiet_logs():
        yield


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Silences messages of diffusers about missing optional packages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
