"""What goes through a policy at once, so that a run fits into its memory."""

from __future__ import annotations

from pydantic import Field

from lvrpo.config import Config
from lvrpo.policies.base import Policy


class LimitsConfig(Config):
    """Limits in tokens: of pictures, texts and prompts, a prompt that several members share counted once.

    They move results by rounding alone.
    """

    forward_tokens: int | None = Field(default=None, ge=1)
    """At once where no gradient is kept: sampling, judging. None: the policy's own limit (BAGEL: 32768)."""
    backward_tokens: int | None = Field(default=None, ge=1)
    """At once where a gradient is kept, every trained step and every branch of guidance counted. None: 192 drawings or
    1536 texts, which suits small policies."""
    gradient_checkpointing: bool = False
    """Layers are computed again in the backward pass instead of being remembered: a third more time, a fraction of the
    memory."""

    def apply(self, policy: Policy) -> None:
        """Sets a policy up."""
        policy.limit_tokens(self.forward_tokens)
        policy.checkpoint_gradients(self.gradient_checkpointing)
