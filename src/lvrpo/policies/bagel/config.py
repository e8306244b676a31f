"""The configuration of a BAGEL folder. What tensors tell is taken from them; config.json is known to be wrong."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator

from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.policies.bagel.checkpoint import EMBED_TOKENS, LM_HEAD
from lvrpo.policies.bagel.encoders import ResizeRule, VaeConfig, VitConfig
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.policies.safetensors_reader import StoredTensor
from lvrpo.reading import read_json

SECTION = "lvrpo"
"""The key of config.json with ``BagelSettings``, which the published files lack."""
TEXT_LAYERS, READ_LAYERS = "language_model.model.layers.", "vit_model.vision_model.encoder.layers."
"""Prefixes of a layer's tensors, up to its number: of the transformer, of the vision encoder."""
WHOLE = "fetch the weights again, or name the whole model below a fine-tuned part (--base MODEL)"
"""The remedy for tensors that are missing."""


class BagelSettings(Config):
    """Settings that no published file has; the defaults are those of BAGEL-7B-MoT."""

    latent_resize: ResizeRule = ResizeRule(max_side=1024, min_side=512, stride=16)
    """Resizing of every input image: the autoencoder sees the result, the vision encoder ``read_resize`` of it."""
    read_resize: ResizeRule = ResizeRule(max_side=980, min_side=224, stride=14)
    image_size: tuple[int, int] = (1024, 1024)
    """Height and width of an image generated without a source image."""
    timestep_shift: float = Field(default=3.0, gt=0)
    """Shift of the sampling timesteps."""
    training_shift: float = Field(default=4.0, gt=0)
    """Shift of the timesteps of the flow loss; the default is that of the published fine-tuning."""
    drop_text: float = Field(default=0.1, ge=0, le=1)
    """Share of the texts that supervised generation leaves out, so that guidance has its branch."""
    drop_latent: float = Field(default=0.3, ge=0, le=1)
    """The same of source images on the generation side."""
    drop_read: float = Field(default=0.3, ge=0, le=1)
    """The same of source images on the understanding side."""


class BagelConfig(Config):
    """Sizes and choices of a BAGEL of any size."""

    transformer: MoTConfig
    vit: VitConfig
    vae: VaeConfig = VaeConfig()
    vocabulary_size: int = Field(ge=1)
    max_positions: int = Field(default=32768, ge=1)
    latent_patch: int = Field(default=2, ge=1)
    """Latent pixels per token along a side."""
    latent_side: int = Field(default=64, ge=1)
    """Rows and columns of the table of latent positions."""
    settings: BagelSettings = BagelSettings()

    @field_validator("transformer")
    @classmethod
    def _as_published(cls, transformer: MoTConfig) -> MoTConfig:
        if transformer.mlp != "swiglu" or not transformer.attention_bias:
            raise ValueError("transformer: BAGEL has mlp=swiglu and attention_bias=true")
        return transformer

    @property
    def token_pixels(self) -> int:
        """Pixels per latent token along a side."""
        return self.vae.downsample * self.latent_patch

    @property
    def channels(self) -> int:
        """Numbers of a latent token."""
        return self.vae.channels * self.latent_patch**2


def is_bagel(folder: Path) -> bool:
    """Whether a folder looks like BAGEL, whatever its config.json holds."""
    return any((folder / name).is_file() for name in ("llm_config.json", "ema.safetensors"))


def read_config(
    folder: Path,
    weights: Mapping[str, StoredTensor],
    autoencoder: Mapping[str, StoredTensor],
    settings: BagelSettings | None = None,
) -> BagelConfig:
    """The configuration of a folder with the given tensors; raises InputError, one line."""
    whole = _tolerant_json(folder / "config.json")
    llm = _section(folder, "llm_config", whole)
    vit = _section(folder, "vit_config", whole)
    try:
        return BagelConfig(
            transformer=_transformer(folder, llm, weights),
            vit=_vit(folder, vit, weights),
            vae=_vae(folder, whole.get("vae_config"), autoencoder),
            vocabulary_size=_rows(folder, weights, EMBED_TOKENS),
            max_positions=_number(folder, "llm_config", llm, "max_position_embeddings"),
            latent_patch=_latent_patch(folder, weights, autoencoder),
            latent_side=_side(folder, weights, "latent_pos_embed.pos_embed"),
            settings=settings or BagelSettings.model_validate(whole.get(SECTION, {})),
        )
    except ValidationError as error:
        sections = {"MoTConfig": "llm_config", "VitConfig": "vit_config", "VaeConfig": "vae_config"}
        where = sections.get(error.title, "configuration")
        raise InputError(f"{folder}: {where}: {first_problem(error)}: restore the json files") from None


def with_tied_head(folder: Path, weights: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """The weights, with the token embedding for an output layer that the folder ties to it and does not store."""
    llm = _section(folder, "llm_config", _tolerant_json(folder / "config.json"))
    if LM_HEAD in weights or EMBED_TOKENS not in weights or llm.get("tie_word_embeddings") is not True:
        return weights
    return {**weights, LM_HEAD: weights[EMBED_TOKENS]}


def config_from_json(folder: Path) -> BagelConfig:
    """The configuration that the json files alone tell, for a folder whose weights are not there yet.

    What they do not tell is as published. Tables of positions, whose sides config.json is known to be wrong about, are
    taken to be large enough for every image that comes in. Raises InputError, one line.
    """
    whole = _tolerant_json(folder / "config.json")
    llm, vit = _section(folder, "llm_config", whole), _section(folder, "vit_config", whole)
    vae = whole.get("vae_config")
    vae = vae if isinstance(vae, dict) else {}
    sizes = {"width": "ch", "multipliers": "ch_mult", "res_blocks": "num_res_blocks", "channels": "z_channels"}
    sizes |= {"scale": "scale_factor", "shift": "shift_factor"}
    try:
        settings = BagelSettings.model_validate(whole.get(SECTION, {}))
        autoencoder = VaeConfig.model_validate({own: vae[key] for own, key in sizes.items() if key in vae})
        patch = _number(folder, "vit_config", vit, "patch_size")
        latent_patch = whole.get("latent_patch_size", 2)
        token = autoencoder.downsample * latent_patch
        return BagelConfig(
            transformer=_transformer(folder, llm, {}),
            vit=VitConfig(
                width=_number(folder, "vit_config", vit, "hidden_size"),
                mlp_width=_number(folder, "vit_config", vit, "intermediate_size"),
                heads=_number(folder, "vit_config", vit, "num_attention_heads"),
                depth=_number(folder, "vit_config", vit, "num_hidden_layers") - 1,
                patch_size=patch,
                side=max(whole.get("vit_max_num_patch_per_side", 0), settings.read_resize.max_side // patch),
                norm_eps=vit.get("layer_norm_eps", 1e-6),
            ),
            vae=autoencoder,
            vocabulary_size=_number(folder, "llm_config", llm, "vocab_size"),
            max_positions=_number(folder, "llm_config", llm, "max_position_embeddings"),
            latent_patch=latent_patch,
            latent_side=max(whole.get("max_latent_size", 0), settings.latent_resize.max_side // token),
            settings=settings,
        )
    except ValidationError as error:
        raise InputError(f"{folder}: {first_problem(error)}: restore the json files") from None
    except (TypeError, ZeroDivisionError):
        raise InputError(f"{folder / 'config.json'}: a size is no number above 0: restore the json files") from None


def first_problem(error: ValidationError) -> str:
    """The first error of pydantic, in one line."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    return f"{where}: {message}" if where else message


def several(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def config_files(config: BagelConfig, bos_id: int, eos_id: int) -> dict[str, dict[str, Any]]:
    """llm_config.json, vit_config.json and config.json as published, by name. Any: JSON."""
    transformer, vit, vae = config.transformer, config.vit, config.vae
    llm_config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": transformer.width,
        "intermediate_size": transformer.mlp_width,
        "num_hidden_layers": transformer.depth,
        "num_attention_heads": transformer.heads,
        "num_key_value_heads": transformer.key_heads,
        "hidden_act": "silu",
        "rms_norm_eps": transformer.norm_eps,
        "rope_theta": transformer.rope_theta,
        "max_position_embeddings": config.max_positions,
        "vocab_size": config.vocabulary_size,
        "tie_word_embeddings": False,
        "qk_norm": True,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
    }
    vit_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": vit.width,
        "intermediate_size": vit.mlp_width,
        "num_attention_heads": vit.heads,
        "num_hidden_layers": vit.depth + 1,  # readers of this file leave the last layer out
        "patch_size": vit.patch_size,
        "image_size": vit.side * vit.patch_size,
        "layer_norm_eps": vit.norm_eps,
    }
    vae_config = {
        "z_channels": vae.channels,
        "downsample": vae.downsample,
        "ch": vae.width,
        "ch_mult": list(vae.multipliers),
        "num_res_blocks": vae.res_blocks,
        "scale_factor": vae.scale,
        "shift_factor": vae.shift,
    }
    whole = {
        "model_type": "bagel",
        "architectures": ["BagelForConditionalGeneration"],
        "visual_gen": True,
        "visual_und": True,
        "llm_config": llm_config,
        "vit_config": vit_config,
        "vae_config": vae_config,
        "latent_patch_size": config.latent_patch,
        "max_latent_size": config.latent_side,
        "vit_max_num_patch_per_side": vit.side,
        "connector_act": "gelu_pytorch_tanh",
        "interpolate_pos": False,
        SECTION: config.settings.model_dump(mode="json"),
    }
    return {"llm_config.json": llm_config, "vit_config.json": vit_config, "config.json": whole}


def _transformer(folder: Path, llm: Mapping[str, Any], weights: Mapping[str, StoredTensor]) -> MoTConfig:
    def number(key: str) -> Any:
        return _number(folder, "llm_config", llm, key)

    if llm.get("hidden_act", "silu") != "silu":
        raise InputError(f"{folder}: llm_config.hidden_act={llm['hidden_act']!r}: BAGEL has silu: restore the file")
    if llm.get("rope_scaling"):
        raise InputError(f"{folder}: llm_config.rope_scaling is set: BAGEL has none: restore the file")
    depth = number("num_hidden_layers")
    surplus = [i for i in _stored_layers(weights, TEXT_LAYERS) if i >= depth]
    if surplus:
        names = several([f"{TEXT_LAYERS}{i}" for i in surplus])
        raise InputError(
            f"{folder}: holds {names}, llm_config.num_hidden_layers={depth}: use json files and weights of one model"
        )
    return MoTConfig(
        width=number("hidden_size"),
        depth=depth,
        heads=number("num_attention_heads"),
        key_heads=number("num_key_value_heads"),
        mlp_width=number("intermediate_size"),
        mlp="swiglu",
        attention_bias=True,
        rope_theta=number("rope_theta"),
        norm_eps=number("rms_norm_eps"),
    )


def _vit(folder: Path, vit: Mapping[str, Any], weights: Mapping[str, StoredTensor]) -> VitConfig:
    """One layer fewer than in vit_config.json: the last one is not run, even where it is stored."""
    layers = _stored_layers(weights, READ_LAYERS)
    if not layers:
        raise InputError(f"{folder}: holds no {READ_LAYERS}N: {WHOLE}")
    depth = _number(folder, "vit_config", vit, "num_hidden_layers")
    missing = [f"{READ_LAYERS}{i}" for i in range(int(depth) - 1) if i not in layers]
    if missing:
        names = several(missing)
        raise InputError(
            f"{folder}: holds no {names}, vit_config.num_hidden_layers={depth} wants {depth - 1} layers: {WHOLE}"
        )
    if max(layers) >= depth:
        raise InputError(
            f"{folder}: holds {READ_LAYERS}{max(layers)}, vit_config.num_hidden_layers={depth}: "
            "use json files and weights of one model"
        )
    return VitConfig(
        width=_rows(folder, weights, "vit_model.vision_model.embeddings.patch_embedding.weight"),
        mlp_width=_rows(folder, weights, f"{READ_LAYERS}0.mlp.fc1.weight"),
        heads=_number(folder, "vit_config", vit, "num_attention_heads"),
        depth=depth - 1,
        patch_size=_number(folder, "vit_config", vit, "patch_size"),
        side=_side(folder, weights, "vit_pos_embed.pos_embed"),
        norm_eps=vit.get("layer_norm_eps", 1e-6),
    )


def _vae(folder: Path, given: Any, autoencoder: Mapping[str, StoredTensor]) -> VaeConfig:
    """Sizes from the tensors; scale and shift, which no tensor tells, from config.json or as published. Any: JSON."""
    width = _rows(folder, autoencoder, "encoder.conv_in.weight")
    levels = {int(found[1]) for name in autoencoder if (found := re.match(r"encoder\.down\.(\d+)\.block\.", name))}
    blocks = {int(found[1]) for name in autoencoder if (found := re.match(r"encoder\.down\.0\.block\.(\d+)\.", name))}
    widths = [_rows(folder, autoencoder, f"encoder.down.{i}.block.0.conv1.weight") for i in sorted(levels)]
    numbers = given if isinstance(given, dict) else {}
    return VaeConfig(
        width=width,
        multipliers=tuple(level // width for level in widths),
        res_blocks=len(blocks),
        channels=_rows(folder, autoencoder, "encoder.conv_out.weight") // 2,
        scale=numbers.get("scale_factor", VaeConfig().scale),
        shift=numbers.get("shift_factor", VaeConfig().shift),
    )


def _latent_patch(folder: Path, weights: Mapping[str, StoredTensor], autoencoder: Mapping[str, StoredTensor]) -> int:
    channels = _rows(folder, weights, "llm2vae.weight")
    z = _rows(folder, autoencoder, "encoder.conv_out.weight") // 2
    patch = math.isqrt(channels // z)
    if patch * patch * z != channels:
        raise InputError(f"{folder}: llm2vae makes {channels} numbers a token of {z} channels: use files of one model")
    return patch


def _side(folder: Path, weights: Mapping[str, StoredTensor], name: str) -> int:
    rows = _rows(folder, weights, name)
    side = math.isqrt(rows)
    if side * side != rows:
        raise InputError(f"{folder}: {name} has {rows} rows, no square: fetch the weights again")
    return side


def _stored_layers(weights: Mapping[str, StoredTensor], prefix: str) -> list[int]:
    """The numbers of the layers that tensors are stored of."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return sorted({int(found[1]) for name in weights if (found := pattern.match(name))})


def _rows(folder: Path, tensors: Mapping[str, StoredTensor], name: str) -> int:
    """The first side of a tensor."""
    if name not in tensors:
        raise InputError(f"{folder}: the weights hold no {name}: {WHOLE}")
    shape = tensors[name].shape
    if not shape or not shape[0]:
        raise InputError(f"{folder}: {name} has shape {list(shape)}, which has no rows: fetch the weights again")
    return shape[0]


def _section(folder: Path, name: str, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    """NAME.json, or the section of that name in config.json. Any: JSON."""
    path = folder / f"{name}.json"
    found = read_json(path) if path.is_file() else whole.get(name)
    if not isinstance(found, dict):
        raise InputError(f"{folder}: holds no {name}.json, the sizes of BAGEL: copy it from the published folder")
    return found


def _number(folder: Path, file: str, section: Mapping[str, Any], key: str) -> Any:
    """Any: an int or a float, which pydantic tells apart."""
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{folder}: {file}.{key}={value!r}: no number: restore the file")
    return value


def _tolerant_json(path: Path) -> dict[str, Any]:
    """config.json, or nothing where it is absent or no JSON: one release of it was not."""
    try:
        found = read_json(path)
    except InputError:
        return {}
    return found if isinstance(found, dict) else {}
