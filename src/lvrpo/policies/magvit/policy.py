"""The base of policies that read and generate MAGVIT-v2 tokens: Show-o, MMaDA."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch

from lvrpo.atomic_io import write_atomic
from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.defaults import TokenPolicy
from lvrpo.policies.magvit.autoencoder import Magvit
from lvrpo.policies.magvit.checkpoint import CONFIG, save_autoencoder
from lvrpo.policies.magvit.layout import RowBatch, TokenLayout, square
from lvrpo.policies.tile_codebook import TileCodebook
from lvrpo.policies.transformers_checkpoint import json_bytes
from lvrpo.policies.transformers_policy import (
    THINK_THEN_ANSWER,
    THINK_THEN_DRAW,
    TransformersPolicy,
    require_drawn_from_text,
    require_layer,
    require_one_image,
)
from lvrpo.sampling import guide_logits
from lvrpo.types import (
    Group,
    Image,
    LogitGuidance,
    Part,
    Parts,
    Prompt,
    Segment,
    SegmentKind,
    TaskKind,
    TextSegment,
)

L = TypeVar("L", bound=TokenLayout)
KEPT = 4096
"""Read images whose codes are remembered."""


class MagvitPolicy(TokenPolicy, TransformersPolicy, Generic[L]):
    """A causal language model of transformers under the mask of its layout, with image tokens in its vocabulary.

    Guidance is classifier-free: the unconditional branch has an empty text. With ``("text", "image")`` the plan follows
    the prompt's text in the row of the image. A model says its rows (``TokenLayout``) and how it writes.
    """

    segment_kinds: tuple[SegmentKind, ...] = ("text", "masked")
    tasks: tuple[TaskKind, ...] = ("understand", "generate", "reason")
    """Without ``edit``, which it was not trained for."""
    kind: ClassVar[str]
    """Name of the model in messages, such as "a Show-o"."""
    layout: L
    load_parts: ClassVar[Callable[[Path, torch.dtype, bool], tuple[Any, Magvit, Any, dict[str, Any]]]]
    """Transformer at a dtype, autoencoder (float32), layout and config.json of a folder, on the CPU.

    The flag says whether weights are read; parameters are on the meta device otherwise. Raises InputError, one line.
    Any: of an optional package; a layout; decoded JSON."""

    def __init__(
        self, model: Any, magvit: Magvit, layout: L, stored: Mapping[str, Any], tiles: TileCodebook | None = None
    ) -> None:
        """``model``: of transformers, with ``lm_head``; ``stored``: the content of config.json.

        Any: of an optional package; decoded JSON. The autoencoder stays frozen and float32.
        """
        super().__init__(model)
        self.magvit = magvit.eval().requires_grad_(False)
        self.layout = layout
        self.stored = dict(stored)
        self.end_id = layout.end
        self.image_tokens = int(stored["num_vq_tokens"])
        self.text_tokens = layout.text_tokens(self.model.lm_head.out_features)
        self.tiles = tiles
        self._codes: dict[bytes, torch.Tensor] = {}

    # --- what a model says ---

    @property
    @abstractmethod
    def caption_limit(self) -> int:
        """The most text tokens in the row of an image."""

    @abstractmethod
    def save_parts(self, folder: Path) -> None:
        """Writes the weights of the transformer and the files of the tokenizer, as published."""

    # --- files ---

    def save_model(self, folder: Path) -> None:
        """Writes the published layout, with the autoencoder in a subfolder, and the policy's own codebook, if any."""
        folder.mkdir(parents=True, exist_ok=True)
        self.save_parts(folder)
        save_autoencoder(self.magvit, folder)
        write_atomic(folder / CONFIG, json_bytes(self.stored))
        if self.tiles is not None:
            self.tiles.save(folder)

    @classmethod
    def read_folder(cls, folder: Path, dtype: torch.dtype, *, weights: bool) -> Self:
        """See ``TransformersPolicy.read_folder``."""
        model, magvit, layout, stored = cls.load_parts(folder, dtype, weights)
        tiles = TileCodebook.load(folder, magvit.config.codes, magvit.config.patch_size)
        return cls(model, magvit, layout, stored, tiles)

    # --- sizes ---

    @property
    def drawn_side(self) -> int:
        """Side of an image in pixels."""
        return round(self.image_tokens**0.5) * self.magvit.config.patch_size

    def choice_temperature(self, sampling: Sampling, step: int) -> float:
        """Multiplied by 1 - (s + 1) / num_steps at every step s, as Show-o and MMaDA do; the last is 0."""
        temperature = sampling.choice_temperature
        for s in range(step + 1):
            temperature *= 1 - (s + 1) / sampling.num_steps
        return temperature

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        self.layout.check_text(text)

    # --- rollout ---

    @torch.no_grad()
    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; raises InputError for what the model cannot do."""
        for prompt in prompts:
            self.check_prompt(prompt, sampling)
        return super().sample(prompts, sampling, seeds)

    def check_prompt(self, prompt: Prompt, sampling: Sampling) -> None:
        """See ``PolicyDefaults.check_prompt``."""
        named = f"prompt {prompt.id!r}"
        require_drawn_from_text(prompt, self.kind)
        require_one_image(named, prompt.parts, self.kind)
        side = self.drawn_side
        if "image" in prompt.output and sampling.image_size not in (None, (side, side)):
            raise InputError(f"image_size={sampling.image_size}: this model draws {side} x {side}: leave the size out")
        rows = []
        if "text" in prompt.output:
            rows.append((len(self.segment_context(prompt, (), "text")), sampling.max_new_tokens, self.positions))
        if "image" in prompt.output:
            plan = sampling.max_new_tokens if "text" in prompt.output else 0
            context = self.segment_context(prompt, (), "masked")
            rows.append((len(context) - len(self.layout.caption([])), plan, self.caption_limit))
        for length, new, limit in rows:
            if length + new > limit:
                after = f" and {new} after them (max_new_tokens)" if new else ""
                raise InputError(f"{named}: {length} tokens{after}, the limit is {limit}: shorten it")

    # --- tokens ---

    def encode_text(self, text: str) -> list[int]:
        """Ids of an answer."""
        return self.layout.encode(text)

    def decode_text(self, ids: Sequence[int]) -> str:
        """The text of ids, the end token skipped."""
        return self.layout.decode(ids)

    @torch.no_grad()
    def encode_image(self, image: Image) -> torch.Tensor:
        """The codes of an image of any size, int64 (N,), on the CPU; those of equal images are remembered."""
        key = hashlib.blake2b(image.cpu().contiguous().numpy().tobytes(), digest_size=16).digest() + bytes(
            str(tuple(image.shape)), "ascii"
        )
        if key not in self._codes:
            if len(self._codes) >= KEPT:
                self._codes.pop(next(iter(self._codes)))
            self._codes[key] = self._encoded(square(image, self.drawn_side))
        return self._codes[key]

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.tiles is not None:
            return self.tiles.encode([pixels / 2 + 0.5])[0]
        with torch.autocast(self.device.type, enabled=False):
            return self.magvit.encode(pixels[None].to(self.device))[0].cpu()

    @torch.no_grad()
    def decode_image(self, codes: torch.Tensor) -> Image:
        """The image of codes (N,), on the CPU."""
        if self.tiles is not None:
            return self.tiles.decode(codes[None])[0]
        with torch.autocast(self.device.type, enabled=False):
            return (self.magvit.decode(codes[None].to(self.device))[0].cpu() / 2 + 0.5).clamp(0, 1)

    def context_ids(self, parts: Parts, segments: Sequence[Segment] = ()) -> list[int]:
        """The row before an answer; see ``segment_context`` for that before an image."""
        require_one_image(f"{_text(parts)[:40]!r}", parts, self.kind)
        images = [part for part in parts if isinstance(part, torch.Tensor)]
        return self.layout.question(self.encode_image(images[0]) if images else None, _text(parts))

    def segment_context(self, prompt: Prompt, segments: Sequence[Segment], kind: SegmentKind) -> list[int]:
        """The row before an answer or a plan, or before the image tokens of an image: the prompt, then its plan.

        Raises InputError for an image or a text that has no place in it.
        """
        if kind == "text":
            first = {"reason": THINK_THEN_DRAW if "image" in prompt.output else THINK_THEN_ANSWER}.get(prompt.task)
            return self.context_ids((*([first] if first else []), *prompt.parts))
        require_drawn_from_text(prompt, self.kind)
        text = self.layout.encode(_text(prompt.parts))
        for segment in segments:
            assert isinstance(segment, TextSegment)
            text += segment.tokens[: -1 if segment.ended else None].tolist()
        if len(text) > self.caption_limit:
            raise InputError(f"prompt {prompt.id!r}: {len(text)} tokens, the limit is {self.caption_limit}: shorten it")
        return self.layout.caption(text)

    # --- the transformer ---

    def _states(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The final states of rows, each (L, D)."""
        self.require_positions(map(len, rows))
        found: list[torch.Tensor] = []
        for part in self.cut([len(row) for row in rows]):
            batch = self.layout.padded([rows[i] for i in part])
            states = self._run(batch).last_hidden_state
            found += [states[k, : len(rows[i])] for k, i in enumerate(part)]
        return found

    def _run(self, batch: RowBatch, **settings: Any) -> Any:
        """Any: options and outputs of an optional package."""
        with self.autocast(), self.checkpointing():
            return self.model.model(
                input_ids=batch.ids.to(self.device),
                attention_mask=batch.seen[:, None].to(self.device),
                position_ids=batch.places.to(self.device),
                use_cache=False,
                **settings,
            )

    def image_logits(
        self, contexts: Sequence[Sequence[int]], tokens: torch.Tensor, masked: bool, scale: float, mode: LogitGuidance
    ) -> torch.Tensor:
        """See ``TokenPolicy.image_logits``; both branches of guidance are one batch unless one has no gradient."""
        codes = tokens.tolist()
        if scale == 1 or mode == "none":
            return guide_logits(self._code_logits(contexts, codes), None, scale, mode)
        free = [self.layout.caption([])] * len(codes)
        if mode == "detach_uncond":
            with torch.no_grad():
                other = self._code_logits(free, codes)
            return guide_logits(self._code_logits(contexts, codes), other, scale, mode)
        logits = self._code_logits([*contexts, *free], [*codes, *codes])
        return guide_logits(logits[: len(codes)], logits[len(codes) :], scale, mode)

    def _code_logits(self, contexts: Sequence[Sequence[int]], codes: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits of image tokens, in their places: (B, N, K)."""
        states = torch.stack([own[1:-1] for own in self._image_states(contexts, codes)])
        first = self.layout.first_code
        with self.autocast():
            return self.model.lm_head(states)[..., first : first + self.layout.codes]

    def _image_states(self, contexts: Sequence[Sequence[int]], codes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The final states of an image's tokens and of its two markers after each context, each (N + 2, D)."""
        rows = [self.layout.drawing(context, row) for context, row in zip(contexts, codes, strict=True)]
        return [own[-self.image_tokens - 2 :] for own in self._states(rows)]

    @torch.no_grad()
    def hidden_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """See ``Policy.hidden_states``; after the last layer the states are normed."""
        require_layer(layer, len(self.model.model.layers))
        found = []
        for part in parts:
            if isinstance(part, str):
                row, own = [self.layout.start, *self.layout.encode(part)], slice(1, None)
            else:
                row, own = self.layout.read(self.encode_image(part)), slice(2, -1)
            out = self._run(self.layout.padded([row]), output_hidden_states=True)
            found.append(out.hidden_states[layer][0, own])
        return found


def _text(parts: Parts) -> str:
    return "\n".join(part for part in parts if isinstance(part, str))
