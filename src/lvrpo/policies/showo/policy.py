"""Show-o as a policy: answers by causal text after images that it reads whole; images are those of its base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from lvrpo.policies.adapter import Modules
from lvrpo.policies.base import Sampling
from lvrpo.policies.decoding import Decoder, generate_text, read_rows, text_segment
from lvrpo.policies.magvit.checkpoint import WEIGHTS, save_weights
from lvrpo.policies.magvit.layout import RowBatch
from lvrpo.policies.magvit.policy import MagvitPolicy
from lvrpo.policies.showo.checkpoint import LANGUAGE, PREFIX, load_showo
from lvrpo.policies.showo.layout import HEAD, ShowoLayout
from lvrpo.sampling import derive_seed, token_scores, uniform_noise
from lvrpo.types import Segment, SegmentLogprobs, TaskKind


class ShowoPolicy(MagvitPolicy[ShowoLayout]):
    """Show-o of any size whose images are read as image tokens: showlab/show-o and show-o-512x512.

    The transformer is ``PhiForCausalLM`` of transformers under Show-o's attention mask.
    """

    kind: ClassVar[str] = "a Show-o"
    load_parts = staticmethod(load_showo)
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"model\.model\.(?P<expert>layers)\.\d+\.self_attn\.([qkv]_proj|dense)",
        "mlp": r"model\.model\.(?P<expert>layers)\.\d+\.mlp\.(fc1|fc2)",
    }

    @property
    def caption_limit(self) -> int:
        """Without its task and two end tokens."""
        return HEAD - 3

    def default_sampling(self, task: TaskKind) -> Sampling:
        """The published settings: 50 steps at guidance 5, which is 6 here (``guide_logits``)."""
        return Sampling(
            max_new_tokens=64 if task == "reason" else 100,
            num_steps=min(50, self.image_tokens),
            guidance_scale=6.0,
            choice_temperature=1.0,
        )

    # --- texts ---

    def encode_text(self, text: str) -> list[int]:
        """Ids of an answer, which one space parts from its question."""
        return self.layout.encode(f" {text}")

    def _sample_text(self, contexts: list[list[int]], seeds: Sequence[int], sampling: Sampling) -> Iterable[Segment]:
        """Samples text with a KV cache; every distinct context is read once."""
        out: dict[int, Segment] = {}
        allowed, embed = self.text_tokens.to(self.device), self.model.model.embed_tokens
        for part in self.cut([len(context) + sampling.max_new_tokens for context in contexts]):
            u = uniform_noise([derive_seed(seeds[i], "write") for i in part], (sampling.max_new_tokens,))
            own = [tuple(contexts[i]) for i in part]
            row_of = {context: row for row, context in enumerate(dict.fromkeys(own))}
            with self.autocast():
                decoder = self._decoder(self.layout.padded(list(row_of), left=True))
                decoder.reserve(sampling.max_new_tokens)
                found = generate_text(
                    *(decoder, [row_of[context] for context in own], embed, self.model.lm_head),
                    *({self.end_id}, u.to(self.device), sampling.temperature, allowed),
                )
            for i, ids in zip(part, found, strict=True):
                out[i] = text_segment(ids, {self.end_id}, sampling.temperature, self.decode_text)
        return [out[i] for i in range(len(contexts))]

    def _decoder(self, rows: RowBatch) -> Decoder:
        """Reads rows that are padded on the left."""
        x, valid = self.model.model.embed_tokens(rows.ids.to(self.device)), rows.valid.long().to(self.device)
        return read_rows(self.model.model, x, valid, rows.places.to(self.device), rows.seen[:, None].to(self.device))

    def next_logits(self, rows: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """See ``TokenPolicy.next_logits``; over the whole vocabulary."""
        with self.autocast():
            return [self.model.lm_head(states) for states in self._states(rows)]

    def _score(self, contexts: list[list[int]], segments: Sequence[Any]) -> Iterable[SegmentLogprobs]:
        """As ``TokenPolicy``'s; logits of a text alone, as the vocabulary is mostly image tokens. Any: as there."""
        if segments[0].kind != "text":
            yield from super()._score(contexts, segments)
            return
        tokens, allowed = [segment.tokens.to(self.device) for segment in segments], self.text_tokens.to(self.device)
        rows = [[*context, *own.tolist()[:-1]] for context, own in zip(contexts, tokens, strict=True)]
        for context, own, states in zip(contexts, tokens, self._states(rows), strict=True):
            with self.autocast():
                logits = self.model.lm_head(states[len(context) - 1 :])
            yield SegmentLogprobs(*token_scores(logits, own, segments[0].temperature, allowed))

    # --- images ---

    def _image_states(self, contexts: Sequence[Sequence[int]], codes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """As ``MagvitPolicy``'s; every distinct context is read once, as its text sees no image token.

        With gradient checkpointing every row is whole.
        """
        if self.checkpointed:
            return super()._image_states(contexts, codes)
        found: dict[int, torch.Tensor] = {}
        images = torch.tensor([self.layout.drawing([], row) for row in codes], device=self.device)
        for part in self.cut([len(context) + images.shape[1] for context in contexts]):
            of_length: dict[int, list[int]] = {}
            for i in part:
                of_length.setdefault(len(contexts[i]), []).append(i)
            for rows in of_length.values():
                with self.autocast():
                    states = self._states_after([tuple(contexts[i]) for i in rows], images[rows])
                found.update(zip(rows, states, strict=True))
        return [found[i] for i in range(len(contexts))]

    def _states_after(self, contexts: Sequence[tuple[int, ...]], images: torch.Tensor) -> torch.Tensor:
        """Final states (B, n, D) of images (B, n) after contexts of one length, as padding would move sums."""
        row_of = {context: row for row, context in enumerate(dict.fromkeys(contexts))}
        decoder = self._decoder(self.layout.captions(list(row_of)))
        decoder.select([row_of[context] for context in contexts])
        (B, n), before = images.shape, len(contexts[0])
        seen = torch.ones(B, 1, n, before + n, dtype=torch.bool, device=self.device)
        places = torch.arange(HEAD, HEAD + n, device=self.device).expand(B, -1)
        return decoder.forward(self.model.model.embed_tokens(images), seen, places, decoder.cache)

    # --- weights ---

    def stored_name(self, name: str) -> str:
        """The parameter's name in Show-o's own files."""
        return "showo." + name.removeprefix("model.")

    def save_parts(self, folder: Path) -> None:
        """See ``MagvitPolicy.save_parts``; the tokenizer is in the subfolder of the language model."""
        state = {PREFIX + name: tensor for name, tensor in self.model.state_dict().items()}
        save_weights(state, folder / f"{WEIGHTS}.safetensors")
        (folder / LANGUAGE).mkdir(exist_ok=True)
        self.layout.save(folder / LANGUAGE)
