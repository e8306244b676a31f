"""Guidance: velocities or logits of one state under several contexts, mixed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from lvrpo.errors import InputError
from lvrpo.types import LogitGuidance

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["guide", "guide_logits"]

Renorm = Literal["none", "global", "channel", "channel_match", "text_channel"]


def guide(
    v: Float[Tensor, "B N C"],
    v_no_text: Float[Tensor, "B N C"] | None,
    v_no_image: Float[Tensor, "B N C"] | None,
    guidance_scale: float,
    image_guidance_scale: float = 1.0,
    renorm: Renorm = "none",
    renorm_min: float = 0.0,
) -> Float[Tensor, "B N C"]:
    """Three-way guidance as in BAGEL: away from the context without text, then from the one without images.

    a = v_no_text + guidance_scale (v - v_no_text);  b = v_no_image + image_guidance_scale (a - v_no_image);
    out = b clip(|v| / (|b| + 1e-8), renorm_min, 1), the norm over tokens and channels of a sample (``global``) or
    over the channels of a token (``channel``). ``channel_match``, of Qwen-Image: b |v| / |b| per token, which also
    grows. ``text_channel``: a is renormed per token, then mixed into b, which is not.

    A guidance_scale of at most 1 leaves v unchanged *and ignores the image scale*; an image_guidance_scale of at most
    1 means b = a. A velocity that is not used may be None.

    Shapes: all (B, N, C) to the same. All but channel_match only shrink; renorm_min = 1 switches them off.
    Raises: InputError for an unknown renorm, or for a scale above 1 without its velocity.
    Differs from the paper: the original takes the global norm over the whole packed batch; here it is per sample, so
    that an image does not depend on its neighbors.
    """
    if renorm not in get_args(Renorm):
        raise InputError(f"guidance_renorm={renorm!r} is unknown: use {', '.join(get_args(Renorm))}")
    if guidance_scale <= 1:
        return v
    if v_no_text is None:
        raise InputError(f"guidance_scale={guidance_scale} needs the velocity without text: give it or use 1")
    if image_guidance_scale > 1 and v_no_image is None:
        raise InputError(
            f"image_guidance_scale={image_guidance_scale} needs the velocity without images: give it or use 1"
        )
    a = v_no_text + guidance_scale * (v - v_no_text)
    if renorm == "text_channel":
        a = _rescale(a, v, (-1,), renorm_min)
    b = a if image_guidance_scale <= 1 or v_no_image is None else v_no_image + image_guidance_scale * (a - v_no_image)
    if renorm == "global":
        return _rescale(b, v, (-2, -1), renorm_min)
    if renorm == "channel":
        return _rescale(b, v, (-1,), renorm_min)
    if renorm == "channel_match":
        return _rescale(b, v, (-1,), 0.0, math.inf)
    return b


def guide_logits(
    logits: Float[Tensor, "*B V"],
    logits_no_text: Float[Tensor, "*B V"] | None,
    guidance_scale: float,
    mode: LogitGuidance = "joint",
) -> Float[Tensor, "*B V"]:
    """The logits that image tokens are sampled from under guidance (classifier-free guidance, arXiv:2207.12598).

    out = logits_no_text + guidance_scale (logits - logits_no_text). By mode: ``joint`` gives both branches a gradient,
    ``detach_uncond`` holds the unguided one fixed (half the memory, nearly the gradient of joint), ``none`` returns the
    conditional logits: another distribution, right only where nothing was guided.

    Sampling and replay call this with the same scale and hand the result to ``sample_tokens`` and ``token_logprobs``
    with the same temperature and vocabulary mask. After guided sampling, scoring the conditional branch alone, or
    logits / guidance_scale, trains another distribution than the one sampled from.

    Shapes: logits (..., V) to float32 (..., V). A scale of exactly 1, or mode none, needs no unguided logits. Show-o
    and MMaDA write (1 + g) cond - g uncond: their g is guidance_scale - 1.
    Raises: InputError for an unknown mode, or for a scale other than 1 without the unguided logits.
    Differs from the paper: no.
    """
    if mode not in ("joint", "detach_uncond", "none"):
        raise InputError(f"logit guidance={mode!r} is unknown: use joint, detach_uncond or none")
    if mode == "none" or guidance_scale == 1:
        return logits.float()
    if logits_no_text is None:
        raise InputError(f"guidance_scale={guidance_scale} needs the logits without text: give them or use 1")
    unguided = logits_no_text.float().detach() if mode == "detach_uncond" else logits_no_text.float()
    return unguided + guidance_scale * (logits.float() - unguided)


def _rescale(guided: Tensor, v: Tensor, dims: tuple[int, ...], low: float, high: float = 1.0) -> Tensor:
    norm = torch.linalg.vector_norm(v, dim=dims, keepdim=True)
    norm_guided = torch.linalg.vector_norm(guided, dim=dims, keepdim=True)
    return guided * (norm / (norm_guided + 1e-8)).clamp(low, high)
