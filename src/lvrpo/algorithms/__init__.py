"""The equations of post-training: pure functions on tensors, usable in any loop."""

from lvrpo.algorithms.advantages import (
    best_worst_mask,
    centered_advantages,
    gdpo_advantages,
    group_relative_advantages,
    leave_one_out_advantages,
    signal_mask,
    win_rate,
)
from lvrpo.algorithms.audit import VarianceShares, advantage_parts, group_correlation, variance_shares
from lvrpo.algorithms.kl import gaussian_kl, k1, k2, k3, velocity_regularizer
from lvrpo.algorithms.nft import NFTLoss, nft_loss, old_policy_decay, reward_probability
from lvrpo.algorithms.objectives import SurrogateLoss, clipped_surrogate, reduce_tokens

__all__ = [
    "NFTLoss",
    "SurrogateLoss",
    "VarianceShares",
    "advantage_parts",
    "best_worst_mask",
    "centered_advantages",
    "clipped_surrogate",
    "gaussian_kl",
    "gdpo_advantages",
    "group_correlation",
    "group_relative_advantages",
    "k1",
    "k2",
    "k3",
    "leave_one_out_advantages",
    "nft_loss",
    "old_policy_decay",
    "reduce_tokens",
    "reward_probability",
    "signal_mask",
    "variance_shares",
    "velocity_regularizer",
    "win_rate",
]
