"""MMaDA as a policy: answers by masked decoding in blocks; images are those of its base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lvrpo.policies.adapter import Modules
from lvrpo.policies.base import Sampling, TokenCounts
from lvrpo.policies.magvit.checkpoint import save_weights
from lvrpo.policies.magvit.policy import MagvitPolicy
from lvrpo.policies.masked_text import MaskedPass, MaskedTextPolicy
from lvrpo.policies.mmada.checkpoint import WEIGHTS, load_mmada, stored_name, stored_names
from lvrpo.policies.mmada.layout import MmadaLayout
from lvrpo.types import TaskKind, TextSegment, Trajectory

HEAD = 513
"""The most places of an image's row before <|soi|>, as in training."""


class MmadaPolicy(MaskedTextPolicy, MagvitPolicy[MmadaLayout]):
    """MMaDA of any size: Gen-Verse/MMaDA-8B-Base and MMaDA-8B-MixCoT.

    The transformer is ``LlamaForCausalLM`` of transformers without its causal mask, with LLaDA's weights.
    """

    kind: ClassVar[str] = "an MMaDA"
    load_parts = staticmethod(load_mmada)
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"model\.model\.(?P<expert>layers)\.\d+\.self_attn\.[qkvo]_proj",
        "mlp": r"model\.model\.(?P<expert>layers)\.\d+\.mlp\.(gate|up|down)_proj",
    }

    def __init__(self, *parts: Any) -> None:
        """``parts``: as of ``MagvitPolicy``. Any: as there."""
        super().__init__(*parts)
        self.end_ids = {self.layout.end, self.layout.turn_end}

    @property
    def caption_limit(self) -> int:
        """Without its task and two outer tokens."""
        return min(HEAD, self.positions - self.image_tokens - 2) - 3

    def default_sampling(self, task: TaskKind) -> Sampling:
        """The published settings: images in 15 steps at guidance 3.5, which is 4.5 here (``guide_logits``)."""
        return Sampling(
            max_new_tokens=min(256 if task == "reason" else 128, self.longest_text),
            num_steps=min(15, self.image_tokens),
            guidance_scale=4.5,
            choice_temperature=1.0,
            block_length=32,
            tokens_per_step=2,
        )

    def answer_logits(self, contexts: Sequence[Sequence[int]], passes: Sequence[MaskedPass]) -> Iterator[torch.Tensor]:
        """See ``MaskedTextPolicy.answer_logits``; over the whole vocabulary."""
        mask, rows = self.layout.mask, []
        for context, one in zip(contexts, passes, strict=True):
            rows.append([*context, *(mask if token < 0 else token for token in one.tokens.tolist())])
        for part in self.cut([len(row) for row in rows]):
            for i, states in zip(part, self._states([rows[i] for i in part]), strict=True):
                with self.autocast():  # not around the yield, which would leave it on in the caller
                    logits = self.model.lm_head(states[len(contexts[i]) + passes[i].places.to(self.device)])
                yield logits

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """See ``Policy.count_tokens``; each pass over an answer reads its whole row."""
        context, text = len(self.segment_context(trajectory.prompt, (), "text")), 0
        texts = [segment for segment in trajectory.segments if isinstance(segment, TextSegment)]
        for segment in texts:
            text += sum(context + len(one.tokens) for one in self.text_passes(segment))
        image = 0
        if trajectory.image is not None:
            image = len(self.segment_context(trajectory.prompt, texts, "masked")) + self.image_tokens + 2
        return TokenCounts(0, text, image)

    # --- weights ---

    def stored_name(self, name: str) -> str:
        """The name of a module in MMaDA's own files."""
        return stored_name(name.removeprefix("model."))

    def save_parts(self, folder: Path) -> None:
        """See ``MagvitPolicy.save_parts``."""
        tensors = self.model.state_dict()
        save_weights({theirs: tensors[own] for own, theirs in stored_names(self.model).items()}, folder / WEIGHTS)
        self.layout.save(folder)
