"""The endless source of alignment and evaluation prompts: fully specified, with facts and answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from lvrpo.config import Config, Natural
from lvrpo.data.base import ComparableTask
from lvrpo.data.leakage import ComparedPrompt
from lvrpo.data.scenes import edits, facts, grammar, reasoning
from lvrpo.data.scenes.facts import paraphrased
from lvrpo.data.scenes.layout import Layout
from lvrpo.data.scenes.leakage import CAPTION_PREFIXES, compared_prompts
from lvrpo.data.scenes.objects import CELL, DEFAULT_SIZE, Scene, Split, cells_mask, render
from lvrpo.data.scenes.questions import Question, ask, balanced_choice, question_form
from lvrpo.types import Example, Image, Part, Prompt, TaskKind

CATEGORIES: Mapping[TaskKind, tuple[str, ...]] = {
    "understand": grammar.UNDERSTAND,
    "generate": grammar.GENERATE,
    "edit": grammar.EDIT,
    "reason": grammar.REASON,
}
"""The rows of the results table, by task."""

CAN_HOLD_OUT: Mapping[TaskKind, frozenset[str]] = {
    "understand": frozenset({"color", "count", "shape", "exists", "position"}),
    "generate": frozenset({"counting", "colors", "position", "color_attr"}),
    "edit": frozenset(grammar.EDIT),
    "reason": frozenset(),
}
"""The categories that can show a held-out combination."""

HELD_OUT_SHARE = 0.2
"""Share of their images that ``ScenesConfig.held_out=mixed`` fills with one."""


class ScenesConfig(Config):
    """Selects prompts of the built-in world."""

    hints: ClassVar[Mapping[str, str]] = {
        "held_out_share": "is gone: held_out=mixed shows them in a fifth of the images"
    }
    size: int = Field(default=DEFAULT_SIZE, ge=4 * CELL, le=256, multiple_of=CELL)
    """Side of the images in pixels, a multiple of 8."""
    weights: dict[str, Natural] = Field(default_factory=dict)
    """Weight of a category in the round robin, by "task/category", such as ``{"generate/counting": 2}``; 1 by default,
    0 leaves it out."""
    questions_per_picture: int = Field(default=4, ge=1, le=16)
    """Consecutive questions that share one image."""
    held_out: Literal["never", "mixed", "only"] = "mixed"
    """Combinations that training never shows. Validation and test: never, in a fifth of the images of the
    categories that can show one, or only those. The train split never shows any."""
    labels: bool = True
    """Whether training and validation prompts carry answers, facts and the region of an edit. Without them nothing but
    the model can score what is made of them; test prompts always have them."""
    wording: Literal["trained", "paraphrased"] = "trained"
    """paraphrased: captions and questions in words that no training row has."""

    @field_validator("weights")
    @classmethod
    def _known_categories(cls, weights: dict[str, int]) -> dict[str, int]:
        known = {f"{task}/{c}" for task, names in CATEGORIES.items() for c in names}
        for name in weights:
            if name not in known:
                raise ValueError(f"weights has {name!r}, which is no category: use one of {', '.join(sorted(known))}")
        return weights


@dataclass
class _SceneImage:
    """An image with one question per consecutive index."""

    scene: Scene
    image: Image
    questions: list[Question]


@dataclass
class ScenePrompts(ComparableTask):
    """Prompts of one split: ``prompt(task, index)`` is a pure function of (config, split, seed, task, index)."""

    config: ScenesConfig = field(default_factory=ScenesConfig)
    split: Split = "train"
    seed: int = 0

    @property
    def name(self) -> str:
        """Prefix of prompt ids: scenes/SPLIT, with the seed unless it is 0."""
        only = ".held_out" if self._only_held_out else ""
        return f"scenes/{self.split}{only}{f'.{self.seed}' if self.seed else ''}"

    @property
    def tasks(self) -> tuple[TaskKind, ...]:
        """The tasks that have at least one category."""
        return tuple(self.category_cycles)

    @cached_property
    def category_cycles(self) -> Mapping[TaskKind, tuple[str, ...]]:
        """Per task, the cycle of categories that indices follow."""
        cycles: dict[TaskKind, tuple[str, ...]] = {}
        for task, names in CATEGORIES.items():
            allowed = [c for c in names if not self._only_held_out or c in CAN_HOLD_OUT[task]]
            weights = {c: self.config.weights.get(f"{task}/{c}", 1) for c in allowed}
            rounds = range(max(weights.values(), default=0))
            cycle = tuple(c for k in rounds for c in allowed if weights[c] > k)
            if cycle:
                cycles[task] = cycle
        return cycles

    def category(self, task: TaskKind, index: int) -> str:
        """The category of an index (KeyError for a task without categories)."""
        cycle = self.category_cycles[task]
        return cycle[index % len(cycle)]

    def prompt(self, task: TaskKind, index: int) -> Prompt:
        """The prompt at an index >= 0 (KeyError for a task without categories)."""
        prompt = self._build(task, index)[0]
        if self.config.labels or self.split == "test":
            return prompt
        return replace(prompt, answer=None, facts=(), edited=None, content="")  # content may hold the scene

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of captions in prompts, ignored when prompts are compared."""
        return CAPTION_PREFIXES

    def compared(self, prompts: Sequence[Prompt]) -> list[ComparedPrompt]:
        """Its prompts in the form that the audit of splits compares; images without perceptual hashes."""
        return compared_prompts(prompts, phash=False)

    def example(self, task: TaskKind, index: int) -> Example:
        """The prompt at an index with its right outputs: the clean supervised oracle."""
        prompt, outputs = self._build(task, index)
        drawn: tuple[Part, ...] = tuple(o if isinstance(o, str) else render(o, self.config.size) for o in outputs)
        return Example(prompt, drawn)

    @property
    def _only_held_out(self) -> bool:
        return self.config.held_out == "only" and self.split != "train"

    @property
    def _grid(self) -> int:
        return self.config.size // CELL

    def _layout(self, task: TaskKind, index: int, category: str) -> Layout:
        rng = random.Random(f"{self.seed}/{self.split}/{task}/{index}")
        share = {"never": 0.0, "mixed": HELD_OUT_SHARE, "only": 1.0}[self.config.held_out]
        held_out = rng.random() < share and self.split != "train" and category in CAN_HOLD_OUT[task]
        return Layout(rng, self.split, self._grid, held_out)

    def _build(self, task: TaskKind, index: int) -> tuple[Prompt, tuple[str | Scene, ...]]:
        if index < 0:
            raise IndexError(f"index={index} is negative")
        category = self.category(task, index)
        key = f"{self.name}/{task}/{category}/{index:06d}"
        if task == "understand":
            shown = self._scene_image(index // self.config.questions_per_picture)
            question = shown.questions[index % self.config.questions_per_picture]
            said = paraphrased(question.text) if self.config.wording == "paraphrased" else question.text
            prompt = Prompt(
                key,
                task,
                (shown.image, said),
                ("text",),
                question.answer,
                category=category,
                source=self.name,
                content=f"{shown.scene.content} {question.text}",
                held_out=shown.scene.held_out(),
                form=question_form(said),
            )
            return prompt, (question.answer,)
        layout = self._layout(task, index, category)
        if task == "generate":
            d = layout.describe(category)
            wordings = grammar.PARAPHRASED_WORDINGS if self.config.wording == "paraphrased" else grammar.WORDINGS
            text, said = d.caption.text(layout.rng.choice(wordings)), facts.caption_facts(d.caption)
            asked = {"content": d.caption.content, "held_out": d.caption.held_out}
            return Prompt(key, task, (text,), ("image",), None, said, category, self.name, **asked), (d.scene,)
        if task == "edit":
            e = edits.edit(category, layout)
            parts = (render(e.source, self.config.size), e.instruction)
            edited = cells_mask(e.cells, self.config.size)
            asked = {"content": f"{e.source.content} {e.instruction}", "held_out": e.target.held_out()}
            prompt = Prompt(key, task, parts, ("image",), None, e.facts, category, self.name, **asked, edited=edited)
            return prompt, (e.target,)
        r = reasoning.reason(category, layout, balanced_choice(self._number(task, index), self.name))
        if r.drawing is not None:
            prompt = Prompt(
                key, task, (r.text,), ("text", "image"), r.answer, r.facts, category, self.name, content=r.content
            )
            return prompt, (r.answer, r.drawing)
        assert r.scene is not None
        parts = (render(r.scene, self.config.size), r.text)
        prompt = Prompt(key, task, parts, ("text",), r.answer, (), category, self.name, content=r.content)
        return replace(prompt, form=question_form(r.text)), (r.answer,)

    def _number(self, task: TaskKind, index: int) -> int:
        """The number of prompts of the same category before an index."""
        cycle = self.category_cycles[task]
        turns, place = divmod(index, len(cycle))
        category = cycle[place]
        return turns * cycle.count(category) + cycle[:place].count(category)

    @cached_property
    def _scene_image(self) -> Callable[[int], _SceneImage]:
        """The image of a number, which several questions share."""
        return lru_cache(maxsize=256)(self._make_scene_image)

    def _make_scene_image(self, number: int) -> _SceneImage:
        each = self.config.questions_per_picture
        indices = range(number * each, (number + 1) * each)
        categories = [self.category("understand", i) for i in indices]
        numbers = [self._number("understand", i) for i in indices]
        wanted = [balanced_choice(n, f"{self.name} {c}") for n, c in zip(numbers, categories, strict=True)]
        asked = next((c for c in categories if c in CAN_HOLD_OUT["understand"]), "")
        layout = self._layout("understand", number, asked)
        while True:
            digit = "digit" in categories or layout.rng.random() < 0.15
            scene = layout.retry(lambda digit=digit: layout.question_scene(digit), lambda s: s)
            questions = [ask(c, scene, layout.rng, self._grid, w) for c, w in zip(categories, wanted, strict=True)]
            known = [q for q in questions if q is not None]
            if len(known) == each:
                return _SceneImage(scene, render(scene, self.config.size), known)
