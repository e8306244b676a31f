"""A base class for policies of one's own: everything that has a sensible default, so that little is left to write."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Self

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.base import FeatureLoss, Sampling, TokenCounts
from lvrpo.types import (
    SEGMENT_KINDS,
    Example,
    Group,
    Image,
    Part,
    Parts,
    Prompt,
    SegmentKind,
    SegmentLogprobs,
    Task,
    Trajectory,
)


class PolicyDefaults(nn.Module, ABC):
    """A policy of which ``segment_kinds``, ``sample``, ``logprobs``, ``save`` and ``load`` are left to write.

    What it cannot do by default (judge, draw by a flow, train on examples) raises InputError that names the method.
    """

    segment_kinds: tuple[SegmentKind, ...]
    """The kinds of segments that its outputs may be made of."""

    @abstractmethod
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """As ``Policy.sample``."""

    @abstractmethod
    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """As ``Policy.logprobs``."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes config.json, whose ``model_type`` is this class as my_package.module:Class, and the weights."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads what ``save`` wrote."""

    # --- what has a default ---

    @property
    def image_size(self) -> int | None:
        """None: images of any size."""
        return None

    def make_reference(self) -> Self:
        """A copy that no update reaches."""
        return copy.deepcopy(self).eval().requires_grad_(False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """That of the first parameter."""
        return next(self.parameters()).dtype

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All trainable parameters under "shared"."""
        return {"shared": [p for p in self.parameters() if p.requires_grad]}

    def default_sampling(self, task: Task) -> Sampling:
        """``Sampling()``."""
        return Sampling()

    def timestep_shift(self) -> float:
        """1: no shift."""
        return 1.0

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """A token per four letters and per 16 x 16 pixels."""
        texts = sum(len(part) for part in trajectory.prompt.parts if isinstance(part, str))
        pixels = sum(part[0].numel() for part in trajectory.prompt.parts if not isinstance(part, str))
        drawn = 0 if trajectory.image is None else trajectory.image[0].numel()
        return TokenCounts(texts // 4 + pixels // 256 + 1, len(trajectory.text or "") // 4 + 1, drawn // 256)

    def limit_tokens(self, limit: int | None) -> None:
        """Does nothing: a batch goes through at once."""

    def checkpoint_gradients(self, on: bool) -> None:
        """Does nothing: layers are remembered."""

    def check_text(self, text: str) -> None:
        """Accepts every text."""

    # --- what it cannot do unless written ---

    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """Needed by policies that draw by a flow."""
        raise self._lacks("velocity", "draws by no flow")

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Needed by rewards that ask the reading side."""
        raise self._lacks("text_logprob", "cannot judge texts: use rewards that ask no judge")

    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = (0.0, 1.0),
    ) -> torch.Tensor:
        """Needed by rewards that ask the drawing side."""
        raise self._lacks("image_logprob", "cannot judge pictures: use rewards that ask no judge")

    def reading_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """Needed by the reward ``semantic``."""
        raise self._lacks("reading_states", "shows no inner states")

    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: FeatureLoss | None = None
    ) -> Mapping[str, torch.Tensor]:
        """Needed by supervised training."""
        raise self._lacks("supervised_losses", "cannot be trained on examples")

    def _lacks(self, method: str, words: str) -> InputError:
        return InputError(f"{type(self).__name__}: {words}, or write its method {method!r}")
