"""A contact sheet: examples with their texts, answers and facts, in rows by task and category."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from PIL import Image as PilImage

from lvrpo.report.grids import Tile, picture_grid
from lvrpo.types import Example, TaskKind

PER_ROW = 8
"""Pictures in a row, an edit with two."""


def contact_sheet(title: str, examples: Iterable[tuple[TaskKind, str, Sequence[Example]]], side: int) -> PilImage.Image:
    """Rows of the examples of a task and category; pictures ``side`` pixels wide and high."""
    rows: list[tuple[str, list[Tile]]] = [(title, [])]
    for task, category, found in examples:
        tiles = [tile for example in found for tile in _tiles(example)]
        for first in range(0, len(tiles), PER_ROW):
            rows.append((f"{task}: {category}", tiles[first : first + PER_ROW]))
    return picture_grid(rows, tile_size=side, caption_lines=5)


def _tiles(example: Example) -> list[Tile]:
    """The picture of the prompt and the one to make, the texts under the first."""
    prompt = example.prompt
    made = [part for part in example.outputs if not isinstance(part, str)]
    answer = next((part for part in example.outputs if isinstance(part, str)), prompt.answer)
    text = f"{prompt.text} ({f'answer: {answer}' if answer else f'{len(prompt.facts)} facts'})".replace(" ?", "?")
    pictures = [*prompt.images[-1:], *made][: 2 if prompt.task == "edit" else 1] or [None]
    return [Tile(picture, "" if k else text) for k, picture in enumerate(pictures)]
