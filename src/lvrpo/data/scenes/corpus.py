"""The web corpus: a finite, web-like collection for pretraining, in which captions leave things out and err.

The rates are fields of ``CorpusConfig``; ``WebCorpus.rates`` reports what was actually drawn. Only scenes and
handwritten samples of the train split appear, only captions and sums of that split, and no held-out combination, in
images or in words.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import overload

from pydantic import Field, field_validator

from lvrpo.config import Config, Natural
from lvrpo.data.scenes import edits, grammar, reasoning
from lvrpo.data.scenes.grammar import NUMBER_WORDS, OPPOSITE, Caption, Mention, clear_relation, other, place
from lvrpo.data.scenes.layout import Layout
from lvrpo.data.scenes.objects import (
    CELL,
    COLORS,
    DEFAULT_SIZE,
    DIGITS,
    HELD_OUT,
    MAX_OBJECTS,
    SHAPES,
    Scene,
    SceneObject,
    render,
)
from lvrpo.data.scenes.prompts import ScenePrompts, ScenesConfig
from lvrpo.data.scenes.questions import ask
from lvrpo.types import TASKS, Example, OutputKind, Part, Prompt, TaskKind


class CorpusConfig(Config):
    """Sizes and rates of the web corpus; shares of scenes and of questions are relative weights."""

    seed: int = 0
    """Seed of the corpus."""
    size: int = Field(default=DEFAULT_SIZE, ge=4 * CELL, le=256, multiple_of=CELL)
    """Side of the images in pixels, a multiple of 8."""
    scenes: int = Field(default=20000, ge=1, le=10_000_000)
    """Captioned images, each with ``questions_per_scene`` questions."""
    edits: int = Field(default=10000, ge=0, le=10_000_000)
    """Edit pairs."""
    reasons: int = Field(default=10000, ge=0, le=10_000_000)
    """Rows of sum, compare and draw_answer, in equal parts."""
    questions_per_scene: int = Field(default=4, ge=0, le=1000)
    """Question-answer pairs per scene."""
    scene_shares: dict[str, float] = Field(
        default_factory=lambda: {"one": 0.32, "two": 0.30, "several": 0.12, "alike": 0.07, "digit": 0.19}
    )
    """Shares of the kinds of scenes; "alike", that is counting, is rare."""
    question_shares: dict[str, float] = Field(
        default_factory=lambda: {"color": 0.26, "shape": 0.22, "exists": 0.28, "count": 0.12, "position": 0.12}
    )
    """Shares of the kinds of questions; counts and positions are rare. Half of the digit images are asked for it."""
    drop_color: float = Field(default=0.30, ge=0, le=1)
    """Captions: share of colors left out."""
    drop_object: float = Field(default=0.30, ge=0, le=1)
    """Captions: share of further objects left out."""
    wrong_slot: float = Field(default=0.15, ge=0, le=1)
    """Share of captions with one wrong word: a color, a shape, a digit, a number or a relation."""
    relation: float = Field(default=0.12, ge=0, le=1)
    """Share of captions of two objects that say where they stand."""
    place: float = Field(default=0.25, ge=0, le=1)
    """Share of captions of a single object that say in which quadrant it is."""
    ground: float = Field(default=0.25, ge=0, le=1)
    """Share of captions that say the color of the ground."""
    attribution: float = Field(default=0.15, ge=0, le=1)
    """Share of captions of several objects that may tell more than one color; the others tell at most one."""
    wrong_yes: float = Field(default=0.30, ge=0, le=1)
    """Share of no-answers turned to yes."""
    wrong_count: float = Field(default=0.25, ge=0, le=1)
    """Share of counts of three or more that are off by one."""
    wrong_answer: float = Field(default=0.08, ge=0, le=1)
    """Share of all other answers that are another answer of the same kind."""
    wrong_edit: float = Field(default=0.15, ge=0, le=1)
    """Share of edits of which one half changes nothing and the other half changes something else too."""
    wrong_reason: float = Field(default=0.15, ge=0, le=1)
    """Share of reasoning rows with a wrong result."""

    @field_validator("scene_shares", "question_shares")
    @classmethod
    def _known_shares(cls, shares: dict[str, float]) -> dict[str, float]:
        known = {"one", "two", "several", "alike", "digit"} if "one" in shares else set(grammar.UNDERSTAND)
        if not shares or set(shares) - known or min(shares.values()) < 0 or not sum(shares.values()):
            raise ValueError(f"shares {shares}: use names among {', '.join(sorted(known))} and weights >= 0")
        return shares


@dataclass(frozen=True, slots=True)
class _Row:
    """An example with scenes in the place of images."""

    task: TaskKind
    category: str
    index: int
    parts: tuple[str | Scene, ...]
    output: tuple[OutputKind, ...]
    outputs: tuple[str | Scene, ...]


_drawn = lru_cache(maxsize=1024)(render)


class LazyExamples(Sequence[Example]):
    """Examples that are built when they are read."""

    def __init__(self, count: int, build: Callable[[int], Example]) -> None:
        self._count, self._build = count, build

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        places = range(self._count)[index]  # raises IndexError where there is no such row
        return [self._build(i) for i in places] if isinstance(places, range) else self._build(places)


def _lazily(rows: Sequence[_Row], size: int) -> LazyExamples:
    """The examples of rows; those about one image, read one soon after the other, share it."""

    def drawn(parts: Sequence[str | Scene]) -> tuple[Part, ...]:
        return tuple(part if isinstance(part, str) else _drawn(part, size) for part in parts)

    def example(i: int) -> Example:
        row = rows[i]
        answer = next((o for o in row.outputs if isinstance(o, str)), None)
        key = f"scenes/web/{row.task}/{row.category}/{row.index:06d}"
        prompt = Prompt(key, row.task, drawn(row.parts), row.output, answer, (), row.category, "scenes/web")
        return Example(prompt, drawn(row.outputs))

    return LazyExamples(len(rows), example)


@dataclass(frozen=True)
class WebCorpus:
    """Rows to imitate."""

    config: CorpusConfig
    generate: LazyExamples
    """Caption -> image."""
    caption: LazyExamples
    """Picture and "describe the picture" -> caption."""
    question: LazyExamples
    """Image and question -> answer; those about one image follow each other."""
    edit: LazyExamples
    """Image and instruction -> image."""
    reason: LazyExamples
    """Image and question -> answer, or text -> answer and image."""
    scenes: Sequence[Scene] = field(repr=False)
    """The scenes of the captions, in their order."""
    rates: Mapping[str, float] = field(default_factory=dict)
    """Measured shares: dropped colors and objects, wrong captions, answers, edits, reasons."""

    def examples(self) -> list[Example]:
        """All rows."""
        return [*self.generate, *self.caption, *self.question, *self.edit, *self.reason]

    def __len__(self) -> int:
        return sum(map(len, (self.generate, self.caption, self.question, self.edit, self.reason)))


def web_corpus(config: CorpusConfig | None = None) -> WebCorpus:
    """Builds the corpus: a pure function of its config, about 5 seconds for the default."""
    return _Builder(config or CorpusConfig()).build()


def _alike(group: Sequence[SceneObject]) -> Mention:
    """Objects of one shape in one mention; their color only if they share it."""
    one_color = all(o.color == group[0].color for o in group)
    return Mention(group[0].shape, group[0].color if one_color else None, len(group))


class _Builder:
    def __init__(self, config: CorpusConfig) -> None:
        self.config = config
        self.rng = random.Random(f"web corpus {config.seed}")
        self.layout = Layout(self.rng, "train", config.size // CELL)
        self.counts: Counter[str] = Counter()

    def build(self) -> WebCorpus:
        c = self.config
        scenes: list[Scene] = []
        generate: list[_Row] = []
        caption: list[_Row] = []
        questions: list[_Row] = []
        for i in range(c.scenes):
            scene, said = self._captioned()
            scenes.append(scene)
            wording = grammar.WORDINGS[(0, 0, 1, 2)[self.rng.randrange(4)]]
            generate.append(_Row("generate", "caption", i, (said.text(wording),), ("image",), (scene,)))
            caption.append(_Row("understand", "caption", i, (scene, grammar.DESCRIBE), ("text",), (said.text(),)))
            self._questions(questions, scene)
        edit = [self._edit(i) for i in range(c.edits)]
        reason = [self._reason(i) for i in range(c.reasons)]
        drawn, captions, asked, edits, reasons = (
            _lazily(rows, c.size) for rows in (generate, caption, questions, edit, reason)
        )
        return WebCorpus(c, drawn, captions, asked, edits, reasons, scenes, self._rates())

    def _draw_event(self, name: str, rate: float) -> bool:
        """Draws an error of a rate and counts it."""
        self.counts[f"{name} of"] += 1
        happened = self.rng.random() < rate
        self.counts[name] += happened
        return happened

    def _rates(self) -> dict[str, float]:
        names = [n.removesuffix(" of") for n in self.counts if n.endswith(" of")]
        return {n: self.counts[n] / self.counts[f"{n} of"] for n in names}

    def _scene(self) -> Scene:
        shares = self.config.scene_shares
        kind = self.rng.choices(list(shares), list(shares.values()))[0]
        build = {
            "one": lambda: self.layout.objects(1),
            "two": lambda: self.layout.objects(2),
            "several": lambda: self.layout.question_scene(digit=False),
            "alike": self.layout.alike,
            "digit": self._with_digit,
        }[kind]
        return self.layout.retry(build, lambda s: s)

    def _with_digit(self) -> Scene:
        draw = self.rng.random()
        if draw < 0.6:
            return self.layout.one_digit()
        return self.layout.question_scene(digit=True) if draw < 0.8 else self.layout.shape_and_digit()

    def _captioned(self) -> tuple[Scene, Caption]:
        """A scene and a caption, the first of the train split that comes up."""
        while True:
            scene = self._scene()
            for _ in range(8):
                counts = Counter(self.counts)
                caption = self._caption(scene)
                if caption.split == "train":
                    return scene, caption
                self.counts = counts

    def _caption(self, scene: Scene) -> Caption:
        c, objects = self.config, scene.objects
        relation = where = None
        groups: dict[str, list[SceneObject]] = {}
        for o in self.rng.sample(objects, len(objects)):
            groups.setdefault(o.shape, []).append(o)
        mentions = [_alike(group) for group in groups.values()][:3]
        if len(mentions) > 1:
            shown = [group[0] for group in groups.values()]
            if len(objects) == len(shown) == 2 and self._draw_event("relation", c.relation):
                relation = clear_relation(shown[0].cell, shown[1].cell)
            if relation is None:
                mentions[1:] = [m for m in mentions[1:] if not self._draw_event("drop_object", c.drop_object)]
        mentions = [
            m.without_color() if m.color and self._draw_event("drop_color", c.drop_color) else m for m in mentions
        ]
        colored = [i for i, m in enumerate(mentions) if m.color]
        if len(colored) > 1 and not self._draw_event("attribution", c.attribution):
            kept = self.rng.choice(colored)
            mentions = [m if i == kept else m.without_color() for i, m in enumerate(mentions)]
        if len(objects) == 1 and self._draw_event("place", c.place):
            where = place(objects[0].row, objects[0].col, self.layout.grid)
        ground = scene.ground if self._draw_event("ground", c.ground) else None
        if self._draw_event("wrong_slot", c.wrong_slot):
            mentions, relation = self._spoil(mentions, relation)
        return Caption(tuple(mentions), relation, where, ground)

    def _spoil(self, mentions: list[Mention], relation: str | None) -> tuple[list[Mention], str | None]:
        """The caption with one wrong word, never one that names a held-out combination."""
        if relation is not None and self.rng.random() < 0.3:
            return mentions, OPPOSITE[relation]
        i = self.rng.randrange(len(mentions))
        m = mentions[i]
        while True:
            slot = self.rng.choice(("shape", "color", "count"))
            if slot == "count" and m.count > 1:
                near = [n for n in (m.count - 1, m.count + 1) if 2 <= n <= MAX_OBJECTS]
                wrong = replace(m, count=self.rng.choice(near))
            elif slot == "color" and m.color is not None:
                wrong = replace(m, color=other(self.rng, COLORS, m.color))
            else:
                wrong = replace(m, shape=other(self.rng, DIGITS if m.is_digit else SHAPES, m.shape))
            if (wrong.color, wrong.shape) not in HELD_OUT:
                return [wrong if k == i else other for k, other in enumerate(mentions)], relation

    def _questions(self, rows: list[_Row], scene: Scene) -> None:
        shares = self.config.question_shares
        names, weights = list(shares), list(shares.values())
        digit = sum(o.is_digit for o in scene.objects) == 1
        for k in range(self.config.questions_per_scene):
            question = category = None
            while question is None:
                ask_digit = digit and k % 2 == 0
                category = "digit" if ask_digit else self.rng.choices(names, weights)[0]
                question = ask(category, scene, self.rng, self.layout.grid)
            answer = self._answer(question.answer)
            rows.append(_Row("understand", category or "", len(rows), (scene, question.text), ("text",), (answer,)))

    def _answer(self, answer: str) -> str:
        """The answer, or a wrong one of its kind."""
        c, rng = self.config, self.rng
        if answer == "no":
            wrong = "yes" if self._draw_event("wrong_yes", c.wrong_yes) else answer
        elif answer in NUMBER_WORDS[3:]:
            near = [n for n in NUMBER_WORDS[1:] if abs(NUMBER_WORDS.index(n) - NUMBER_WORDS.index(answer)) == 1]
            wrong = rng.choice(near) if self._draw_event("wrong_count", c.wrong_count) else answer
        elif self._draw_event("wrong_answer", c.wrong_answer):
            wrong = other(rng, next(kind for kind in grammar.ANSWERS if answer in kind), answer)
        else:
            wrong = answer
        self.counts["wrong_question of"] += 1
        self.counts["wrong_question"] += wrong != answer
        return wrong

    def _edit(self, index: int) -> _Row:
        category = grammar.EDIT[index % len(grammar.EDIT)]
        made = edits.edit(category, self.layout)
        target = made.target
        if self._draw_event("wrong_edit", self.config.wrong_edit):
            target = made.source if self.rng.random() < 0.5 else self._changed_too(target)
        return _Row("edit", category, index, (made.source, made.instruction), ("image",), (target,))

    def _changed_too(self, scene: Scene) -> Scene:
        def build() -> Scene:
            k = self.rng.randrange(len(scene.objects))
            o = scene.objects[k]
            other = replace(o, color=self.layout.color_of(o.shape))
            return replace(scene, objects=tuple(other if i == k else p for i, p in enumerate(scene.objects)))

        return self.layout.retry(lambda: None if (s := build()) == scene else s, lambda s: s)

    def _reason(self, index: int) -> _Row:
        category = grammar.REASON[index % len(grammar.REASON)]
        r = reasoning.reason(category, self.layout)
        answer, drawing = r.answer, r.drawing
        if self._draw_event("wrong_reason", self.config.wrong_reason):
            answer = other(self.rng, ("yes", "no") if answer in ("yes", "no") else DIGITS, answer)
            drawing = None if drawing is None else reasoning.drawn_digit(self.layout, answer)
        if drawing is not None:
            return _Row("reason", category, index, (r.text,), ("text", "image"), (answer, drawing))
        assert r.scene is not None
        return _Row("reason", category, index, (r.scene, r.text), ("text",), (answer,))


# --- prompts of the train split with their right outputs ---


class CleanPromptsConfig(Config):
    """Selects prompts: the first n of each task that a training run with this seed asks for."""

    seed: int = Field(default=0, ge=0)
    """Seed of the prompts."""
    counts: dict[TaskKind, Natural] = Field(
        default={"generate": 3920, "understand": 8960, "edit": 1680, "reason": 3360}
    )
    """140 steps of quickstart.yaml."""


@dataclass(frozen=True)
class CleanPrompts:
    """Rows to imitate, under the names of a ``WebCorpus``."""

    generate: Sequence[Example]
    caption: Sequence[Example]
    """None: no prompt asks for one."""
    question: Sequence[Example]
    """The questions; those about one image are adjacent."""
    edit: Sequence[Example]
    reason: Sequence[Example]

    @classmethod
    def build(cls, config: CleanPromptsConfig, size: int, questions_per_picture: int) -> CleanPrompts:
        """The corpus of the train split, with images of ``size`` pixels."""
        scenes = ScenesConfig(size=size, questions_per_picture=questions_per_picture)
        source, counts = ScenePrompts(scenes, "train", config.seed), config.counts
        rows = {task: LazyExamples(counts.get(task, 0), partial(source.example, task)) for task in TASKS}
        return cls(rows["generate"], (), rows["understand"], rows["edit"], rows["reason"])
