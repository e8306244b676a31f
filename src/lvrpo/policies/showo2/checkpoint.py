"""The folder of a Show-o2: the published config.json and weights, and subfolders of the components they name.

config.json, model.safetensors      as published (showlab/show-o2-1.5B), the weights as safetensors
llm/                                config.json and tokenizer.json of the Qwen2.5 that config.json names
vision/                             config.json of the SigLIP that config.json names
vae/                                Wan 2.1's autoencoder in the layout of diffusers
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from lvrpo.atomic_io import write_atomic, write_tensors
from lvrpo.errors import InputError
from lvrpo.policies.diffusers_flow.checkpoint import diffusers_library, empty_part, link_file, quiet_diffusers
from lvrpo.policies.magvit.checkpoint import require_fit
from lvrpo.policies.safetensors_reader import StoredTensor, find_tensors
from lvrpo.policies.showo2.model import Showo2Model, Showo2Sizes
from lvrpo.policies.tokenizer_files import StoredFiles, parse_tokenizer
from lvrpo.policies.transformers_checkpoint import json_bytes, line_of
from lvrpo.policies.transformers_library import quiet_loading, transformers_library
from lvrpo.reading import read_bytes, read_json_object

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CLASS = "Showo2Qwen2_5"
"""``_class_name`` in config.json."""
STEMS = ("model", "diffusion_pytorch_model")
TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
KIND = "a Show-o2"
VAE = "vae"
COPIED = ("llm/config.json", "llm/tokenizer.json", "vision/config.json")
"""Small files that are kept as they are."""


@dataclass(frozen=True, eq=False)
class Parts(StoredFiles):
    """The components of a Show-o2 besides its network; immutable."""

    config: Mapping[str, Any]
    """config.json. Any: decoded JSON."""
    tokenizer: Tokenizer
    ids: Mapping[str, int]
    """Ids of ``TOKENS``."""
    vae: Any
    """An AutoencoderKLWan of diffusers. Any: an optional package."""
    files: Mapping[str, bytes]
    """``COPIED``."""
    folder: Path | None
    """Folder that the autoencoder was loaded from; None: it is new."""


def load_parts(folder: Path, dtype: torch.dtype, *, weights: bool = True) -> tuple[Showo2Model, Parts]:
    """The network at a dtype on the CPU, and its parts; raises InputError, one line.

    ``weights``: whether they are read; otherwise parameters are on the meta device, and sizes that no json file names
    are those of the weights if they are there, or else the published ones.
    """
    config = read_json_object(folder / CONFIG)
    if config.get("_class_name") != CLASS:
        raise InputError(
            f"{folder / CONFIG}: its _class_name is {config.get('_class_name')!r}, not {CLASS!r}: give another"
        )
    files = {
        name: read_bytes(folder / name, "copy it from the published model (docs/guides/showo2.md)") for name in COPIED
    }
    found = weights or any(folder.glob("*.safetensors"))
    need = "the weights of a Show-o2 (docs/guides/showo2.md shows how to convert them)"
    stored = find_tensors(folder, STEMS, need) if found else {}
    llm, vision = _configs(folder)
    sizes = _sizes(folder, config, stored if found else None, llm.vocab_size)
    llm.vocab_size = sizes.vocabulary
    with torch.device("meta"):
        model = Showo2Model(sizes, llm, vision)
    empty = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    state = _read(folder, stored, model, dtype) if weights else empty
    model.load_state_dict(state, strict=False, assign=True)
    if llm.tie_word_embeddings:
        model.showo.lm_head.weight = model.get_input_embeddings().weight
    model.make_rotary()
    tokenizer = parse_tokenizer(files["llm/tokenizer.json"], folder / "llm/tokenizer.json")
    return model, Parts(
        config, tokenizer, token_ids(folder, tokenizer, sizes.vocabulary), _vae(folder / VAE, weights), files, folder
    )


def _configs(folder: Path) -> tuple[Any, Any]:
    """The Qwen2Config and the SiglipVisionConfig without its last layer. Any: of an optional package."""
    transformers = transformers_library(KIND)
    try:
        with quiet_loading(transformers):
            llm = transformers.Qwen2Config.from_dict(read_json_object(folder / "llm" / CONFIG))
            found = read_json_object(folder / "vision" / CONFIG)
            vision = transformers.SiglipVisionConfig.from_dict(found.get("vision_config", found))
    except InputError:
        raise
    except Exception as error:  # transformers checks its fields in many ways
        raise InputError(f"{folder}: llm/ or vision/config.json: {line_of(error)}: restore the file") from None
    vision.num_hidden_layers -= 1
    vision._attn_implementation = llm._attn_implementation = "sdpa"
    return llm, vision


PUBLISHED_HEAD = (8192, 2048)
"""Inner and outer width of the flow head of every published Show-o2."""


def _sizes(
    folder: Path, config: Mapping[str, Any], stored: Mapping[str, StoredTensor] | None, vocabulary: int
) -> Showo2Sizes:
    """``vocabulary``: of the language model, which a Show-o2 may resize."""
    try:
        head, rows = PUBLISHED_HEAD, int(config.get("llm_vocab_size") or vocabulary)
        if stored is not None:
            head = stored["diffusion_head_a.0.mlp.gate_proj.weight"].shape
            rows = stored["showo.model.embed_tokens.weight"].shape[0]
        return Showo2Sizes(
            vocabulary=rows,
            width=int(config["hidden_size"]),
            vision_width=int(config["clip_latent_dim"]),
            patch=int(config["patch_size"]),
            channels=int(config["image_latent_dim"]),
            grid=(int(config["image_latent_height"]), int(config["image_latent_width"])),
            head_layers=int(config["num_diffusion_layers"]),
            head_width=head[1],
            head_inner=head[0],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: {line_of(error)} is missing or no number: use the files of one Show-o2") from None


def _read(
    folder: Path, stored: Mapping[str, StoredTensor], model: Showo2Model, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of the weights at a dtype, each compared with the shape that the network has."""
    tied = {"showo.lm_head.weight"} if model.config.tie_word_embeddings else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    require_fit(folder, shapes, {name: tensor.shape for name, tensor in stored.items() if name in shapes}, KIND)
    return {name: stored[name].read(dtype) for name in shapes}


def token_ids(folder: Path, tokenizer: Tokenizer, vocabulary: int) -> dict[str, int]:
    """Ids of ``TOKENS``; raises InputError where one is missing or above the vocabulary."""
    found: dict[str, int] = {}
    for token in TOKENS:
        number = tokenizer.token_to_id(token)
        if number is None or number >= vocabulary:
            raise InputError(f"{folder}: its tokenizer has no {token}: use the tokenizer of the Qwen2.5 in config.json")
        found[token] = number
    return found


def _vae(folder: Path, weights: bool) -> Any:
    """The autoencoder, float32, on the CPU; without ``weights`` on the meta device. Any: of an optional package."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder: copy the autoencoder of Wan 2.1 in the layout of diffusers there")
    if weights:
        find_tensors(folder, ("diffusion_pytorch_model",), "its weights")
    try:
        with quiet_diffusers():
            if not weights:
                return empty_part(diffusers_library().AutoencoderKLWan, folder, torch.float32)
            return diffusers_library().AutoencoderKLWan.from_pretrained(
                str(folder), local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
            )
    except Exception as error:  # diffusers raises many kinds
        raise InputError(f"{folder}: cannot be loaded ({line_of(error)}): restore the folder") from None


def save_parts(model: Showo2Model, parts: Parts, folder: Path) -> None:
    """Writes a folder that ``load_parts`` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tied = {"showo.lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items() if n not in tied}
    write_tensors(folder / WEIGHTS, state, {"format": "pt"})
    parts.save(folder)
    if parts.folder is None:
        parts.vae.save_pretrained(folder / VAE, safe_serialization=True)
    else:
        (folder / VAE).mkdir(exist_ok=True)
        for file in sorted((parts.folder / VAE).iterdir()):
            if file.suffix in (".json", ".safetensors"):
                link_file(file, folder / VAE / file.name)
    write_atomic(folder / CONFIG, json_bytes(parts.config))
