"""The folder of a Show-o: its own files as published, and subfolders of its language model and autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from pydantic import Field, model_validator

from lvrpo.atomic_io import read_tensors, require_finite, require_weights, write_atomic, write_tensors
from lvrpo.config import Config, parse_section
from lvrpo.errors import InputError
from lvrpo.policies.bagel.checkpoint import find_tensors
from lvrpo.policies.loading import cached_folder
from lvrpo.policies.showo.layout import MARKERS, Layout
from lvrpo.policies.showo.magvit import Magvit, MagvitConfig
from lvrpo.policies.transformers_checkpoint import json_bytes
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.reading import read_json_object

C = TypeVar("C", bound=Config)

CONFIG, WEIGHTS = "config.json", "pytorch_model"
STEMS = (WEIGHTS, "model", "diffusion_pytorch_model")
"""Names of a file of weights, without .safetensors."""
LANGUAGE, AUTOENCODER = "phi-1_5", "magvitv2"
"""Folders in that of a model."""
AUTOENCODER_ID = "showlab/magvitv2"
"""Hub id of the autoencoder, for folders that hold none."""
PREFIX = "showo."
"""Prefix of the transformer's tensors in a file."""


class ShowoConfig(Config):
    """The fields of a Show-o's config.json that are used."""

    vocab_size: int = Field(ge=1)
    llm_vocab_size: int = Field(ge=1)
    llm_model_path: str = Field(min_length=1)
    """The language model whose tokenizer and layers are used: a folder, or a Hub id."""
    codebook_size: int = Field(default=8192, ge=2)
    num_vq_tokens: int = Field(default=256, ge=1)
    w_clip_vit: bool = False

    @model_validator(mode="after")
    def _supported(self) -> Self:
        if self.w_clip_vit:
            raise ValueError(
                "w_clip_vit=true: this one reads pictures through CLIP, which is not supported: use showlab/show-o or "
                "show-o-512x512"
            )
        if self.vocab_size != (needed := self.llm_vocab_size + len(MARKERS) + self.codebook_size + 1):
            raise ValueError(
                f"vocab_size={self.vocab_size}: text, {len(MARKERS)} markers, {self.codebook_size} image tokens and "
                f"the mask are {needed}: use the config.json of a Show-o"
            )
        if round(self.num_vq_tokens**0.5) ** 2 != self.num_vq_tokens:
            raise ValueError(f"num_vq_tokens={self.num_vq_tokens}: must be a square number: pictures are square")
        return self


def load_showo(folder: Path, dtype: torch.dtype) -> tuple[Any, Magvit, Layout, dict[str, Any]]:
    """Transformer at a dtype, autoencoder (float32), layout and config.json of a folder, on the CPU.

    Any: of an optional package; decoded JSON. Raises InputError, one line, for what is missing, damaged or does not
    fit.
    """
    transformers = transformers_library("a Show-o")
    stored = read_json_object(folder / CONFIG)
    config = _settings(ShowoConfig, stored, folder / CONFIG)
    language = _part(folder, LANGUAGE, config.llm_model_path, "llm_model_path")
    autoencoder = _part(folder, AUTOENCODER, AUTOENCODER_ID, "autoencoder")
    layout = Layout.load(language, config.llm_vocab_size, config.codebook_size)
    phi = read_json_object(language / CONFIG)
    if phi.get("model_type") != "phi":
        raise InputError(f"{language}: holds a model of type {phi.get('model_type')!r}, not 'phi': use that of Phi-1.5")
    model = empty_transformer(transformers, phi, config.vocab_size, language / CONFIG)
    _require_safetensors(folder, "the weights of a Show-o")
    found = find_tensors(folder, STEMS, "the weights of a Show-o")
    shapes = {PREFIX + name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _require_fit(folder, shapes, {name: tensor.shape for name, tensor in found.items()})
    state = {name.removeprefix(PREFIX): found[name].read(dtype) for name in shapes}
    model.load_state_dict(state, assign=True)
    return model, load_magvit(autoencoder, config), layout, stored


def empty_transformer(transformers: Any, phi: Mapping[str, Any], vocabulary: int, path: Path) -> Any:
    """A PhiForCausalLM with Show-o's layer norms of queries and keys, without storage. Any: of an optional package."""
    changed = {"vocab_size": vocabulary, "qk_layernorm": True, "tie_word_embeddings": False, "pad_token_id": None}
    try:
        with quiet_loading(transformers):
            config = transformers.PhiConfig.from_dict({**phi, **changed})
            with torch.device("meta"):
                model = transformers.PhiForCausalLM(config)
            model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its buffers are in no file
    except Exception as error:  # transformers checks its fields in many ways
        raise InputError(f"{path}: {' '.join(str(error).split())[:200]}: restore the file") from None
    return model


def load_magvit(folder: Path, config: ShowoConfig) -> Magvit:
    """The autoencoder of a folder, float32, on the CPU."""
    path = folder / CONFIG
    sizes = _settings(MagvitConfig, read_json_object(path), path)
    if sizes.codes != config.codebook_size:
        raise InputError(
            f"{path}: has {sizes.codes} codes, codebook_size={config.codebook_size}: use one model's files"
        )
    with torch.device("meta"):
        magvit = Magvit(sizes)
    _require_safetensors(folder, "the weights of MAGVIT-v2")
    weights = next(
        (folder / f"{stem}.safetensors" for stem in STEMS if (folder / f"{stem}.safetensors").is_file()), None
    )
    if weights is None:
        raise InputError(f"{folder}: holds no {WEIGHTS}.safetensors, the weights of MAGVIT-v2: copy it there")
    found, _ = read_tensors(weights, "fetch the file again")
    found = {name: tensor for name, tensor in found.items() if not name.startswith("quantize.")}  # follows from sizes
    shapes = {name: tuple(tensor.shape) for name, tensor in magvit.state_dict().items()}
    _require_fit(folder, shapes, {name: tuple(tensor.shape) for name, tensor in found.items()})
    for name, tensor in found.items():
        require_weights(weights, name, tensor, "fetch the file again")
    magvit.load_state_dict({name: found[name].float() for name in shapes}, assign=True)
    return magvit


def save_showo(model: Any, magvit: Magvit, layout: Layout, stored: Mapping[str, Any], folder: Path) -> None:
    """Writes a whole folder. ``stored``: the content of config.json. Any: an optional package; what JSON may hold."""
    state = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    for name, tensor in state.items():
        require_finite(folder, name, tensor, "resume from an earlier checkpoint")
    write_tensors(folder / f"{WEIGHTS}.safetensors", state, {"format": "pt"})
    language, autoencoder = folder / LANGUAGE, folder / AUTOENCODER
    for part in (language, autoencoder):
        part.mkdir(exist_ok=True)
    layout.save(language)
    codes = {name: tensor.detach().cpu().contiguous() for name, tensor in magvit.state_dict().items()}
    bits = torch.arange(magvit.config.z_channels - 1, -1, -1)
    signs = (torch.arange(magvit.config.codes)[:, None] >> bits) & 1
    codes |= {"quantize.embedding": signs.float() * 2 - 1, "quantize.power_vals": 2**bits}  # its makers' buffers
    write_tensors(autoencoder / f"{WEIGHTS}.safetensors", codes, {"format": "pt"})
    own = magvit.config.model_dump(exclude_defaults=True, mode="json")
    write_atomic(autoencoder / CONFIG, json_bytes({"_class_name": "MAGVITv2", **own}))
    write_atomic(folder / CONFIG, json_bytes(stored))


def _settings(kind: type[C], stored: Mapping[str, Any], path: Path) -> C:
    """The fields of a file that are used. Any: decoded JSON."""
    return parse_section(kind, {name: stored[name] for name in kind.model_fields if name in stored}, path)


def _part(folder: Path, name: str, source: str, field: str) -> Path:
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


def _require_safetensors(folder: Path, what: str) -> None:
    """Raises InputError where weights are pickled alone."""
    pickled = [path.name for stem in STEMS for path in folder.glob(f"{stem}*.bin*")]
    if pickled and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: holds {what} as {sorted(pickled)[0]}, a pickle, which is not read: convert it to "
            f"{WEIGHTS}.safetensors (docs/guides/showo.md)"
        )


def _require_fit(folder: Path, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Raises InputError unless a file holds exactly these tensors."""
    if not shapes.keys() & stored.keys():
        raise InputError(f"{folder}: holds the weights of another model: use the files of one Show-o")
    if missing := sorted(shapes.keys() - stored.keys()):
        raise InputError(f"{folder}: its weights lack {missing[0]} ({len(missing)} are missing): restore the folder")
    if further := sorted(name for name in stored.keys() - shapes.keys() if not name.endswith("inv_freq")):
        raise InputError(f"{folder}: its weights hold {further[0]}, which its configuration has not: use one model's")
    for name, shape in shapes.items():
        if stored[name] != shape:
            raise InputError(
                f"{folder}: {name} has shape {list(stored[name])}, its configuration says {list(shape)}: use the files "
                "of one model"
            )
