"""The base class of policies around a model of ``transformers``: precision, limits, checkpointing, batches, files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdaptablePolicy, Expert
from lvrpo.types import OutputKind, Parts, Prompt

MAX_TOKENS = 32768
"""Limit of the padded tokens in one pass of the transformer."""
TEXT_TOKENS = 512
"""Default limit of a generated text."""
THINK_THEN_ANSWER = "Think about the question step by step, then say the answer."
"""Instruction before prompts of the task ``reason`` that are answered by text."""
THINK_THEN_DRAW = (
    "Think about what a picture of the following should show, describe it in a few sentences, then draw it."
)
"""Instruction before prompts of the task ``reason`` that ask for an image."""
OUTPUTS: tuple[tuple[OutputKind, ...], ...] = (("text",), ("image",), ("text", "image"))
"""Those of a model that draws from text alone."""


class LibraryPolicy(AdaptablePolicy):
    """A policy around models of a library, which stay in evaluation mode, with a compute dtype and a token limit."""

    def __init__(self) -> None:
        super().__init__()
        self.max_tokens = MAX_TOKENS
        self.checkpointed = False
        self._autocast: torch.dtype | None = None

    @property
    @abstractmethod
    def base_weight(self) -> torch.Tensor:
        """A weight that no adapter replaces; its device and dtype are the policy's."""

    @property
    def device(self) -> torch.device:
        return self.base_weight.device

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode: dropout would make a replay differ from its rollout."""
        return super().train(False)

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Multiplies matrices in this dtype from now on (autocast), whatever the weights are kept in."""
        self._autocast = None if dtype == self.base_weight.dtype else dtype

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context that ``set_compute_dtype`` selected."""
        return nullcontext() if self._autocast is None else torch.autocast(self.device.type, dtype=self._autocast)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of matrix products."""
        return self._autocast or self.base_weight.dtype

    def limit_tokens(self, limit: int | None) -> None:
        """See ``Policy.limit_tokens``; a row of more goes through alone."""
        self.max_tokens = limit or MAX_TOKENS

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Splits rows, as indices, into batches of at most ``max_tokens`` tokens when padded to the longest."""
        parts: list[list[int]] = []
        longest = 0
        for i, length in enumerate(lengths):
            if parts and max(longest, length) * (len(parts[-1]) + 1) <= self.max_tokens:
                parts[-1].append(i)
                longest = max(longest, length)
            else:
                parts.append([i])
                longest = length
        return parts


class TransformersPolicy(LibraryPolicy):
    """A policy around one model of transformers."""

    expert_prefixes: ClassVar[Mapping[Expert, tuple[str, ...]]] = {}
    """Beginnings of the names of the parameters of each expert, within ``model``; all others are shared."""

    def __init__(self, model: Any) -> None:
        """``model``: with a language head. Any: of an optional package."""
        super().__init__()
        self.model = model.eval()

    @property
    def base_weight(self) -> torch.Tensor:
        """The embedding of text tokens."""
        return self.model.get_input_embeddings().weight

    @property
    def positions(self) -> int:
        """The most tokens of a row."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def longest_text(self) -> int:
        """Default limit of a generated text: 512 tokens, or half the positions of a small model."""
        return max(1, min(TEXT_TOKENS, self.positions // 2))

    def require_positions(self, lengths: Iterable[int]) -> None:
        """Raises InputError where a row has more tokens than the model has positions; sampled ones were checked."""
        if (longest := max(lengths, default=0)) > self.positions:
            raise InputError(
                f"a text of {longest} tokens with its answer or image: the limit is {self.positions}: shorten it"
            )

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by expert, as ``expert_prefixes`` says."""
        groups: dict[str, list[nn.Parameter]] = {"understand": [], "generate": [], "shared": []}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                of = (expert for expert, begin in self.expert_prefixes.items() if name.startswith(begin))
                groups[next(of, "shared")].append(parameter)
        return groups

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether layers of the transformer and of its vision encoder are computed again in the backward pass."""
        self.checkpointed = on
        for layer in self._checkpointed_layers():
            layer.gradient_checkpointing = on
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    def _checkpointed_layers(self) -> list[Any]:
        """Any: a class of transformers, which computes a layer again where it is told to and is in training mode."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [layer for layer in self.model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    @contextmanager
    def checkpointing(self) -> Iterator[None]:
        """Layers are checkpointed only in training mode, which they are in here alone, without their dropout."""
        layers = self._checkpointed_layers() if self.checkpointed else []
        for layer in layers:
            layer.training = torch.is_grad_enabled()
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False

    # --- files ---

    def stored_name(self, name: str) -> str:
        """Without the name of the whole model, which is of this policy."""
        return name.removeprefix("model.")

    @classmethod
    @abstractmethod
    def read_folder(cls, folder: Path, dtype: torch.dtype, *, weights: bool) -> Self:
        """The policy of a folder on the CPU; without ``weights``, its parameters are on the meta device."""

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads a folder in the published layout, weights in one file or in shards; runs no code of it.

        ``dtype``: None is float32 on a CPU, bfloat16 elsewhere. Raises InputError, one line, for another model's
        folder, missing or damaged files, tensors that are missing or do not fit, and without the model's library.
        """
        return cls.read_folder(Path(folder), dtype or default_dtype(device), weights=True).to(device)

    @classmethod
    def from_config(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """See ``EstimablePolicy.from_config``."""
        return cls.read_folder(Path(folder), dtype or default_dtype(device), weights=False)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype of weights that are loaded without a dtype: float32 on a CPU, bfloat16 elsewhere."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def require_drawn_from_text(prompt: Prompt, kind: str) -> None:
    """Raises InputError for what a model cannot do that answers about images and draws from text alone.

    ``kind``: name of the model in messages, such as "a Show-o".
    """
    named = f"prompt {prompt.id!r}"
    images = any(isinstance(part, torch.Tensor) for part in prompt.parts)
    if prompt.output not in OUTPUTS:
        raise InputError(f"{named}: {kind} answers, draws, or thinks and draws, not {', '.join(prompt.output)}")
    if "image" in prompt.output and images:
        raise InputError(f"{named}: {kind} draws from text alone, not from an image: leave the image out")
    if prompt.task == "understand" and not images:
        raise InputError(f"{named}: task 'understand' needs an image: give one")


def require_one_image(named: str, parts: Parts, kind: str) -> None:
    """Raises InputError for several images, of which a model reads one; ``named`` begins the message."""
    images = sum(isinstance(part, torch.Tensor) for part in parts)
    if images > 1:
        raise InputError(f"{named}: {images} images: {kind} reads one: give one")


def require_room(prompt: Prompt, length: int, new: int, limit: int) -> None:
    """Raises InputError where the tokens of a prompt and those after it are more than the model has places for."""
    if length + new > limit:
        raise InputError(
            f"prompt {prompt.id!r}: {length} tokens and {new} after them, the limit is {limit}: shorten it, or write "
            "less (max_new_tokens)"
        )


def require_layer(layer: int, depth: int) -> None:
    """Raises InputError for the states of a layer that a model does not have."""
    if not 0 <= layer <= depth:
        raise InputError(f"layer={layer}: the policy has {depth} layers")


TOGETHER = 1024
"""Rows are parted by their lengths where so many tokens, padding included, remain together."""


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows that are padded to one length: few are less than three quarters of the longest.

    Of the longest rows first; rows of one part keep their order.
    """
    parts: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[parts[-1][0]] if parts else 0
        if not parts or (4 * lengths[i] < 3 * longest and longest * len(parts[-1]) >= TOGETHER):
            parts.append([i])
        else:
            parts[-1].append(i)
    return [sorted(part) for part in parts]
