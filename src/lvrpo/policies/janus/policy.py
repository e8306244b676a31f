"""Janus as a policy: reads images and answers, thinks, and draws image tokens one after another, with guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from lvrpo.errors import InputError
from lvrpo.policies.adapter import Expert, Modules
from lvrpo.policies.base import Sampling
from lvrpo.policies.image_tokens import ImageTokenPolicy, Row
from lvrpo.policies.janus.processor import FILES, PATCH, Processor
from lvrpo.policies.tile_codebook import TileCodebook
from lvrpo.policies.tokenizer_files import stored_files
from lvrpo.policies.transformers_checkpoint import load_model, save_model
from lvrpo.types import Image, OutputKind, Part, Parts, TaskKind

DECODED = 16
"""Images that go through the autoencoder at once."""


class JanusPolicy(ImageTokenPolicy):
    """Janus and Janus-Pro of any size, as ``JanusForConditionalGeneration`` of transformers computes them.

    In the ids of a row ``PATCH`` is a patch of an image that is read, and an image token c is vocabulary_size + c. The
    unconditional branch of guidance has padding in the place of the prompt.
    """

    kind = "a Janus"
    adapter_patterns: ClassVar[Mapping[Modules, str]] = {
        "attention": r"model\.model\.(?P<expert>language_model)\.layers\.\d+\.self_attn\.[qkvo]_proj",
        "mlp": r"model\.model\.(?P<expert>language_model)\.layers\.\d+\.mlp\.(gate|up|down)_proj",
        "connector": r"model\.model\.(?P<expert>aligner|generation_aligner)\.(fc1|hidden_layers\.\d+)",
        "head": r"model\.(model\.)?(?P<expert>lm_head|generation_head)(\.proj_out|\.vision_head)?",
        "tower": r"model\.model\.(?P<expert>vision_model)\..+",
    }

    expert_prefixes: ClassVar[Mapping[Expert, tuple[str, ...]]] = {
        "understand": ("model.vision_model.", "model.aligner.", "lm_head."),
        "generate": ("model.generation_",),
    }

    def __init__(self, model: Any, processor: Processor, tiles: TileCodebook | None = None) -> None:
        """``model``: a JanusForConditionalGeneration. Any: of an optional package. Its autoencoder stays frozen."""
        super().__init__(model)
        self.processor = processor
        self.tiles = tiles
        vision = model.config.vision_config
        self.end_id, self.pad_id = processor.ids["eos_token"], processor.ids["pad_token"]
        self.side = int(vision.image_size)
        self.token_side = self.side // round(vision.num_image_tokens**0.5)
        model.model.vqmodel.requires_grad_(False)

    @property
    def transformer(self) -> Any:
        """Any: of an optional package."""
        return self.model.model.language_model

    def default_sampling(self, task: TaskKind) -> Sampling:
        """Guidance 5, as published; texts of up to 512 tokens, or of half the positions of a small model."""
        return Sampling(max_new_tokens=self.longest_text, guidance_scale=5.0)

    def drawn_size(self, sampling: Sampling) -> tuple[int, int]:
        """The one size that it draws; raises InputError for another."""
        own = (self.side, self.side)
        if sampling.image_size not in (None, own):
            raise InputError(
                f"image_size={sampling.image_size}: this model draws {self.side} x {self.side}: leave the size out"
            )
        return own

    # --- text ---

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        self.processor.check_text(text)

    def answer_ids(self, parts: Parts, text: str) -> list[int]:
        """See ``ImageTokenPolicy.answer_ids``; a space separates the text from its prompt."""
        return self.processor.answer(text)

    def decode_text(self, ids: Sequence[int]) -> str:
        """See ``ImageTokenPolicy.decode_text``; markers and outer spaces are removed."""
        return self.processor.decode(ids)

    # --- images ---

    @torch.no_grad()
    def decode_images(self, codes: torch.Tensor) -> list[Image]:
        """See ``ImageTokenPolicy.decode_images``."""
        if self.tiles is not None:
            return list(self.tiles.decode(codes.flatten(1)))
        vqmodel, found = self.model.model.vqmodel, []
        with torch.autocast(self.device.type, enabled=False):
            for part in codes.flatten(1).to(self.device).split(DECODED):
                found += list(self.processor.image_settings.images(vqmodel.decode(part)).cpu())
        return found

    @torch.no_grad()
    def encode_image(self, image: Image) -> torch.Tensor:
        """Quantizes an image with the tile codebook, or else with the model's own autoencoder."""
        pixels = self.processor.image_settings.pixels([image])
        if self.tiles is not None:
            tokens = self.tiles.encode(list(self.processor.image_settings.images(pixels)))
        else:
            pixels = pixels.to(self.device, self.model.lm_head.weight.dtype)
            with torch.autocast(self.device.type, enabled=False):
                tokens = self.model.model.vqmodel.encode(pixels).image_tokens
        return tokens.view(-1, self.side // self.token_side).cpu()

    # --- rows ---

    def context(self, parts: Parts, output: Sequence[OutputKind]) -> Row:
        """See ``ImageTokenPolicy.context``; uses the chat template of the folder."""
        images = tuple(part for part in parts if isinstance(part, torch.Tensor))
        return Row(tuple(self.processor.prompt(parts, "image" in output)), images)

    def start_image(self, size: tuple[int, int]) -> list[int]:
        """The marker that begins an image."""
        return [self.processor.ids["boi_token"]]

    def without_prompt(self, row: Row, size: tuple[int, int]) -> Row:
        """Replaces all ids except the markers of start and image by padding."""
        kept = (self.processor.ids["bos_token"], self.processor.ids["boi_token"])
        return Row(tuple(i if i in kept else self.pad_id for i in row.ids))

    def input_row(self, part: Part) -> tuple[Row, list[int]]:
        """See ``ImageTokenPolicy.input_row``; begins with the marker of a text or of an image."""
        markers = self.processor.ids
        if isinstance(part, str):
            begin, ids, images = [markers["bos_token"]], self.processor.tokenize(part), ()
        else:
            begin, ids = [markers["bos_token"], markers["boi_token"]], [PATCH] * self.processor.patches
            images = (part,)
        return Row((*begin, *ids), images), list(range(len(begin), len(begin) + len(ids)))

    def code_ids(self, codes: torch.Tensor) -> torch.Tensor:
        """Offsets codes by the vocabulary size."""
        return codes + self.processor.vocabulary_size

    def image_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of the generation head."""
        return self.model.model.generation_head(states)

    def embed(self, ids: torch.Tensor, images: Sequence[Image]) -> torch.Tensor:
        """Embeds text tokens, image tokens, and patches of images by the understanding encoder."""
        vocabulary = self.processor.vocabulary_size
        x = self.model.get_input_embeddings()(ids.clamp(0, vocabulary - 1))
        drawn, read = ids >= vocabulary, ids == PATCH
        if drawn.any():
            codes = self.model.prepare_embeddings_for_image_generation(ids[drawn] - vocabulary)
            x = x.masked_scatter(drawn[..., None], codes.to(x.dtype))
        if read.any():
            x = x.masked_scatter(read[..., None], self._read(images).to(x.dtype))
        return x

    def _read(self, images: Sequence[Image]) -> torch.Tensor:
        """Encodes images for reading: (B * patches, D). Each distinct image is encoded once."""
        distinct = {id(image): image for image in images}
        places = {key: i for i, key in enumerate(distinct)}
        pixels = self.processor.image_settings.pixels(list(distinct.values())).to(self.device)
        features = self.model.model.get_image_features(pixels).pooler_output
        order = torch.tensor([places[id(image)] for image in images], device=self.device)
        return features.index_select(0, order).flatten(0, 1)

    # --- weights ---

    def save_model(self, folder: Path) -> None:
        """Writes a folder that ``JanusForConditionalGeneration.from_pretrained`` reads too."""
        save_model(self.model, folder)
        self.processor.save(folder)
        if self.tiles is not None:
            self.tiles.save(folder)

    @classmethod
    def read_folder(cls, folder: Path, dtype: torch.dtype, *, weights: bool) -> Self:
        """See ``TransformersPolicy.read_folder``."""
        model = load_model(folder, dtype, cls.kind, "janus", weights=weights)
        vision, vocabulary = model.config.vision_config, model.config.text_config.vocab_size
        side, patch = vision.image_size, vision.patch_size
        if vision.num_image_tokens != (side // patch) ** 2:
            raise InputError(
                f"{folder / 'config.json'}: num_image_tokens={vision.num_image_tokens}: images of {side} x {side} in "
                f"patches of {patch} x {patch} have {(side // patch) ** 2}: restore the file"
            )
        files = stored_files(folder, FILES)
        processor = Processor.from_files(files, folder, vision.num_image_tokens, vision.image_size, vocabulary)
        patch_size = round(vision.image_size / vision.num_image_tokens**0.5)
        tiles = TileCodebook.load(folder, model.config.vq_config.num_embeddings, patch_size)
        return cls(model, processor, tiles)
