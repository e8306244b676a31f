"""Image grids: rows of captioned images in one image, such as ``grid.png`` of a training step, and contact sheets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from lvrpo.images import to_pil
from lvrpo.types import Example, TaskKind

TEXT_COLOR, CAPTION_COLOR, BACKGROUND, EMPTY_COLOR = (24, 32, 42), (96, 108, 122), (255, 255, 255), (232, 235, 239)
FRAME_COLORS = {True: (0, 122, 94), False: (200, 70, 20)}
GAP, EDGE, MARGIN = 10, 3, 16


@dataclass(frozen=True)
class Tile:
    """An image with a caption under it."""

    image: torch.Tensor | Image.Image | None
    """float (3, H, W) in [0, 1], or a PIL image; None leaves an empty place."""
    caption: str = ""
    good: bool | None = None
    """A green frame and a check mark, a red frame and a cross, or neither."""


def image_grid(
    rows: Sequence[tuple[str, Sequence[Tile]]], *, tile_size: int = 96, font_size: int = 12, caption_lines: int = 2
) -> Image.Image:
    """Rows of (title, tiles) as one RGB image; small images are enlarged to whole pixels with hard edges.

    A title is written above its row, a caption under its image; both wrap, and a caption ends in dots after
    ``caption_lines`` lines.
    """
    font = _font(font_size)
    line = round(font_size * 1.35)
    columns = max((len(tiles) for _, tiles in rows), default=1)
    cell = tile_size + 2 * EDGE
    width = max(2 * MARGIN + columns * cell + (columns - 1) * GAP, 2 * MARGIN + 3 * cell)
    layout: list[tuple[list[str], list[list[str]], int]] = []
    for title, tiles in rows:
        title_lines = _wrapped(title, font, width - 2 * MARGIN, 3)
        captions = [_wrapped(_marked(tile), font, cell, caption_lines) for tile in tiles]
        height = (
            line * (len(title_lines) + max((len(c) for c in captions), default=0)) + (cell if tiles else 0) + GAP * 2
        )
        layout.append((title_lines, captions, height))
    total = max(1, sum(height for *_, height in layout)) + 2 * MARGIN - (GAP if rows else 0)
    canvas = Image.new("RGB", (width, total), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    top = MARGIN
    for (_, tiles), (title_lines, captions, height) in zip(rows, layout, strict=True):
        y = top
        for text in title_lines:
            draw.text((MARGIN, y), text, fill=TEXT_COLOR, font=font)
            y += line
        y += 3 if title_lines else 0
        for i, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
            x = MARGIN + i * (cell + GAP)
            _place(canvas, draw, tile, (x, y), tile_size)
            for k, text in enumerate(caption):
                draw.text((x, y + cell + 2 + k * line), text, fill=CAPTION_COLOR, font=font)
        top += height
    return canvas


def _place(canvas: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, at: tuple[int, int], size: int) -> None:
    x, y = at
    box = (x, y, x + size + 2 * EDGE - 1, y + size + 2 * EDGE - 1)
    inner = (x + EDGE, y + EDGE)
    if tile.good is not None:
        draw.rectangle(box, fill=FRAME_COLORS[tile.good])
    if tile.image is None:
        draw.rectangle((*inner, inner[0] + size - 1, inner[1] + size - 1), fill=EMPTY_COLOR)
        return
    image = to_pil(tile.image) if isinstance(tile.image, torch.Tensor) else tile.image.convert("RGB")
    canvas.paste(_fitted(image, size), inner)


def _fitted(image: Image.Image, size: int) -> Image.Image:
    """``size`` x ``size`` with the proportions kept: enlarged with hard edges, made smaller softly."""
    scale = size / max(image.size)
    shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    square = Image.new("RGB", (size, size), EMPTY_COLOR)
    square.paste(image.resize(shape, how), ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return square


def _marked(tile: Tile) -> str:
    mark = {True: "✓ ", False: "✗ ", None: ""}[tile.good]
    return (mark + tile.caption).strip()


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> list[str]:
    """The text wrapped to at most ``max_lines`` lines of ``width`` pixels; an ellipsis marks what is cut off."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    kept = lines[:max_lines]
    for i, text_line in enumerate(kept):
        is_cut = i == max_lines - 1 and len(lines) > max_lines
        if is_cut or font.getlength(text_line) > width:
            while text_line and font.getlength(text_line + "…") > width:
                text_line = text_line[:-1]
            kept[i] = text_line + "…"
    return kept


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(__file__).parents[1] / "assets" / "fonts" / "DejaVuSans.ttf", size)


# --- contact sheets ---

PER_ROW = 8
"""Images in a row, an edit with two."""


def contact_sheet(title: str, examples: Iterable[tuple[TaskKind, str, Sequence[Example]]], side: int) -> Image.Image:
    """Rows of the examples of a task and category; images ``side`` pixels wide and high."""
    rows: list[tuple[str, list[Tile]]] = [(title, [])]
    for task, category, found in examples:
        tiles = [tile for example in found for tile in _tiles(example)]
        for first in range(0, len(tiles), PER_ROW):
            rows.append((f"{task}: {category}", tiles[first : first + PER_ROW]))
    return image_grid(rows, tile_size=side, caption_lines=5)


def _tiles(example: Example) -> list[Tile]:
    """The image of the prompt and the one to make, the texts under the first."""
    prompt = example.prompt
    made = [part for part in example.outputs if not isinstance(part, str)]
    answer = next((part for part in example.outputs if isinstance(part, str)), prompt.answer)
    text = f"{prompt.text} ({f'answer: {answer}' if answer else f'{len(prompt.facts)} facts'})".replace(" ?", "?")
    images = [*prompt.images[-1:], *made][: 2 if prompt.task == "edit" else 1] or [None]
    return [Tile(image, "" if k else text) for k, image in enumerate(images)]
