"""Advantage-weighted matching (AWM, arXiv:2509.25050): the negative flow-matching loss replaces the log-prob."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field

from lvrpo.algorithms import clipped_surrogate
from lvrpo.training.losses.base import Microbatch
from lvrpo.training.losses.flow import FreshNoiseConfig, FreshNoiseObjective, Noised

if TYPE_CHECKING:
    from jaxtyping import Float


class AWMConfig(FreshNoiseConfig):
    """Advantage-weighted matching."""

    kind: Literal["awm"] = "awm"
    clip_low: float = Field(default=1e-3, gt=0, lt=1)
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=1e-3, gt=0)
    """The ratio is clipped above 1 + clip_high."""


class AWM(FreshNoiseObjective):
    """The clipped surrogate with -|v - (noise - x_0)|^2 as log-prob."""

    purpose = "awm"
    config: AWMConfig

    def _policy_loss(
        self, noised: Noised, v: Float[torch.Tensor, "B N C"], v_old: Float[torch.Tensor, "B N C"], batch: Microbatch
    ) -> tuple[Float[torch.Tensor, " B"], dict[str, torch.Tensor]]:
        config = self.config
        logprobs, behavior = -noised.flow_loss(v)[:, None], -noised.flow_loss(v_old)[:, None]
        A = batch.advantages().clamp(-config.advantage_max, config.advantage_max)
        A = A.repeat_interleave(config.timesteps_per_sample)[:, None].to(logprobs)
        surrogate = clipped_surrogate(
            logprobs,
            behavior,
            A,
            torch.ones_like(logprobs, dtype=torch.bool),
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        return surrogate.loss_terms[:, 0], {"clip_fraction/flow": surrogate.clipped.float().mean()}
