"""Files of a model with MAGVIT-v2 beside it: where its parts are, and tensors that fit the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from lvrpo.atomic_io import require_finite, write_atomic, write_tensors
from lvrpo.config import Config, parse_section
from lvrpo.errors import InputError
from lvrpo.policies.loading import cached_folder
from lvrpo.policies.magvit.autoencoder import Magvit, MagvitConfig
from lvrpo.policies.safetensors_reader import find_tensors
from lvrpo.policies.transformers_checkpoint import json_bytes, line_of
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.reading import read_json_object

C = TypeVar("C", bound=Config)

CONFIG, WEIGHTS = "config.json", "pytorch_model"
STEMS = (WEIGHTS, "model", "diffusion_pytorch_model")
"""Names of a file of weights, without .safetensors."""
COMPUTED = re.compile(r"inv_freq$|^quantize\.")
"""Buffers in files, which follow from the sizes."""
AUTOENCODER = "magvitv2"
"""Folder of the autoencoder in that of a model."""
AUTOENCODER_ID = "showlab/magvitv2"
"""Hub id of the autoencoder, for folders that hold none."""


def read_settings(kind: type[C], stored: Mapping[str, Any], path: Path) -> C:
    """The fields of a file that are used. Any: decoded JSON."""
    return parse_section(kind, {name: stored[name] for name in kind.model_fields if name in stored}, path)


def find_part(folder: Path, name: str, source: str, field: str) -> Path:
    """The folder of a part: inside that of the model, where the configuration says, or in the local Hub cache."""
    if (folder / name).is_dir():
        return folder / name
    if Path(source).is_dir():
        return Path(source)
    try:
        return cached_folder(source)
    except InputError:
        raise InputError(
            f"{folder}: holds no folder {name}, and its {field} {source} is not in the local Hub cache: run "
            f"`hf download {source}`, or copy it to {folder / name}"
        ) from None


def load_weights(
    folder: Path, model: torch.nn.Module, names: Mapping[str, str], dtype: torch.dtype, what: str, weights: bool
) -> None:
    """Gives a module without storage the weights of a folder. ``names``: those in the files, by the module's own.

    ``what``: the kind of model, in messages. Without ``weights`` nothing is read: parameters of the dtype stay on the
    meta device. Raises InputError, one line, unless the folder holds exactly these.
    """
    if not weights:
        model.load_state_dict({n: tensor.to(dtype) for n, tensor in model.state_dict().items()}, assign=True)
        return
    role = f"the weights of {what}"
    _require_safetensors(folder, role)
    found = find_tensors(folder, STEMS, role)
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name in names}
    shapes = {names[name]: shape for name, shape in own.items()}
    require_fit(folder, shapes, {name: tensor.shape for name, tensor in found.items()}, what)
    state = {name: found[names[name]].read(dtype) for name in own}
    model.load_state_dict(state, assign=True, strict=False)


def load_autoencoder(folder: Path, codebook_size: int, weights: bool) -> Magvit:
    """MAGVIT-v2 of a model's folder, of its configuration or of the Hub cache, float32; see ``load_weights``."""
    part = find_part(folder, AUTOENCODER, AUTOENCODER_ID, "autoencoder")
    path = part / CONFIG
    sizes = read_settings(MagvitConfig, read_json_object(path), path)
    if sizes.codes != codebook_size:
        raise InputError(f"{path}: has {sizes.codes} codes, codebook_size={codebook_size}: use one model's files")
    with torch.device("meta"):
        magvit = Magvit(sizes)
    names = {name: name for name in magvit.state_dict()}
    load_weights(part, magvit, names, torch.float32, "MAGVIT-v2", weights)
    return magvit


def empty_causal_lm(kind: str, values: Mapping[str, Any], path: Path, what: str) -> Any:
    """The language model of a kind of transformers, such as Llama, without storage. Any: of an optional package.

    ``values``: of its configuration, read from ``path``; ``what``: a name for messages. Raises InputError, one line.
    """
    transformers = transformers_library(what)
    try:
        with quiet_loading(transformers):
            config = getattr(transformers, f"{kind}Config").from_dict(dict(values))
            with torch.device("meta"):
                model = getattr(transformers, f"{kind}ForCausalLM")(config)
            model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no file
    except Exception as error:  # transformers checks its fields in many ways
        raise InputError(f"{path}: {line_of(error)}: restore the file") from None
    return model


def save_weights(state: Mapping[str, torch.Tensor], file: Path) -> None:
    """Writes tensors under the names of the files; raises InputError for values that are not finite."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    for name, tensor in stored.items():
        require_finite(file.parent, name, tensor, "resume from an earlier checkpoint")
    write_tensors(file, stored, {"format": "pt"})


def save_autoencoder(magvit: Magvit, folder: Path) -> None:
    """Writes the folder of MAGVIT-v2 into that of a model."""
    part = folder / AUTOENCODER
    part.mkdir(exist_ok=True)
    codes = {name: tensor.detach().cpu().contiguous() for name, tensor in magvit.state_dict().items()}
    bits = torch.arange(magvit.config.z_channels - 1, -1, -1)
    signs = (torch.arange(magvit.config.codes)[:, None] >> bits) & 1
    codes |= {"quantize.embedding": signs.float() * 2 - 1, "quantize.power_vals": 2**bits}  # its makers' buffers
    write_tensors(part / f"{WEIGHTS}.safetensors", codes, {"format": "pt"})
    own = magvit.config.model_dump(exclude_defaults=True, mode="json")
    write_atomic(part / CONFIG, json_bytes({"_class_name": "MAGVITv2", **own}))


def require_square(num_vq_tokens: int) -> None:
    """Raises ValueError for a number of image tokens that is not that of a square image."""
    if round(num_vq_tokens**0.5) ** 2 != num_vq_tokens:
        raise ValueError(f"num_vq_tokens={num_vq_tokens}: must be a square number: images are square")


def _require_safetensors(folder: Path, role: str) -> None:
    """Raises InputError where weights are pickled alone."""
    pickled = [path.name for stem in STEMS for path in folder.glob(f"{stem}*.bin*")]
    if pickled and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: holds {role} as {sorted(pickled)[0]}, a pickle, which is not read: convert it to "
            f"{WEIGHTS}.safetensors (docs/guides/showo.md)"
        )


def require_fit(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]], what: str
) -> None:
    """Raises InputError unless a file holds exactly these tensors."""
    if not shapes.keys() & stored.keys():
        raise InputError(f"{folder}: holds the weights of another model: use the files of {what}")
    if missing := sorted(shapes.keys() - stored.keys()):
        raise InputError(f"{folder}: its weights lack {missing[0]} ({len(missing)} are missing): restore the folder")
    if further := sorted(name for name in stored.keys() - shapes.keys() if not COMPUTED.search(name)):
        raise InputError(f"{folder}: its weights hold {further[0]}, which its configuration has not: use one model's")
    for name, shape in shapes.items():
        if stored[name] != shape:
            raise InputError(
                f"{folder}: {name} has shape {list(stored[name])}, its configuration says {list(shape)}: use the files "
                "of one model"
            )
