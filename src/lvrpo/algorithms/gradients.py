"""Gradients of several tasks: their agreement, and the combination of conflicting ones.

Each of K tasks has a list of tensors, one per parameter, in the same order. All functions depend only on the K x K
matrix of inner products, and all combinations are weighted sums. Inner products are additive over parameters, so the
matrix of a model is the sum of those of its layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = [
    "balance_norms",
    "balance_weights",
    "combine_gradients",
    "cosine_matrix",
    "gram_matrix",
    "project_conflicts",
    "projection_weights",
]


def gram_matrix(gradients: Sequence[Sequence[Tensor]]) -> Float[Tensor, "K K"]:
    """The inner products of the tasks' gradients.

    gram_ij = sum over parameters of <g_i, g_j>.

    Shapes: K lists of tensors, alike in number and shapes, to float64 (K, K) on the CPU. Units: squared gradients; the
    diagonal holds the squared norms.
    Raises: InputError for no task, or for lists of different lengths.
    Differs from the paper: no paper given.
    """
    if not gradients or len({len(task) for task in gradients}) != 1:
        raise InputError(f"gradients of {len(gradients)} tasks: give one list per task, all of one length")
    K = len(gradients)
    gram = torch.zeros(K, K, dtype=torch.float64)
    for tensors in zip(*gradients, strict=True):
        flat = torch.stack([tensor.detach().flatten() for tensor in tensors]).float()
        gram += (flat @ flat.T).double().cpu()
    return gram


def cosine_matrix(gram: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """Cosine similarity of the tasks' gradients.

    cos_ij = gram_ij / sqrt(gram_ii gram_jj).

    Shapes: (K, K), as from ``gram_matrix``, to (K, K). Range: [-1, 1], diagonal 1; nan in the row and column of a task
    without a gradient.
    Raises: nothing.
    Differs from the paper: no paper given.
    """
    norms = gram.diagonal().sqrt()
    return (gram / norms[:, None] / norms[None, :]).clamp(-1, 1)


def projection_weights(gram: Float[Tensor, "K K"], seed: int = 0) -> Float[Tensor, " K"]:
    """The weight of each task's gradient after conflicts are projected out (PCGrad, arXiv:2001.06782).

    For every task i: h_i = g_i; for the other tasks j in random order: if <h_i, g_j> < 0,
    h_i = h_i - <h_i, g_j> / |g_j|^2 g_j. The update is sum_i h_i = sum_j weights_j g_j.

    Shapes: (K, K), as from ``gram_matrix``, to (K,). Range: >= 1; all 1 where no two tasks conflict.
    Raises: nothing. A task without a gradient is not projected on.
    Differs from the paper: no; the h_i are expressed in the g_j, so only inner products are needed. The order is a
    function of the seed.
    """
    K = len(gram)
    inner = gram.tolist()
    draw = random.Random(seed)
    total = [0.0] * K
    for i in range(K):
        h = [float(j == i) for j in range(K)]  # of g_0 .. g_{K-1}
        for j in draw.sample([j for j in range(K) if j != i], K - 1):
            conflict = sum(h[k] * inner[k][j] for k in range(K))
            if conflict < 0 and inner[j][j] > 0:
                h[j] -= conflict / inner[j][j]
        total = [have + new for have, new in zip(total, h, strict=True)]
    return torch.tensor(total, dtype=gram.dtype)


def balance_weights(gram: Float[Tensor, "K K"], shares: Float[Tensor, " K"] | None = None) -> Float[Tensor, " K"]:
    """Weights that scale all tasks' gradients to equal norms, or to norms proportional to ``shares``.

    weights_i = share_i m / |g_i|;  m = mean |g| over the tasks that have a gradient, and shares have a mean of 1 over
    them.

    Shapes: gram (K, K), as from ``gram_matrix``, and shares (K,) to (K,). Range: >= 0; 0 for a task without a gradient.
    Raises: InputError for a negative share, or if no task with a gradient has a positive one.
    Differs from the paper: no paper given.
    """
    norms = gram.diagonal().sqrt()
    present = norms > 0
    shares = torch.ones_like(norms) if shares is None else shares.to(norms)
    count = present.sum().clamp(min=1)
    mean_share = torch.where(present, shares, 0.0).sum() / count
    if (shares < 0).any() or (present.any() and mean_share <= 0):
        raise InputError(f"gradient shares={shares.tolist()}: use 0 or more, and a positive one for some task")
    m = norms.sum() / count
    return torch.where(present, shares / mean_share * m / norms, 0.0)


def combine_gradients(gradients: Sequence[Sequence[Tensor]], weights: Float[Tensor, " K"]) -> list[Tensor]:
    """The weighted sum of the tasks' gradients, one tensor per parameter.

    g = sum_i weights_i g_i.

    Shapes: K lists of tensors and weights (K,) to one list. Gradients of weight 0 are ignored and may be nan.
    Raises: InputError if the numbers of tasks and of weights differ.
    Differs from the paper: no paper given.
    """
    if len(gradients) != len(weights):
        raise InputError(f"{len(weights)} weights for {len(gradients)} tasks: give one per task")
    pairs = [(task, weight) for task, weight in zip(gradients, weights.tolist(), strict=True) if weight != 0]
    if not pairs:
        return [torch.zeros_like(tensor) for tensor in gradients[0]]
    first, weight = pairs[0]
    out = [tensor * weight for tensor in first]
    for task, weight in pairs[1:]:
        for have, tensor in zip(out, task, strict=True):
            have.add_(tensor, alpha=weight)
    return out


def project_conflicts(gradients: Sequence[Sequence[Tensor]], seed: int = 0) -> list[Tensor]:
    """The sum of the tasks' gradients with conflicts projected out (PCGrad, arXiv:2001.06782).

    combine_gradients(gradients, projection_weights(gram_matrix(gradients), seed)).

    Shapes: K lists of tensors to one list.
    Raises: InputError as ``gram_matrix``.
    Differs from the paper: as ``projection_weights``.
    """
    return combine_gradients(gradients, projection_weights(gram_matrix(gradients), seed))


def balance_norms(gradients: Sequence[Sequence[Tensor]], shares: Float[Tensor, " K"] | None = None) -> list[Tensor]:
    """The sum of the tasks' gradients, scaled to equal norms or to norms proportional to ``shares``.

    combine_gradients(gradients, balance_weights(gram_matrix(gradients), shares)).

    Shapes: K lists of tensors and shares (K,) to one list.
    Raises: InputError as ``gram_matrix`` and ``balance_weights``.
    Differs from the paper: no paper given.
    """
    return combine_gradients(gradients, balance_weights(gram_matrix(gradients), shares))
