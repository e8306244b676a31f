"""One contact sheet of the world: every category with pictures, texts, answers and facts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont

from lvrpo.data.scenes.objects import Split
from lvrpo.data.scenes.prompts import CATEGORIES, ScenePrompts, ScenesConfig
from lvrpo.types import Example, Image, Task

_INK, _SOFT, _PAPER, _RULE = (32, 36, 44), (110, 118, 130), (255, 255, 255), (226, 229, 234)
_GAP, _MARGIN, _LABEL, _PER_BLOCK = 16, 24, 124, 4


def preview(
    path: Path | str, split: Split = "test", seed: int = 0, scale: int = 4, config: ScenesConfig | None = None
) -> Path:
    """Writes a PNG: one row per category, four examples each, pictures enlarged ``scale`` times.

    ``path`` is a file or a folder, which then gets scenes.png. Returns the file's path.
    """
    file = Path(path)
    if file.is_dir() or not file.suffix:
        file = file / "scenes.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    source = ScenePrompts(config or ScenesConfig(), split, seed)
    side = source.config.size * scale
    blocks: list[tuple[Task, str]] = [(t, c) for t in source.tasks for c in CATEGORIES[t] if c in source.cycles[t]]
    places, rows = _places(blocks)
    half, height = _LABEL + _PER_BLOCK * (side + _GAP), side + 70 + _GAP
    sheet_size = (2 * _MARGIN + 2 * half, 2 * _MARGIN + 40 + rows * height)
    sheet = PilImage.new("RGB", sheet_size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), f"The built-in world: {source.name}", _INK, ImageFont.load_default(size=24))
    for (task, category), (row, column) in zip(blocks, places, strict=True):
        left, top = _MARGIN + column * half, _MARGIN + 40 + row * height
        draw.line((left, top - _GAP // 2, sheet_size[0] - _MARGIN, top - _GAP // 2), _RULE)
        draw.text((left, top + 4), category, _INK, ImageFont.load_default(size=16))
        draw.text((left, top + 26), task, _SOFT, ImageFont.load_default(size=13))
        step = (2 if task == "edit" else 1) * (side + _GAP)
        for k, example in enumerate(_examples(source, task, category, _PER_BLOCK)):
            _show(sheet, draw, example, (left + _LABEL + k * step, top), side)
    sheet.save(file)
    return file


def _places(blocks: list[tuple[Task, str]]) -> tuple[list[tuple[int, int]], int]:
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


def _examples(source: ScenePrompts, task: Task, category: str, count: int) -> list[Example]:
    cycle = source.cycles[task]
    first, step = cycle.index(category), len(cycle)
    each = source.config.questions_per_picture if task == "understand" else 1
    return [source.example(task, first + step * each * k) for k in range(count)]


def _show(
    sheet: PilImage.Image, draw: ImageDraw.ImageDraw, example: Example, corner: tuple[int, int], side: int
) -> None:
    left, top = corner
    given = [p for p in example.prompt.parts if not isinstance(p, str)]
    made = [p for p in example.outputs if not isinstance(p, str)]
    for k, image in enumerate([*given, *made]):
        sheet.paste(_enlarged(image, side), (left + k * (side + _GAP), top))
    if given and made:
        middle = top + side // 2
        x = left + side + 2
        draw.polygon([(x, middle - 5), (x + _GAP - 4, middle), (x, middle + 5)], _SOFT)
    text = " ".join(p for p in example.prompt.parts if isinstance(p, str)).replace(" ?", "?")
    answer = next((p for p in example.outputs if isinstance(p, str)), None)
    below = f"answer: {answer}" if answer else f"{len(example.prompt.facts)} facts"
    font = ImageFont.load_default(size=13)
    lines = _wrapped(text, font, side if len(given) + len(made) == 1 else 2 * side + _GAP)
    for k, line in enumerate(lines):
        draw.text((left, top + side + 3 + 16 * k), line, _INK, font)
    draw.text((left, top + side + 5 + 16 * len(lines)), below, _SOFT, ImageFont.load_default(size=12))


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _enlarged(image: Image, side: int) -> PilImage.Image:
    pixels = (image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    return PilImage.fromarray(pixels).resize((side, side), PilImage.Resampling.NEAREST)
