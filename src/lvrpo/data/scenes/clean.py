"""Prompts of the train split with their right outputs, as rows to imitate: what a supervised oracle learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args, overload

from pydantic import Field, field_validator

from lvrpo.config import Config
from lvrpo.data.scenes.prompts import ScenePrompts, ScenesConfig
from lvrpo.types import Example, Task


class CleanPromptsConfig(Config):
    """Which prompts: the first so many of each task, those that an alignment with this seed asks in so many steps."""

    seed: int = Field(default=0, ge=0)
    counts: dict[Task, int] = Field(default={"generate": 3920, "understand": 8960, "edit": 1680, "reason": 3360})
    """140 steps of quickstart.yaml."""

    @field_validator("counts")
    @classmethod
    def _none_negative(cls, counts: dict[Task, int]) -> dict[Task, int]:
        if min(counts.values(), default=0) < 0:
            raise ValueError(f"counts {counts}: use 0 to leave a task out")
        return counts


class CleanRows(Sequence[Example]):
    """The first rows of one task; built when they are asked for."""

    def __init__(self, source: ScenePrompts, task: Task, count: int) -> None:
        self._source, self._count = source, count
        self._task: Task = task

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        places = range(self._count)[index]  # raises IndexError where there is no such row
        if isinstance(places, range):
            return [self._source.example(self._task, i) for i in places]
        return self._source.example(self._task, places)


@dataclass(frozen=True)
class CleanPrompts:
    """Rows to imitate, under the names of a ``WebCorpus``."""

    generate: Sequence[Example]
    caption: Sequence[Example]
    """None: no prompt asks for one."""
    question: Sequence[Example]
    """Those about one picture follow each other."""
    edit: Sequence[Example]
    reason: Sequence[Example]

    @classmethod
    def of(cls, config: CleanPromptsConfig, size: int, questions_per_picture: int) -> CleanPrompts:
        """Of the train split, with pictures of ``size`` pixels."""
        scenes = ScenesConfig(size=size, questions_per_picture=questions_per_picture)
        source, counts = ScenePrompts(scenes, "train", config.seed), config.counts
        tasks: tuple[Task, ...] = get_args(Task)
        rows: Mapping[Task, CleanRows] = {task: CleanRows(source, task, counts.get(task, 0)) for task in tasks}
        return cls(rows["generate"], (), rows["understand"], rows["edit"], rows["reason"])
