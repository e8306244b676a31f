"""What goes through a policy at once, so that a run fits into its memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.policies.base import Policy


class LimitsConfig(Config):
    """Limits in tokens: of pictures, texts and prompts, a prompt that several members share counted once.

    They move results by rounding alone.
    """

    hints: ClassVar[Mapping[str, str]] = {"backward_members": "is called {section}.microbatch_size"}

    forward_tokens: int | None = Field(default=None, ge=1)
    """At once where no gradient is kept: sampling, judging. None: the policy's own limit (BAGEL: 32768). The tiny
    policy goes by rows, 512 at once, whatever is set here."""
    backward_tokens: int | None = Field(default=None, ge=1)
    """At once where a gradient is kept, every trained step and every branch of guidance counted."""
    microbatch_size: int | None = Field(default=None, ge=1)
    """The same, in drawings, each at ``flow.timesteps_per_sample`` times; texts: eight times as many. None, and no
    ``backward_tokens``: 192, which suits small policies."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass instead of being remembered: a third more time, a fraction of the
    memory. So are recorded steps of drawings, twice the time: one of them is remembered at once."""

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if self.backward_tokens is not None and self.microbatch_size is not None:
            raise ValueError(
                f"limits.backward_tokens={self.backward_tokens} and limits.microbatch_size={self.microbatch_size}: "
                "two limits of one thing: give one of them"
            )
        return self

    def apply(self, policy: Policy) -> None:
        """Sets a policy up."""
        policy.limit_tokens(self.forward_tokens)
        policy.checkpoint_gradients(self.gradient_checkpointing)
