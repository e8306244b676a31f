"""Verifiable rewards of images: the text in them by optical character recognition, their facts by a verifier."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import PrivateAttr

from lvrpo.config import Config
from lvrpo.data.base import world_of
from lvrpo.errors import InputError
from lvrpo.images import to_uint8
from lvrpo.policies.base import Judge
from lvrpo.registry import resolve
from lvrpo.rewards.base import Scores, image_problems, score_each, score_images
from lvrpo.types import Fact, Group, Image, Prompt, Trajectory

# --- ocr ---


READERS: Mapping[str, str] = {"rapidocr": "lvrpo.rewards.verifiable_image:RapidReader"}
"""OCR readers by name; a class of your own is named my_package.module:Class."""

_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|(?<!\w)'([^']+)'(?!\w)|(?<!\w)‘([^’]+)’(?!\w)")


class TextReader(Protocol):
    """Made once, at the first image."""

    def __call__(self, image: Image) -> str:
        """The text in an image, lines in reading order with spaces between them; "" where there is none."""
        ...


class OCR(Config):
    """The share of the requested text that can be read in the image. Range [0, 1].

    Spacing does not matter. What is drawn beyond the text asked for counts as wrong; an image without text gets 0, for
    it was read and has none. An image that the reader fails on is masked.

    The text asked for: the answers of the prompt's facts of the kind "text", where it has some; else what is in
    quotation marks in the prompt, all of it, in order. Prompts with neither do not get this reward.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ()

    compare: Literal["distance", "exact"] = "distance"
    """distance: 1 - d / max(len(asked), len(read)), d the Levenshtein distance in characters. exact: 1 if both are the
    same, else 0."""
    case: bool = False
    """Whether case matters."""
    reader: str = "rapidocr"
    """rapidocr (PP-OCR, which carries its models; ``pip install 'lvrpo[ocr]'``), or a class of your own."""
    _read: TextReader = PrivateAttr()

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._read = resolve("text reader", self.reader, READERS, ("__call__",))()

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and asked_text(prompt) is not None

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        def score(prompt: Prompt, image: Image) -> float:
            return self.text_similarity(asked_text(prompt) or "", self._read(image))

        return score_images(groups, score, "the text reader failed")

    def text_similarity(self, asked: str, read: str) -> float:
        """The score of a text that was read."""
        one, two = (_plain_text(text, self.case) for text in (asked, read))
        if self.compare == "exact":
            return float(one == two)
        return 1 - edit_distance(one, two) / max(len(one), len(two), 1)


class RapidReader:
    """PP-OCR by the package rapidocr, on one thread."""

    def __init__(self) -> None:
        """Raises InputError without the package."""
        try:
            from rapidocr import RapidOCR  # type: ignore[reportMissingImports]  # an extra
        except ImportError as error:
            raise InputError(f"ocr: needs the package {error.name}: pip install 'lvrpo[ocr]'") from None
        self._make: Any = RapidOCR  # Any: the package is optional
        self._engine: Any = None

    def __call__(self, image: Image) -> str:
        if self._engine is None:
            settings = {
                "Global.log_level": "critical",
                "Global.use_cls": False,
                # by default small images are blown up to 736 pixels: ten times as slow, and no better
                "Det.limit_type": "max",
                "Det.limit_side_len": 960,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
            self._engine = self._make(params=settings)
        found = self._engine(to_uint8(image)[..., ::-1].copy())  # it wants blue first
        return " ".join(found.txts or ())


def asked_text(prompt: Prompt) -> str | None:
    """The text that an image is to show; None where the prompt asks for none."""
    facts = [fact.answer for fact in prompt.facts if fact.kind == "text"]
    quoted = facts or [next(filter(None, groups)) for groups in _QUOTED.findall(prompt.text)]
    return _plain_text(" ".join(quoted), case=True) or None


def _plain_text(text: str, case: bool) -> str:
    """Text with normalized spacing and letter width, in lower case unless ``case``."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    return text if case else text.casefold()


def edit_distance(one: str, two: str) -> int:
    """Levenshtein distance: the least number of characters put in, taken out or replaced."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(two, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


# --- scene_facts ---


class SceneFacts(Config):
    """Facts of the prompt that the image shows. Range [0, 1]."""

    judges: ClassVar = ("image",)
    sides: ClassVar = ()

    mode: Literal["fraction", "gated", "all", "mixed"] = "fraction"
    """fraction: the share that holds; trained alone it is hacked: an image full of objects satisfies any prompt.
    gated: the share that holds, halved where the number of objects is wrong, so that a full image gains nothing.
    all: 1 if every one holds, else 0. mixed: the mean of fraction and all."""

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and bool(prompt.facts) and all(fact.check for fact in prompt.facts)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        return score_facts(groups, self._value)

    def _value(self, facts: Sequence[Fact], holds: Sequence[bool]) -> float:
        fraction, everything = sum(holds) / len(holds), float(all(holds))
        if self.mode == "fraction":
            return fraction
        if self.mode == "all":
            return everything
        if self.mode == "mixed":
            return (fraction + everything) / 2
        counted = all(held for fact, held in zip(facts, holds, strict=True) if fact.kind in ("total", "count"))
        return fraction if counted else fraction / 2


def score_facts(groups: Sequence[Group], value: Callable[[Sequence[Fact], Sequence[bool]], float]) -> Scores:
    """Scores of a function of a prompt's facts and whether each holds; images that cannot be verified have none."""
    results = iter(fact_table(groups))
    problems = iter(unverifiable([trajectory for group in groups for trajectory in group.trajectories]))

    def score(trajectory: Trajectory) -> float | str:
        holds = next(results)
        return next(problems) or value(trajectory.prompt.facts, holds)

    return score_each(groups, score)


_last: tuple[list[Trajectory], list[list[bool]]] = ([], [])


def fact_table(groups: Sequence[Group]) -> list[list[bool]]:
    """Per trajectory, which facts of its prompt hold of its last image; none for one that cannot be verified.

    The last result is kept: several rewards and the metrics ask about the very same trajectories.
    """
    global _last
    trajectories = [t for group in groups for t in group.trajectories]
    known, results = _last
    if len(known) == len(trajectories) and all(a is b for a, b in zip(known, trajectories, strict=True)):
        return results
    results = [[False] * len(t.prompt.facts) for t in trajectories]
    alike: dict[tuple[str, torch.Size], list[int]] = {}
    for i, (trajectory, problem) in enumerate(zip(trajectories, unverifiable(trajectories), strict=True)):
        if trajectory.image is not None and problem is None:
            alike.setdefault((trajectory.prompt.world, trajectory.image.shape), []).append(i)
    for (world, _), places in alike.items():
        images = [image for i in places if (image := trajectories[i].image) is not None]
        facts = [trajectories[i].prompt.facts for i in places]
        for i, held in zip(places, world_of(world).holds(facts, images), strict=True):
            results[i] = [bool(one) for _, one in zip(trajectories[i].prompt.facts, held, strict=True)]
    _last = (trajectories, results)
    return results


def unverifiable(trajectories: Sequence[Trajectory]) -> list[str | None]:
    """Per trajectory, the reason why the verifier cannot read its last image; None if it can."""
    return [
        problem if image is None or problem else world_of(trajectory.prompt.world).unreadable(image)
        for trajectory, problem in zip(trajectories, image_problems(trajectories), strict=True)
        for image in [trajectory.image]
    ]
