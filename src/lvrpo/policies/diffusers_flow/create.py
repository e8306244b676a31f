"""Small pipelines of diffusers from random weights, with tokenizers of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from tokenizers import pre_tokenizers

from lvrpo.atomic_io import write_atomic
from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.policies.diffusers_flow import INDEX
from lvrpo.policies.diffusers_flow.checkpoint import SCHEDULER, diffusers_library, quiet_diffusers
from lvrpo.policies.transformers_library import transformers_library

CLIP_TOKENS = 77
"""Length of a prompt that CLIP reads."""
VAE_WIDTH = 8
"""Channels of the autoencoder's layers."""
VISION_PATCH = 8
"""Side of a patch of the vision encoder."""
IMAGE_MARKERS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens around and in the place of an image that a Qwen reads."""


class PipelineSizes(Config):
    """Sizes of a random pipeline; the defaults are for tests and first runs on a CPU."""

    width: int = Field(default=32, ge=16, multiple_of=16, le=65_536)
    """Width of the transformer."""
    depth: int = Field(default=2, ge=1, le=1000)
    heads: int = Field(default=2, ge=1, le=1000)
    text_width: int = Field(default=64, ge=32, multiple_of=32, le=65_536)
    """Width of the encoder that reads whole prompts; CLIP has half of it."""
    text_depth: int = Field(default=2, ge=2, le=1000)
    latent_channels: int = Field(default=4, ge=1, le=1024)
    vae_stride: int = Field(default=4, ge=1, le=64)
    """A power of two: pixels along a side of a latent pixel."""
    image_size: int = Field(default=32, ge=2, le=8192)
    """Default side of an image in pixels; that of a FLUX is 128 vae_stride, whatever its sizes."""
    shift: float = Field(default=3.0, gt=0, le=1000)
    """Timestep shift, unless the scheduler's shift depends on the size."""
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.vae_stride & (self.vae_stride - 1):
            raise ValueError(f"vae_stride={self.vae_stride}: must be a power of two: use 4 or 8")
        if self.image_size % (2 * self.vae_stride):
            raise ValueError(f"image_size={self.image_size}: must be a multiple of 2 vae_stride={2 * self.vae_stride}")
        if self.width % self.heads or (self.width // self.heads) % 8:
            raise ValueError(f"heads={self.heads}: must divide width={self.width} into multiples of 8: use another")
        return self


def create_pipeline(kind: str, sizes: PipelineSizes, folder: Path) -> None:
    """Writes the folder of a fresh pipeline, an entry of ``KINDS``; its tokenizers know letters alone.

    Raises InputError for another kind and without diffusers.
    """
    if kind not in KINDS:
        raise InputError(f"kind {kind!r}: unknown: use {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]), quiet_diffusers():
        torch.manual_seed(sizes.seed)
        pipe = KINDS[kind](sizes)
        pipe.save_pretrained(str(folder), safe_serialization=True)
        if kind == "qwen-image-edit-tiny":
            _save_processor(pipe.tokenizer, folder)


def stable_diffusion_3(sizes: PipelineSizes) -> Any:
    """A StableDiffusion3Pipeline. Any: of an optional package."""
    diffusers, half = diffusers_library(), sizes.text_width // 2
    tokenizer, side = clip_tokenizer(), sizes.image_size // sizes.vae_stride
    encoders = {}
    for name in ("text_encoder", "text_encoder_2"):
        encoders[name] = _clip(tokenizer, half, sizes.text_depth, "CLIPTextModelWithProjection")
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=side,
        patch_size=2,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        num_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.width // sizes.heads,
        joint_attention_dim=sizes.text_width,
        caption_projection_dim=sizes.width,
        pooled_projection_dim=2 * half,
        pos_embed_max_size=2 * side,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=getattr(diffusers, SCHEDULER)(shift=sizes.shift),
        vae=_autoencoder(sizes),
        **encoders,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        **_t5(sizes, "text_encoder_3", "tokenizer_3"),
    )


def flux(sizes: PipelineSizes, cls: str = "FluxPipeline") -> Any:
    """A FLUX with embedded guidance and a shift that depends on the size. Any: of an optional package."""
    diffusers, half = diffusers_library(), sizes.text_width // 2
    tokenizer, head = clip_tokenizer(), sizes.width // sizes.heads
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4 * sizes.latent_channels,
        num_layers=sizes.depth,
        num_single_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        attention_head_dim=head,
        joint_attention_dim=sizes.text_width,
        pooled_projection_dim=half,
        guidance_embeds=True,
        axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
    )
    return getattr(diffusers, cls)(
        transformer=transformer,
        scheduler=_dynamic_scheduler(),
        vae=_autoencoder(sizes),
        text_encoder=_clip(tokenizer, half, sizes.text_depth, "CLIPTextModel"),
        tokenizer=tokenizer,
        **_t5(sizes, "text_encoder_2", "tokenizer_2"),
    )


def flux_kontext(sizes: PipelineSizes) -> Any:
    """A FluxKontextPipeline. Any: of an optional package."""
    return flux(sizes, "FluxKontextPipeline")


def qwen_image(sizes: PipelineSizes, cls: str = "QwenImagePipeline", markers: Sequence[str] = ()) -> Any:
    """A QwenImagePipeline, or another class of its parts; ``markers``: of images in a text. Any: of a package."""
    diffusers, transformers = diffusers_library(), transformers_library("a pipeline")
    tokenizer, head = qwen_tokenizer(), sizes.width // sizes.heads
    tokenizer.add_tokens(list(markers), special_tokens=True)
    text = _qwen_sizes(sizes, tokenizer)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "fullatt_block_indexes": [0]}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": sizes.text_width, "patch_size": VISION_PATCH},
        **dict(zip(names, tokenizer.convert_tokens_to_ids(list(markers)), strict=False)),
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * sizes.latent_channels,
        out_channels=sizes.latent_channels,
        num_layers=sizes.depth,
        num_attention_heads=sizes.heads,
        attention_head_dim=head,
        joint_attention_dim=sizes.text_width,
        axes_dims_rope=(head // 4, 3 * head // 8, 3 * head // 8),
    )
    levels = round(math.log2(sizes.vae_stride))
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=VAE_WIDTH,
        z_dim=sizes.latent_channels,
        dim_mult=[1] * (levels + 1),
        num_res_blocks=1,
        temperal_downsample=[False] * levels,
        latents_mean=[0.1] * sizes.latent_channels,
        latents_std=[1.5] * sizes.latent_channels,
    )
    return getattr(diffusers, cls)(
        transformer=transformer,
        scheduler=_dynamic_scheduler(),
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        **({"processor": None} if markers else {}),
    )


def qwen_image_edit(sizes: PipelineSizes) -> Any:
    """A QwenImageEditPipeline without its processor, see ``_save_processor``. Any: of an optional package."""
    return qwen_image(sizes, "QwenImageEditPipeline", IMAGE_MARKERS)


def _save_processor(tokenizer: Any, folder: Path) -> None:
    """Writes the files of a Qwen2VLProcessor, which is made with torchvision alone. Any: of an optional package."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    limits, part = {"shortest_edge": (2 * VISION_PATCH) ** 2, "longest_edge": 64**2}, folder / "processor"
    images = Qwen2VLImageProcessorPil(patch_size=VISION_PATCH, size=limits)
    images.save_pretrained(str(part))
    tokenizer.save_pretrained(str(part))
    videos = json.loads((part / "preprocessor_config.json").read_text())
    videos = {name: value for name, value in videos.items() if name != "image_processor_type"}
    videos["video_processor_type"] = "Qwen2VLVideoProcessor"
    write_atomic(part / "video_preprocessor_config.json", (json.dumps(videos, indent=2) + "\n").encode())
    index = json.loads((folder / INDEX).read_text()) | {"processor": ["transformers", "Qwen2VLProcessor"]}
    write_atomic(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def z_image(sizes: PipelineSizes) -> Any:
    """A ZImagePipeline with a fixed shift. Any: of an optional package."""
    diffusers, transformers = diffusers_library(), transformers_library("a pipeline")
    tokenizer, head = qwen_tokenizer(), sizes.width // sizes.heads
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=sizes.latent_channels,
        dim=sizes.width,
        n_layers=sizes.depth,
        n_refiner_layers=1,
        n_heads=sizes.heads,
        n_kv_heads=sizes.heads,
        cap_feat_dim=sizes.text_width,
        axes_dims=[head // 4, 3 * head // 8, 3 * head // 8],
    )
    return diffusers.ZImagePipeline(
        transformer=transformer,
        scheduler=getattr(diffusers, SCHEDULER)(shift=sizes.shift),
        vae=_autoencoder(sizes),
        text_encoder=transformers.Qwen3Model(transformers.Qwen3Config(**_qwen_sizes(sizes, tokenizer), head_dim=16)),
        tokenizer=tokenizer,
    )


KINDS: Mapping[str, Callable[[PipelineSizes], Any]] = {
    "sd3-tiny": stable_diffusion_3,
    "flux-tiny": flux,
    "kontext-tiny": flux_kontext,
    "qwen-image-tiny": qwen_image,
    "qwen-image-edit-tiny": qwen_image_edit,
    "z-image-tiny": z_image,
}
"""The pipelines that ``create_pipeline`` makes."""


def clip_tokenizer() -> Any:
    """A CLIPTokenizer whose tokens are bytes. Any: of an optional package."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = (*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    transformers = transformers_library("a pipeline")
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=CLIP_TOKENS)


def qwen_tokenizer() -> Any:
    """A Qwen2Tokenizer whose tokens are bytes. Any: of an optional package."""
    pieces = (*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = transformers_library("a pipeline").Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return tokenizer


def _qwen_sizes(sizes: PipelineSizes, tokenizer: Any) -> dict[str, Any]:
    """The configuration of a small language model of Qwen. Any: of an optional package."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": sizes.text_width,
        "intermediate_size": 2 * sizes.text_width,
        "num_hidden_layers": sizes.text_depth,
        "num_attention_heads": sizes.text_width // 16,
        "num_key_value_heads": sizes.text_width // 16,
    }


def _dynamic_scheduler() -> Any:
    """Its shift depends on the size. Any: of an optional package."""
    return getattr(diffusers_library(), SCHEDULER)(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)


def _clip(tokenizer: Any, width: int, depth: int, cls: str) -> Any:
    """A text encoder of CLIP. Any: of an optional package."""
    transformers = transformers_library("a pipeline")
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=2,
        projection_dim=width,
        max_position_embeddings=CLIP_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return getattr(transformers, cls)(config)


def _t5(sizes: PipelineSizes, encoder: str, tokenizer: str) -> dict[str, Any]:
    """An encoder of T5 and a tokenizer whose tokens are letters, by their names. Any: of an optional package."""
    transformers = transformers_library("a pipeline")
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *letters]
    config = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=sizes.text_width,
        d_kv=sizes.text_width // 2,
        d_ff=2 * sizes.text_width,
        num_layers=sizes.text_depth,
        num_heads=2,
    )
    return {
        encoder: transformers.T5EncoderModel(config),
        tokenizer: transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512),
    }


def _autoencoder(sizes: PipelineSizes) -> Any:
    """Any: of an optional package."""
    levels = round(math.log2(sizes.vae_stride)) + 1
    return diffusers_library().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(VAE_WIDTH,) * levels,
        layers_per_block=1,
        latent_channels=sizes.latent_channels,
        norm_num_groups=VAE_WIDTH // 2,
        sample_size=sizes.image_size,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
