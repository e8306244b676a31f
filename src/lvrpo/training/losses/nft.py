"""DiffusionNFT (arXiv:2509.16117): contrastive flow matching on good and bad samples at fresh noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import nft_loss, reward_probability
from lvrpo.training.losses.base import Microbatch
from lvrpo.training.losses.flow import FreshNoiseConfig, FreshNoiseObjective, Noised

if TYPE_CHECKING:
    from jaxtyping import Float


class NFTConfig(FreshNoiseConfig):
    """DiffusionNFT."""

    kind: Literal["nft"] = "nft"
    beta: float = Field(default=0.5, gt=0)
    """Weight of the policy in the implicit policies: v+ = beta v + (1 - beta) v_old."""


class NFT(FreshNoiseObjective):
    """DiffusionNFT (arXiv:2509.16117)."""

    purpose = "nft"
    config: NFTConfig

    def _policy_loss(
        self, noised: Noised, v: Float[torch.Tensor, "B N C"], v_old: Float[torch.Tensor, "B N C"], batch: Microbatch
    ) -> tuple[Float[torch.Tensor, " B"], dict[str, torch.Tensor]]:
        config = self.config
        q = reward_probability(batch.advantages(), config.advantage_max).repeat_interleave(config.timesteps_per_sample)
        state = noised.x_t, noised.t, noised.x_0, q.to(noised.x_0)
        return nft_loss(v, v_old, None, *state, beta=config.beta, advantage_max=config.advantage_max).policy, {}
