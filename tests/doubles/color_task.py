"""Prompts that ask for a color, and rewards of them, for whole runs of ``DiscretePolicy``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from discrete_policy import WORDS, encoded

from lvrpo.data.base import Task
from lvrpo.rewards.base import Scores
from lvrpo.types import Group, Prompt, TaskKind


class Colors(Task):
    """Prompts that ask for a color: to be said, drawn, or thought about and drawn."""

    tasks = ("understand", "generate", "reason")

    def __init__(self, section: object, split: str, seed: int) -> None:
        self.split = split

    def prompt(self, task: TaskKind, index: int) -> Prompt:
        color = WORDS[3 + index % 3]
        verb, output = {"understand": ("say", ("text",)), "generate": ("draw", ("image",))}.get(
            task, ("think draw", ("text", "image"))
        )
        return Prompt(f"{self.split}/{task}/{index}", task, (f"{verb} {color}",), output)


class ShareOfColor:
    """The share of an image that has one color of the palette."""

    judges = ("image",)

    def __init__(self, code: int = 0) -> None:
        self.code = code

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output

    def score(self, groups: Sequence[Group], judge: object) -> Scores:
        return Scores(
            torch.tensor(
                [[float((encoded(t.image) == self.code).float().mean()) for t in g.trajectories] for g in groups]
            )
        )


class Says:
    """The share of the words of a text that are one word."""

    judges = ("text",)

    def __init__(self, word: str = "yes") -> None:
        self.word = word

    def applies(self, prompt: Prompt) -> bool:
        return "text" in prompt.output

    def score(self, groups: Sequence[Group], judge: object) -> Scores:
        words = [[(t.text or "").split() for t in g.trajectories] for g in groups]
        return Scores(torch.tensor([[row.count(self.word) / max(1, len(row)) for row in rows] for rows in words]))
