"""Sections for drawings in discrete tokens: image tokens one after another, and masked ones a few at a time.

What trains them are the objectives of text (``training/text.py``); their log-probs are kept and replayed by the policy.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lvrpo.policies.base import MaskedScoring
from lvrpo.training.text import TextConfig
from lvrpo.types import LogitGuidance


class ImageTokensConfig(TextConfig):
    """How image tokens are trained: ``kind``, bounds, divergence, entropy, weight and rate as those of text.

    ``reduction=constant`` divides by the tokens of a drawing, all of which count: it is ``trajectory``.
    """

    guided_logprobs: LogitGuidance = "joint"
    """Of the logits that guidance mixes: joint: both branches have a gradient; detach_uncond: the one with the prompt
    alone, for half the memory; none (masked.likelihood=monte_carlo): the log-probs are unguided."""


class MaskedConfig(ImageTokensConfig):
    """How masked image tokens are trained: as image tokens, with a choice of their likelihood.

    With monte_carlo ``reduction=constant`` divides by them all too, and a draw counts by how much it masks.
    """

    likelihood: Literal["path", "monte_carlo"] = "path"
    """path: the exact log-probs of the steps as they were sampled; monte_carlo: of random parts given the rest, the
    same parts for the trained weights and the reference (UniGRPO, arXiv:2505.15809; MaskGRPO, arXiv:2510.02880)."""
    draws: int = Field(default=2, ge=1, le=1000)
    """monte_carlo: masks per drawing, each a sequence of its own to ``reduction`` and to kind=gspo."""
    schedule: Literal["cosine", "uniform"] = "cosine"
    """monte_carlo: of the shares that are masked; cosine: those that the sampler meets; uniform: all alike, with which
    the estimate bounds the log-prob."""

    @model_validator(mode="after")
    def _draws_are_used(self) -> Self:
        for name in ("draws", "schedule"):
            value = getattr(self, name)
            if self.likelihood == "path" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name}={value}: is of likelihood=monte_carlo: set that, or leave it out")
        return self

    @property
    def scoring(self) -> MaskedScoring:
        """What a policy is told of it."""
        return MaskedScoring(self.guided_logprobs, self.likelihood, self.draws, self.schedule)
