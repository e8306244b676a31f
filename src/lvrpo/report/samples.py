"""Samples of an evaluation, the same prompt before, during and after training, with images as data URIs."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from lvrpo.errors import InputError
from lvrpo.images import DECODE_ERRORS, open_image
from lvrpo.records import Sample, SampleKey
from lvrpo.report.formatting import label
from lvrpo.report.run import RunRecord

SHOWN_IMAGES = 12
SHOWN_ANSWERS = 9
SHOWN_WORST = 6
RIGHT = 0.999
"""A score from here on is right; scores are sums of float32."""


@dataclass(frozen=True)
class Frame:
    """The outputs of a prompt at one point of training."""

    phase: str
    sample: Sample | None
    image: EmbeddedImage | None

    @property
    def right(self) -> bool | None:
        return None if self.sample is None or self.sample.score is None else self.sample.score >= RIGHT

    @property
    def reward(self) -> float | None:
        """Its reward, where there is no ground truth."""
        return self.sample.reward if self.sample else None

    @property
    def fact_count(self) -> str:
        """``2 of 3 hold``; empty where nothing is known."""
        holds = [f.holds for f in self.sample.facts if f.holds is not None] if self.sample else []
        return f"{sum(holds)} of {len(holds)} hold" if holds else ""


@dataclass(frozen=True)
class SampleView:
    """One prompt over time."""

    id: str
    task: str
    category: str
    text: str
    answer: str
    source: EmbeddedImage | None
    frames: tuple[Frame, ...]
    facts: tuple[tuple[str, str, tuple[bool | None, ...]], ...]
    """(question, answer, whether it holds in each frame)."""

    @property
    def drawn(self) -> bool:
        return any(f.sample is not None and f.sample.image for f in self.frames)


@dataclass(frozen=True)
class Selection:
    """Some samples to show, and the rest behind a fold."""

    shown: tuple[SampleView, ...]
    folded: tuple[SampleView, ...]
    total: int


@dataclass(frozen=True)
class SampleSections:
    """All that the page shows of single samples."""

    images: Selection
    answers: Selection
    regressed: Selection
    still_wrong: Selection
    judged: int
    """The number of prompts that have a score before and after."""


def sample_sections(run: RunRecord, store: ImageStore) -> SampleSections:
    before, after = run.samples("before"), run.samples("after")
    ids = list(dict.fromkeys([*before, *after]))
    phases = _phases(run)
    views = {i: _view(i, phases, store) for i in ids}
    even = _round_robin([views[i] for i in ids])
    pairs = {i: (before[i].score, after[i].score) for i in ids if i in before and i in after}
    both = {i: (b, a) for i, (b, a) in pairs.items() if b is not None and a is not None}
    regressed = sorted((i for i, (b, a) in both.items() if a < RIGHT <= b), key=lambda i: both[i][1])
    wrong = sorted((i for i, (b, a) in both.items() if max(b, a) < RIGHT), key=lambda i: (both[i][1], -both[i][0]))
    return SampleSections(
        images=_select([v for v in even if v.drawn], SHOWN_IMAGES),
        answers=_select([v for v in even if not v.drawn], SHOWN_ANSWERS),
        regressed=_drawn_first(_select([views[i] for i in regressed], SHOWN_WORST)),
        still_wrong=_drawn_first(_select([views[i] for i in wrong], SHOWN_WORST)),
        judged=len(both),
    )


def _phases(run: RunRecord) -> list[tuple[str, dict[SampleKey, Sample]]]:
    """Before and after always; in between at most one, from the middle of the run, that shares prompts with them."""
    known = set(run.samples("before")) | set(run.samples("after"))
    between = [(name, dict(samples)) for name, samples in run.phases if name not in ("before", "after")]
    between = [(name, samples) for name, samples in between if known & set(samples)]
    middle = between[(len(between) - 1) // 2 : (len(between) - 1) // 2 + 1] if between else []
    after = dict(run.samples("after"))
    return [("before", dict(run.samples("before"))), *middle, *([("after", after)] if after else [])]


def _view(key: SampleKey, phases: list[tuple[str, dict[SampleKey, Sample]]], store: ImageStore) -> SampleView:
    samples = [found.get(key) for _, found in phases]
    known = [sample for sample in samples if sample is not None]
    first = known[0]
    frames = tuple(
        Frame(name, sample, store.image(sample.image) if sample else None)
        for (name, _), sample in zip(phases, samples, strict=True)
    )
    questions = dict.fromkeys((f.question, f.answer) for sample in known for f in sample.facts)
    facts = tuple((q, a, tuple(_holds(sample, q, a) for sample in samples)) for q, a in questions)
    source = next((sample.source_image for sample in known if sample.source_image), None)
    answer, given = first.answer or "", store.image(source)
    return SampleView(first.id, first.task, first.category, first.text, answer, given, frames, facts)


def _holds(sample: Sample | None, question: str, answer: str) -> bool | None:
    facts = sample.facts if sample else ()
    return next((f.holds for f in facts if (f.question, f.answer) == (question, answer)), None)


def _round_robin(views: list[SampleView]) -> list[SampleView]:
    """The first of each task and category, then the second of each, ...: nothing is chosen by how it came out."""
    queues: dict[tuple[str, str], list[SampleView]] = defaultdict(list)
    for view in views:
        queues[view.task, view.category].append(view)
    longest = max((len(q) for q in queues.values()), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues.values() if turn < len(queue)]


def _select(views: list[SampleView], most: int) -> Selection:
    return Selection(tuple(views[:most]), tuple(views[most : most * 5]), len(views))


def _drawn_first(selection: Selection) -> Selection:
    """Images and answers are cards of two shapes: each shape by itself, the worst of it first."""
    shown, folded = (tuple(sorted(v, key=lambda view: not view.drawn)) for v in (selection.shown, selection.folded))
    return Selection(shown, folded, selection.total)


def task_label(view: SampleView) -> str:
    category = view.category.replace("_", " ")
    name = {"understand": "Question", "generate": "Image"}.get(view.task) or label(view.task)
    return f"{name} · {category}" if category else name


PIXEL_ART = 64
"""Images up to this side are enlarged with hard pixel edges."""
LOSSLESS = 128


@dataclass(frozen=True)
class EmbeddedImage:
    """An image ready for ``<img>``."""

    uri: str
    width: int
    height: int

    @property
    def is_small(self) -> bool:
        return max(self.width, self.height) <= PIXEL_ART


class ImageStore:
    """Reads images below one run directory; each file once."""

    def __init__(self, run: Path) -> None:
        self.root = run.resolve()
        self._read: dict[tuple[str, int], EmbeddedImage | None] = {}

    def image(self, path: str | Path | None, most_side: int = 320) -> EmbeddedImage | None:
        """None for an image that is missing, broken, or outside the run directory."""
        if not path:
            return None
        key = (str(path), most_side)
        if key not in self._read:
            self._read[key] = self._load(self.root / path, most_side)
        return self._read[key]

    def _load(self, path: Path, most_side: int) -> EmbeddedImage | None:
        try:
            path = path.resolve()
            if not path.is_relative_to(self.root):
                return None
            with open_image(path, path) as opened:
                image = opened.convert("RGB")
        except (InputError, RuntimeError, *DECODE_ERRORS):  # RuntimeError: a link that leads to itself
            return None
        if max(image.size) > most_side:
            image.thumbnail((most_side, most_side), Image.Resampling.LANCZOS)
        return EmbeddedImage(_uri(image), *image.size)


def _uri(image: Image.Image) -> str:
    """PNG, or JPEG where that is smaller and the image is no pixel art."""
    choices = [("png", _encoded(image, "PNG", optimize=True))]
    if max(image.size) > LOSSLESS:
        choices.append(("jpeg", _encoded(image, "JPEG", quality=88)))
    kind, content = min(choices, key=lambda choice: len(choice[1]))
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
