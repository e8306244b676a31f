"""The contact sheet of the world: every category with pictures, texts, answers and facts."""

from __future__ import annotations

from PIL import Image as PilImage

from lvrpo.data.preview import PER_BLOCK, Block, contact_sheet
from lvrpo.data.scenes.objects import Split
from lvrpo.data.scenes.prompts import CATEGORIES, ScenePrompts, ScenesConfig
from lvrpo.types import Example, TaskKind


def preview(split: Split = "test", seed: int = 0, scale: int = 4, config: ScenesConfig | None = None) -> PilImage.Image:
    """One row per category, four examples each, pictures enlarged ``scale`` times."""
    source = ScenePrompts(config or ScenesConfig(), split, seed)
    blocks: list[Block] = [
        (task, category, _examples(source, task, category, PER_BLOCK))
        for task in source.tasks
        for category in CATEGORIES[task]
        if category in source.category_cycles[task]
    ]
    return contact_sheet(f"The built-in world: {source.name}", blocks, source.config.size * scale)


def _examples(source: ScenePrompts, task: TaskKind, category: str, count: int) -> list[Example]:
    cycle = source.category_cycles[task]
    first, step = cycle.index(category), len(cycle)
    each = source.config.questions_per_picture if task == "understand" else 1
    return [source.example(task, first + step * each * k) for k in range(count)]
