"""Janus's processor: prompts to ids, images to normalized pixels and back, and the files that say how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, field_validator
from tokenizers import Tokenizer
from torch.nn import functional

from lvrpo.config import Config, parse_section
from lvrpo.errors import InputError
from lvrpo.policies.tokenizer_files import StoredFiles, parse_tokenizer
from lvrpo.reading import parse_json
from lvrpo.types import Image, Parts

FILES = (
    *(
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
    ),
    *("processor_config.json", "preprocessor_config.json", "generation_config.json"),
)
"""Files of a folder in the layout of transformers besides config.json and the weights, saved unchanged."""
PATCH = -1
"""Id that stands for one patch of an image in a prompt."""
TOKENS: Mapping[str, str | None] = {
    **dict.fromkeys(("bos_token", "eos_token", "pad_token")),
    "image_token": "<image_placeholder>",
    "boi_token": "<begin_of_image>",
    "eoi_token": "<end_of_image>",
}
"""The markers that a tokenizer_config.json names, with their defaults."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|User|>: ' if message.role == 'user' else '<|Assistant|>: ' }}"
    "{% for part in message.content %}{{ '' if loop.first else '\\n' }}"
    "{{ '<image_placeholder>' if part.type == 'image' else part.text | trim }}{% endfor %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)
"""The default chat template."""


class ImageSettings(Config):
    """Size and normalization of images for the encoders, from the image processor of transformers."""

    size: int = Field(ge=1)
    """Side of the square that an image is fitted into and padded to."""
    min_size: int = Field(default=14, ge=1)
    """The shorter side has at least so many pixels."""
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    resample: int = Field(default=3, ge=2, le=3)
    """A number of PIL: 2 bilinear, 3 bicubic."""

    @field_validator("size", mode="before")
    @classmethod
    def _side(cls, size: object) -> object:
        """Any of the ways in which transformers writes the side of a square."""
        if isinstance(size, dict) and len({*size.values()}) == 1 and set(size) <= {"height", "width", "longest_edge"}:
            return next(iter(size.values()))
        return size

    def pixels(self, images: Sequence[Image]) -> torch.Tensor:
        """Images of any size to normalized pixels (B, 3, size, size): fitted, padded to a square, normalized."""
        square = torch.stack([self._square(image.float()) for image in images])
        return (square - _channels(self.image_mean, square)) / _channels(self.image_std, square)

    def images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalized pixels (B, 3, H, W) to images in [0, 1]."""
        return (pixels.float() * _channels(self.image_std, pixels) + _channels(self.image_mean, pixels)).clamp(0, 1)

    def _square(self, image: Image) -> torch.Tensor:
        height, width = image.shape[1:]
        if (height, width) != (self.size, self.size):
            scale = self.size / max(height, width)
            fitted = [max(round(side * scale), self.min_size) for side in (height, width)]
            image = resize_in_8_bits(image, fitted[0], fitted[1], "bilinear" if self.resample == 2 else "bicubic")
        height, width = image.shape[1:]
        side = max(height, width)
        ground = [int(255 * mean) / 255 for mean in self.image_mean]
        square = torch.tensor(ground).to(image)[:, None, None].repeat(1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = image
        return square


def resize_in_8_bits(image: Image, height: int, width: int, mode: str) -> Image:
    """An image of another size, as PIL resizes it: along rows, then columns, in 8 bits."""
    for size in ((image.shape[1], width), (height, width)):
        image = functional.interpolate(image[None], size, mode=mode, align_corners=False, antialias=True)[0]
        image = (image.clamp(0, 1) * 255).round() / 255
    return image


def _channels(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device)[:, None, None]


@dataclass(frozen=True, eq=False)
class Processor(StoredFiles):
    """Tokenizer, chat template and image settings of a folder; never changed after it is made."""

    tokenizer: Tokenizer
    ids: Mapping[str, int]
    """Ids of the markers in ``TOKENS``, such as boi_token."""
    template: Template
    """Chat template."""
    system_prompt: str
    """Before prompts that are answered by text alone; empty where the folder asks for none."""
    image_settings: ImageSettings
    patches: int
    """Patches of an image that is read."""
    vocabulary_size: int
    files: Mapping[str, bytes]

    def prompt(self, parts: Parts, draws: bool) -> list[int]:
        """Ids of a user's message and the start of the answer, ``PATCH`` once per patch of an image.

        ``draws``: whether an image is to follow, which transformers' processor asks for without its system prompt.
        """
        for part in parts:
            if isinstance(part, str):
                self.check_text(part)
        image, begin, end = (self._marker(name) for name in ("image_token", "boi_token", "eoi_token"))
        content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
        try:
            text = self.template.render(
                messages=[{"role": "user", "content": content}],
                add_generation_prompt=True,
                bos_token="",
                eos_token=self._marker("eos_token"),
            )
        except Exception as error:  # a template may fail in any way
            raise InputError(f"chat template: {' '.join(str(error).split())}: restore the folder's template") from None
        if not draws:
            text = self.system_prompt + text
        ids = self._encoded(text.replace(image, f"{begin}{image * self.patches}{end}"))
        return [self.ids["bos_token"], *(PATCH if i == self.ids["image_token"] else i for i in ids)]

    def answer(self, text: str) -> list[int]:
        """Ids of a text that answers a prompt, its end included; one space parts it from the prompt."""
        self.check_text(text)
        return [*self._encoded(f" {text}"), self.ids["eos_token"]]

    def tokenize(self, text: str) -> list[int]:
        """Ids of a text by itself."""
        self.check_text(text)
        return self._encoded(text)

    def decode(self, ids: Sequence[int]) -> str:
        """A sampled text, without markers and outer spaces."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def check_text(self, text: str) -> None:
        """Raises InputError where a text holds a marker of the model."""
        for name in TOKENS:
            if self._marker(name) in text:
                raise InputError(f"{text[:40]!r}: holds {self._marker(name)}, a marker of the model: leave it out")

    def _marker(self, name: str) -> str:
        return self.tokenizer.id_to_token(self.ids[name]) or ""

    def _encoded(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        if ids and max(ids) >= self.vocabulary_size:
            raise InputError(
                f"{text[:40]!r}: token {max(ids)} of {self.vocabulary_size}: use the tokenizer of the model"
            )
        return ids

    @classmethod
    def from_files(
        cls, files: Mapping[str, bytes], folder: Path, patches: int, side: int, vocabulary_size: int
    ) -> Self:
        """Of the contents of a folder's files; ``patches`` and ``side`` are those of its config.json.

        Raises InputError, one line, for files that are missing, damaged or of another model.
        """
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if name not in files:
                raise InputError(f"{folder}: holds no {name}: copy it from the published folder")
        tokenizer = parse_tokenizer(files["tokenizer.json"], folder / "tokenizer.json")
        named = _object(files, "tokenizer_config.json", folder)
        processing = _object(files, "processor_config.json", folder)
        images = processing.get("image_processor") or _object(files, "preprocessor_config.json", folder)
        if not images:
            raise InputError(f"{folder}: holds no preprocessor_config.json: copy it from the published folder")
        settings = image_settings(images, folder)
        if settings.size != side:
            raise InputError(f"{folder}: images have side {settings.size}, config.json says {side}: use one model's")
        return cls(
            tokenizer,
            {name: _token_id(tokenizer, named, name, vocabulary_size, folder) for name in TOKENS},
            _template(files, named, folder),
            default_system_prompt() if processing.get("use_default_system_prompt") else "",
            settings,
            patches,
            vocabulary_size,
            files,
        )


def image_settings(found: Mapping[str, Any], where: Path) -> ImageSettings:
    """The fields of an image processor's file that are used. Any: decoded JSON."""
    known = {name: found[name] for name in ImageSettings.model_fields if name in found}
    return parse_section(ImageSettings, known, where / "preprocessor_config.json")


def default_system_prompt() -> str:
    """The text that transformers' processor puts before questions."""
    from transformers.models.janus.processing_janus import DEFAULT_SYSTEM_PROMPT

    return DEFAULT_SYSTEM_PROMPT


def _object(files: Mapping[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    """Any: decoded JSON; empty where there is no such file."""
    if name not in files:
        return {}
    found = parse_json(files[name], str(folder / name), "restore the file")
    if not isinstance(found, dict):
        raise InputError(f"{folder / name}: holds {type(found).__name__}, not an object: restore the file")
    return found


def _token_id(tokenizer: Tokenizer, named: Mapping[str, Any], name: str, vocabulary_size: int, folder: Path) -> int:
    """Any: decoded JSON. A marker stands by itself, with its settings, or among the special tokens of the model."""
    further = [named.get(key) for key in ("extra_special_tokens", "model_specific_special_tokens")]
    places = [named, *(place for place in further if isinstance(place, dict))]
    token = next((place[name] for place in places if place.get(name)), TOKENS[name])
    token = token.get("content") if isinstance(token, dict) else token
    number = tokenizer.token_to_id(token) if isinstance(token, str) else None
    if number is None:
        raise InputError(f"{folder}: its tokenizer has no {name} ({token}): use the tokenizer files of a Janus")
    if number >= vocabulary_size:
        raise InputError(
            f"{folder}: its tokenizer gives {token} the id {number}, the model knows {vocabulary_size}: use the "
            "tokenizer and the weights of one model"
        )
    return number


def _template(files: Mapping[str, bytes], named: Mapping[str, Any], folder: Path) -> Template:
    """Any: decoded JSON."""
    held: object = files.get("chat_template.jinja", b"").decode(errors="replace")
    held = held or _object(files, "chat_template.json", folder).get("chat_template") or named.get("chat_template")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        return environment.from_string(held if isinstance(held, str) else TEMPLATE)
    except TemplateError as error:
        raise InputError(f"{folder}: its chat template: {' '.join(str(error).split())}: restore the file") from None
