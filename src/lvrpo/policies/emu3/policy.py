"""Emu3 as a policy: reads images as image tokens and answers, thinks, and draws line by line, with guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from lvrpo.errors import InputError
from lvrpo.images import to_pil
from lvrpo.policies.adapter import Modules
from lvrpo.policies.base import Sampling
from lvrpo.policies.image_text_to_text import Chat
from lvrpo.policies.image_tokens import ImageTokenPolicy, Row
from lvrpo.policies.latent_cache import LatentCache
from lvrpo.policies.transformers_checkpoint import CONFIG, load_model, save_model
from lvrpo.types import Image, OutputKind, Part, Parts, TaskKind

KIND = "an Emu3"
DRAWN_PIXELS = 720 * 720
"""Default size of an image."""
DECODED = 4
"""Images that go through the autoencoder at once."""
TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: {% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{{ ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""The default chat template."""


class Emu3Policy(ImageTokenPolicy):
    """Emu3-Chat and Emu3-Gen, as ``Emu3ForConditionalGeneration`` of transformers computes them.

    Texts and image tokens share one vocabulary and one head. An image is announced by its height and width in tokens;
    every line of it ends with a token that is not sampled. The unconditional branch of guidance has an empty prompt.
    """

    kind = KIND
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"model\.model\.(?P<expert>text_model)\.layers\.\d+\.self_attn\.[qkvo]_proj",
        "mlp": r"model\.model\.(?P<expert>text_model)\.layers\.\d+\.mlp\.(gate|up|down)_proj",
    }

    def __init__(self, model: Any, chat: Chat) -> None:
        """``model``: an Emu3ForConditionalGeneration, whose autoencoder stays frozen. Any: of an optional package.

        Raises InputError where tokenizer, processor, vocabulary and autoencoder are not of one model.
        """
        super().__init__(model)
        self.chat, self._read = chat, LatentCache()
        processor, vqmodel = chat.processor, model.model.vqmodel.requires_grad_(False)
        self.token_side = vqmodel.vision_spatial_factor
        sides = {processor.downsample_ratio, processor.image_processor.spatial_factor, self.token_side}
        if len(sides) > 1:
            raise InputError(
                f"{chat.folder}: image tokens of {' and of '.join(map(str, sorted(sides)))} pixels: use the processor "
                "and the weights of one model"
            )
        named: Mapping[str, int] = model.config.vocabulary_map or {}
        size, codes = model.config.text_config.vocab_size, model.config.vq_config.codebook_size
        known = {int(name[-8:-2]): i for name, i in named.items() if name.startswith("<|visual token ")}
        if sorted(known) != list(range(codes)):
            raise InputError(
                f"{chat.folder}: {CONFIG} names {len(known)} image tokens in vocabulary_map, the autoencoder has "
                f"{codes}: use the files of one model"
            )
        self.register_buffer("codes", torch.tensor([known[c] for c in range(codes)]), persistent=False)
        tokenizer = chat.tokenizer
        markers = [tokenizer.eos_token_id, tokenizer.pad_token_id]
        line_end, self.image_id = named.get("<|extra_200|>", size), named.get("<image>", size)
        if (
            None in markers
            or max(*markers, line_end, self.image_id, *known.values()) >= size
            or tokenizer.convert_tokens_to_ids("<image>") != self.image_id
        ):
            raise InputError(f"{chat.folder}: its tokenizer does not fit vocabulary_map in {CONFIG}: use one model's")
        self.text_tokens = torch.ones(size, dtype=torch.bool)
        self.text_tokens[[*known.values(), line_end, self.image_id]] = False
        (self.end_id, self.pad_id), self.line_end = markers, line_end

    codes: torch.Tensor
    """int64 (K,): the id of every code."""

    @property
    def transformer(self) -> Any:
        """Any: of an optional package."""
        return self.model.model.text_model

    def default_sampling(self, task: TaskKind) -> Sampling:
        """Guidance 3, as published; texts of up to 512 tokens, or of half the positions of a small model."""
        return Sampling(max_new_tokens=self.longest_text, guidance_scale=3.0)

    def drawn_size(self, sampling: Sampling) -> tuple[int, int]:
        """Any multiple of ``token_side``; by default 720 x 720, as published, or the largest that the model reads."""
        if sampling.image_size is None:
            side = int(min(DRAWN_PIXELS, self.chat.processor.image_processor.max_pixels) ** 0.5)
            side = max(1, side // self.token_side) * self.token_side
            return side, side
        if min(sampling.image_size) < 1 or any(side % self.token_side for side in sampling.image_size):
            raise InputError(
                f"image_size={sampling.image_size}: this model draws in tokens of {self.token_side} x "
                f"{self.token_side}: use multiples of {self.token_side}"
            )
        return sampling.image_size

    # --- text ---

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        self.chat.check_text(text)

    def answer_ids(self, parts: Parts, text: str) -> list[int]:
        """See ``ImageTokenPolicy.answer_ids``; separated from the prompt as the chat template does."""
        return [*self.chat.answer(parts, text), self.end_id]

    def decode_text(self, ids: Sequence[int]) -> str:
        """See ``ImageTokenPolicy.decode_text``; markers and outer spaces are removed."""
        return self.chat.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def _encoded(self, text: str) -> list[int]:
        return self.chat.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    # --- images ---

    @torch.no_grad()
    def decode_images(self, codes: torch.Tensor) -> list[Image]:
        """See ``ImageTokenPolicy.decode_images``."""
        settings, found = self.chat.processor.image_processor, []
        mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        with torch.autocast(self.device.type, enabled=False):
            for part in codes.to(self.device).split(DECODED):
                pixels = self.model.model.vqmodel.decode(part).float().cpu()
                found += list((pixels * std + mean).clamp(0, 1))
        return found

    def encode_image(self, image: Image) -> torch.Tensor:
        """Quantizes an image with the model's own autoencoder, at the size that its image processor selects."""
        return self._read.get(image, None, self._encode)

    @torch.no_grad()
    def _encode(self, image: Image) -> torch.Tensor:
        made = self.chat.processor.image_processor(images=[to_pil(image)], return_tensors="pt")
        with torch.autocast(self.device.type, enabled=False):
            found = self.model.model.vqmodel.encode(made["pixel_values"].to(self.device), made["image_sizes"])
        return found.image_tokens[0].cpu()

    # --- rows ---

    def context(self, parts: Parts, output: Sequence[OutputKind]) -> Row:
        """See ``ImageTokenPolicy.context``: the bare text before an image, a chat before an answer or a plan."""
        if output == ("image",):
            for part in parts:
                self.check_text(str(part))
            return Row((self.chat.tokenizer.bos_token_id, *self._encoded("\n".join(map(str, parts)))))
        ids = self.chat.read(parts).ids
        lines = [self._lines(part) for part in parts if isinstance(part, torch.Tensor)]
        if lines:
            ids = ids.masked_scatter(ids == self.image_id, torch.cat(lines))
        return Row(tuple(ids.tolist()))

    def _lines(self, image: Image) -> torch.Tensor:
        """Ids of an image, ends of lines included, (h * (w + 1),)."""
        return self.image_ids(self.encode_image(image))

    def start_image(self, size: tuple[int, int]) -> list[int]:
        """Height and width in tokens, between the markers of an image and of its tokens."""
        processor, (h, w) = self.chat.processor, self._grid(size)
        return self._encoded(f"{processor.image_start_token}{h}*{w}{processor.fake_token_around_image}")

    def without_prompt(self, row: Row, size: tuple[int, int]) -> Row:
        """The row of an empty prompt."""
        return Row((self.chat.tokenizer.bos_token_id, *self.start_image(size)))

    def input_row(self, part: Part) -> tuple[Row, list[int]]:
        """See ``ImageTokenPolicy.input_row``; the positions skip the ends of lines."""
        begin = [self.chat.tokenizer.bos_token_id]
        if isinstance(part, str):
            self.check_text(part)
            ids = self._encoded(part)
            return Row((*begin, *ids)), list(range(1, 1 + len(ids)))
        h, w = self.encode_image(part).shape
        begin += self.start_image((h * self.token_side, w * self.token_side))
        places = [len(begin) + y * (w + 1) + x for y in range(h) for x in range(w)]
        return Row((*begin, *self._lines(part).tolist())), places

    def code_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Looks codes up in the vocabulary."""
        return self.codes[codes]

    def image_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of the language head for image tokens alone, to which published sampling restricts a line too."""
        return self.model.lm_head(states)[..., self.codes]

    # --- files ---

    def save_model(self, folder: Path) -> None:
        """Writes a folder that ``Emu3ForConditionalGeneration.from_pretrained`` reads too."""
        save_model(self.model, folder)
        self.chat.save(folder)

    @classmethod
    def read_folder(cls, folder: Path, dtype: torch.dtype, *, weights: bool) -> Self:
        """See ``TransformersPolicy.read_folder``."""
        model = load_model(folder, dtype, KIND, "emu3", weights=weights)
        return cls(model, Chat.load(folder, TEMPLATE))
