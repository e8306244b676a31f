"""Direct preference optimization for text and for flows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from lvrpo.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["PreferenceLoss", "dpo_loss", "flow_dpo_loss", "flow_matching_loss"]


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss per pair, each (B,)."""

    loss: Tensor
    """To minimize; log 2 if the policy is the reference."""
    margin: Tensor
    """z, detached: the implicit reward margin of the winner over the loser; > 0: correctly ranked."""


def dpo_loss(
    winner_logprobs: Float[Tensor, " B"],
    loser_logprobs: Float[Tensor, " B"],
    ref_winner_logprobs: Float[Tensor, " B"],
    ref_loser_logprobs: Float[Tensor, " B"],
    *,
    beta: float,
) -> PreferenceLoss:
    """The DPO loss of preference pairs (arXiv:2305.18290).

    z = beta [(winner - ref_winner) - (loser - ref_loser)];  loss = -log sigmoid(z).

    Shapes: all (B,), log-probs of whole outputs: the *sum* over tokens. To (B,). Pairs come from a corpus, or from the
    policy's own groups (``preference_pairs``). Beta about 0.1: the larger, the closer to the reference.
    Raises: InputError for beta <= 0.
    Differs from the paper: no. The reference gets no gradient.
    """
    _check_beta(beta)
    winner = winner_logprobs.float() - ref_winner_logprobs.detach().float()
    loser = loser_logprobs.float() - ref_loser_logprobs.detach().float()
    z = beta * (winner - loser)
    return PreferenceLoss(loss=-functional.logsigmoid(z), margin=z.detach())


def flow_dpo_loss(
    winner_loss: Float[Tensor, " B"],
    loser_loss: Float[Tensor, " B"],
    ref_winner_loss: Float[Tensor, " B"],
    ref_loser_loss: Float[Tensor, " B"],
    *,
    beta: float,
) -> PreferenceLoss:
    """DPO with flow-matching losses in place of log-probs (Diffusion-DPO, arXiv:2311.12908; Flow-DPO,
    arXiv:2501.13918).

    z = -(beta / 2) [(winner_loss - ref_winner_loss) - (loser_loss - ref_loser_loss)];  loss = -log sigmoid(z).

    All four losses of a pair must use the *same time and noise*, whose effect on a loss is much larger than that of the
    policy and cancels only then.

    Shapes: all (B,), as from ``flow_matching_loss``, to (B,). Units: the losses are means over latent dimensions, as in
    the authors' code, hence betas of 100 .. 5000; for sums divide beta by the number of dimensions.
    Raises: InputError for beta <= 0.
    Differs from the paper: beta is the same at all times (Flow-DPO finds that best); Diffusion-DPO writes beta T
    omega(t).
    """
    _check_beta(beta)
    winner = winner_loss.float() - ref_winner_loss.detach().float()
    loser = loser_loss.float() - ref_loser_loss.detach().float()
    z = -beta / 2 * (winner - loser)
    return PreferenceLoss(loss=-functional.logsigmoid(z), margin=z.detach())


def flow_matching_loss(
    v: Float[Tensor, " B *shape"], x0: Float[Tensor, " B *shape"], noise: Float[Tensor, " B *shape"]
) -> Float[Tensor, " B"]:
    """The squared error of a velocity at x_t = (1 - t) x0 + t noise (rectified flow, arXiv:2209.03003).

    mean |v - (noise - x0)|^2 over all but the first axis.

    Shapes: v, x0 and noise (B, N, C) to (B,), float32. Range: >= 0; its minimum over v is not 0 but the variance of
    noise - x0 given x_t.
    Raises: nothing.
    Differs from the paper: time runs from data (0) to noise (1) here, so the target has the other sign.
    """
    return (v.float() - (noise.float() - x0.float())).square().flatten(1).mean(dim=1)


def _check_beta(beta: float) -> None:
    if beta <= 0:
        raise InputError(f"preference beta={beta}: use a positive number")
