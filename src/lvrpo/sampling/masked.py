"""Masked discrete images and texts: tokens are revealed a few at a time, scored along that path or at random masks.

A sampled one is its tokens (B, N) and ``reveal_steps`` (B, N): the step at which each token was fixed, -1 for a token
that was given. That rebuilds the input of every step, so nothing else is stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lvrpo.errors import InputError
from lvrpo.sampling.seeds import uniform_noise
from lvrpo.sampling.tokens import token_logprobs

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

__all__ = [
    "block_steps",
    "choose_revealed",
    "mask_draws",
    "masked_counts",
    "masked_input",
    "monte_carlo_logprob",
    "path_logprobs",
    "with_complements",
]


def masked_counts(num_tokens: int, num_steps: int) -> tuple[int, ...]:
    """The number of tokens that are still masked after each step (the cosine schedule of MaskGIT, arXiv:2202.04200).

    n_s = floor(num_tokens cos(pi (s + 1) / (2 num_steps))), s = 0 .. num_steps - 1, moved up or down where needed so
    that every step fixes at least one token.

    Range: falls strictly from below num_tokens to 0.
    Raises: InputError unless 1 <= num_steps <= num_tokens.
    Differs from the paper: no.
    """
    if not 1 <= num_steps <= num_tokens:
        raise InputError(f"sampling.num_steps={num_steps} for {num_tokens} masked tokens: use 1..{num_tokens}")
    counts: list[int] = []
    left = num_tokens
    for s in range(num_steps):
        cosine = math.floor(num_tokens * math.cos(math.pi * (s + 1) / (2 * num_steps)))
        left = max(num_steps - 1 - s, min(left - 1, cosine))
        counts.append(left)
    return tuple(counts)


def block_steps(num_tokens: int, block_length: int, tokens_per_step: int) -> tuple[tuple[range, int], ...]:
    """The steps of block decoding (LLaDA, arXiv:2502.09992): blocks from left to right, some tokens fixed at a time.

    A block of b places takes S = ceil(b / tokens_per_step) steps, which fix floor(b / S) tokens each, the first b mod S
    of them one more. Each step: the places of its block, and the number that are still masked after it.

    Range: the last block is shorter where block_length does not divide num_tokens.
    Raises: InputError for a number below 1.
    Differs from the paper: LLaDA is given the number of steps, which has to divide evenly.
    """
    if min(num_tokens, block_length, tokens_per_step) < 1:
        raise InputError(
            f"{num_tokens} tokens, block_length={block_length}, tokens_per_step={tokens_per_step}: use 1 or more of all"
        )
    steps: list[tuple[range, int]] = []
    for start in range(0, num_tokens, block_length):
        block = range(start, min(start + block_length, num_tokens))
        count = -(-len(block) // tokens_per_step)
        left = len(block)
        for s in range(count):
            left -= len(block) // count + (s < len(block) % count)
            steps.append((block, left))
    return tuple(steps)


def choose_revealed(
    logprobs: Float[Tensor, "B N"],
    masked: Bool[Tensor, "B N"],
    num_masked: int,
    uniforms: Float[Tensor, "B N"] | None = None,
    choice_temperature: float = 0.0,
) -> Bool[Tensor, "B N"]:
    """Selects the sampled tokens to keep in this step: the most confident ones (MaskGIT, arXiv:2202.04200).

    confidence = log p(sampled token) + choice_temperature Gumbel, Gumbel = -log(-log u); of the masked positions all
    but the ``num_masked`` least confident are fixed; ties by rising position.

    The choice of positions is no part of the density that ``path_logprobs`` scores.

    Shapes: logprobs of the sampled tokens, masked, and uniforms in [0, 1) as from ``uniform_noise``, all (B, N), to
    (B, N).
    Raises: InputError for a choice_temperature other than 0 without uniforms.
    Differs from the paper: no. Show-o multiplies its temperature by 1 - (s + 1) / T at every step: the caller's choice.
    """
    if choice_temperature != 0 and uniforms is None:
        raise InputError(f"choice_temperature={choice_temperature} needs random numbers: give uniforms or use 0")
    confidence = logprobs.float()
    if uniforms is not None and choice_temperature != 0:
        gumbel = -torch.log(-torch.log(uniforms.clamp(1e-20, 1 - 1e-7)))
        confidence = confidence + choice_temperature * gumbel
    falling = torch.where(masked, confidence, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = falling.argsort(dim=1)  # positions that are not masked come last
    return masked & (rank < masked.sum(dim=1, keepdim=True) - num_masked)


def masked_input(
    tokens: Int[Tensor, "B N"], reveal_steps: Int[Tensor, "B N"], step: int, mask_id: int
) -> Int[Tensor, "B N"]:
    """The model's input at a step: the tokens revealed before it, masks elsewhere.

    input = tokens where reveal_steps < step, else mask_id.

    Shapes: tokens and reveal_steps (B, N) to (B, N).
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    return torch.where(reveal_steps < step, tokens, mask_id)


def path_logprobs(
    logits: Float[Tensor, "B N V"],
    tokens: Int[Tensor, "B N"],
    reveal_steps: Int[Tensor, "B N"],
    step: int,
    temperature: float = 1.0,
    allowed: Bool[Tensor, "*#B V"] | None = None,
) -> Float[Tensor, "B N"]:
    """The log-probs of the tokens fixed at one step of the recorded path, 0 elsewhere.

    log softmax(logits / temperature)[token] where reveal_steps = step.

    Every token is fixed at one step, so the sum over steps is the log-prob of each token, (B, N), at its own place: the
    input of any token objective, with the mask reveal_steps >= 0, less the steps that are not replayed. With one token
    a step this is the chain rule, the exact log-prob of the image in the recorded order; with more, tokens of a step
    are taken as independent, as they were sampled.

    Shapes: logits of the model at ``masked_input`` of this step (guided by ``guide_logits`` as at sampling) (B, N, V),
    the others (B, N), to float32 (B, N). Range: <= 0.
    Raises: InputError for a negative temperature.
    Differs from the paper: no paper given. The order is not scored.
    """
    logprobs = token_logprobs(logits, tokens, temperature, allowed)
    return torch.where(reveal_steps == step, logprobs, 0.0)


def mask_draws(
    seeds: Sequence[int], num_tokens: int, draws: int, schedule: Literal["cosine", "uniform"] = "cosine"
) -> Bool[Tensor, "B K N"]:
    """Random masks of an image, to estimate its log-prob (UniGRPO, arXiv:2505.15809; MaskGRPO, arXiv:2510.02880).

    u_k = (k + u) / draws, one in each equal part; num_masked = ceil(num_tokens cos(pi u_k / 2)) (``cosine``: the
    generator's own ratios) or floor(num_tokens u_k) + 1 (``uniform``: 1 .. num_tokens alike); positions uniform.

    The masks are a function of the seeds: new, behavior and reference policy are scored under the *same* ones.

    Shapes: B seeds to (B, K, N), True where masked, on the CPU. At least one token is masked in each draw.
    Raises: InputError for no draw or no token, or an unknown schedule.
    Differs from the paper: one draw in each part of the schedule, where UniGRPO spreads them from a random start.
    """
    if draws < 1 or num_tokens < 1:
        raise InputError(f"{draws} mask draws of {num_tokens} tokens: use 1 or more of both")
    noise = uniform_noise(seeds, (draws, num_tokens + 1)).double()
    u = (torch.arange(draws) + noise[..., 0]) / draws  # (B, K)
    if schedule == "cosine":
        num_masked = torch.ceil(num_tokens * torch.cos(math.pi * u / 2))
    elif schedule == "uniform":
        num_masked = torch.floor(num_tokens * u) + 1
    else:
        raise InputError(f"mask schedule={schedule!r} is unknown: use cosine or uniform")
    rank = noise[..., 1:].argsort(dim=-1, stable=True).argsort(dim=-1)
    return rank < num_masked.clamp(1, num_tokens)[..., None]


def with_complements(masks: Bool[Tensor, "B K N"]) -> Bool[Tensor, "B K2 N"]:
    """Each mask, then its complement, so that every token is scored once by the two (coupled masks, arXiv:2506.20639).

    A mask of all tokens, whose complement would score none, is repeated instead.

    Shapes: (B, K, N) to (B, 2 K, N).
    Raises: nothing.
    Differs from the paper: the repetition.
    """
    whole = masks.all(dim=2, keepdim=True)
    return torch.stack([masks, torch.where(whole, masks, ~masks)], dim=2).flatten(1, 2)


def monte_carlo_logprob(
    logprobs: Float[Tensor, "B K N"], masks: Bool[Tensor, "B K N"], how: Literal["mean", "elbo"] = "mean"
) -> Float[Tensor, " B"]:
    """The estimated log-prob of an image from its masked tokens under K random masks.

    m_k the number of masked tokens; mean_k (1 / m_k) sum_masked log p (``mean``, in nats per token; UniGRPO,
    arXiv:2505.15809), or mean_k (N / m_k) sum_masked log p (``elbo``, in nats; LLaDA, arXiv:2502.09992): with masks of
    the ``uniform`` schedule that is an unbiased estimate of a lower bound of the log-prob.

    A ratio of two such estimates is 1 for equal policies only under the same masks.

    Shapes: logprobs of all tokens given the rest of each draw, and masks (B, K, N), to float32 (B,). What stands at
    places that are not masked never matters.
    Raises: InputError for an unknown ``how``.
    Differs from the paper: no.
    """
    if how not in ("mean", "elbo"):
        raise InputError(f"monte carlo how={how!r} is unknown: use mean or elbo")
    total = torch.where(masks, logprobs.float(), 0.0).sum(dim=2)
    per_token = total / masks.sum(dim=2).clamp(min=1)
    return per_token.mean(dim=1) * (masks.shape[2] if how == "elbo" else 1)
