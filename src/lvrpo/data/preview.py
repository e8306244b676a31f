"""A contact sheet of prompts: pictures with their texts, answers and facts, in rows by task and category."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont, ImageOps

from lvrpo.types import Example, Image, TaskKind

_INK, _SOFT, _PAPER, _RULE = (32, 36, 44), (110, 118, 130), (255, 255, 255), (226, 229, 234)
_GAP, _MARGIN, _LABEL, _LINES, PER_BLOCK = 16, 24, 124, 3, 4

Block = tuple[TaskKind, str, Sequence[Example]]
"""TaskKind, category, and up to ``PER_BLOCK`` examples."""


def contact_sheet(title: str, blocks: Sequence[Block], side: int) -> PilImage.Image:
    """One row per block; pictures ``side`` pixels wide and high."""
    places, rows = _places([(task, category) for task, category, _ in blocks])
    half, height = _LABEL + PER_BLOCK * (side + _GAP), side + 70 + _GAP
    sheet_size = (2 * _MARGIN + 2 * half, 2 * _MARGIN + 40 + rows * height)
    sheet = PilImage.new("RGB", sheet_size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title, _INK, _font(24))
    for (task, category, examples), (row, column) in zip(blocks, places, strict=True):
        left, top = _MARGIN + column * half, _MARGIN + 40 + row * height
        draw.line((left, top - _GAP // 2, sheet_size[0] - _MARGIN, top - _GAP // 2), _RULE)
        draw.text((left, top + 4), _cut(category, _font(16), _LABEL - 8), _INK, _font(16))
        draw.text((left, top + 26), task, _SOFT, _font(13))
        step = (2 if task == "edit" else 1) * (side + _GAP)
        for k, example in enumerate(examples):
            _show(sheet, draw, example, (left + _LABEL + k * step, top), side)
    return sheet


def png_bytes(sheet: PilImage.Image) -> bytes:
    """The sheet as the bytes of a PNG file."""
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _font(size: int) -> ImageFont.FreeTypeFont:
    """The font that is shipped, as Pillow's own has no accents."""
    return ImageFont.truetype(Path(__file__).parents[1] / "assets" / "fonts" / "DejaVuSans.ttf", size)


def _places(blocks: list[tuple[TaskKind, str]]) -> tuple[list[tuple[int, int]], int]:
    """(row, column) of each category, two in a row but for edits, which show two pictures; and the rows in all."""
    places: list[tuple[int, int]] = []
    row, column, previous = 0, 0, None
    for task, _ in blocks:
        if column and (task == "edit" or task != previous):
            row, column = row + 1, 0
        places.append((row, column))
        row, column = (row + 1, 0) if task == "edit" or column else (row, 1)
        previous = task
    return places, row + (column > 0)


def _show(
    sheet: PilImage.Image, draw: ImageDraw.ImageDraw, example: Example, corner: tuple[int, int], side: int
) -> None:
    left, top = corner
    given = [p for p in example.prompt.parts if not isinstance(p, str)]
    made = [p for p in example.outputs if not isinstance(p, str)]
    shown = [*given[-1:], *made][: 2 if example.prompt.task == "edit" else 1]
    for k, image in enumerate(shown):
        sheet.paste(_fitted(image, side), (left + k * (side + _GAP), top))
    if not shown:
        draw.rectangle((left, top, left + side - 1, top + side - 1), outline=_RULE)
    if len(shown) == 2:
        middle = top + side // 2
        x = left + side + 2
        draw.polygon([(x, middle - 5), (x + _GAP - 4, middle), (x, middle + 5)], _SOFT)
    text = " ".join(p for p in example.prompt.parts if isinstance(p, str)).replace(" ?", "?")
    answer = next((p for p in example.outputs if isinstance(p, str)), example.prompt.answer)
    below = f"answer: {answer}" if answer else f"{len(example.prompt.facts)} facts"
    font, width = _font(13), 2 * side + _GAP if example.prompt.task == "edit" else side
    lines = _wrapped(text, font, width)
    for k, line in enumerate(lines):
        draw.text((left, top + side + 3 + 16 * k), line, _INK, font)
    draw.text((left, top + side + 5 + 16 * len(lines)), _cut(below, _font(12), width), _SOFT, _font(12))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The text wrapped to at most ``_LINES`` lines."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines if len(lines) <= _LINES else [*lines[: _LINES - 1], f"{lines[_LINES - 1]} {lines[_LINES]}"]
    return [_cut(line, font, width) for line in shown]


def _cut(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """One line of this width, with an ellipsis where something is left out."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"


def _fitted(image: Image, side: int) -> PilImage.Image:
    """The whole picture inside a square; small ones are enlarged pixel by pixel."""
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    picture = PilImage.fromarray(pixels)
    resample = PilImage.Resampling.NEAREST if max(picture.size) <= side else PilImage.Resampling.LANCZOS
    square = PilImage.new("RGB", (side, side), _PAPER)
    square.paste(ImageOps.contain(picture, (side, side), resample))
    return square
