"""Verifiable reward: the text that a drawing was to show is read back by optical character recognition."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch

from lvrpo.config import Config
from lvrpo.errors import InputError, LvrpoError
from lvrpo.policies.base import Policy
from lvrpo.registry import resolve
from lvrpo.rewards.base import Scores, problem_of
from lvrpo.rewards.questions import words_of
from lvrpo.types import Group, Image, Prompt

READERS: Mapping[str, str] = {"rapidocr": "lvrpo.rewards.drawn_text:RapidReader"}
"""Who reads, by name; one's own is named my_package.module:Class."""

_QUOTED = re.compile(r"\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|(?<!\w)'([^']+)'(?!\w)|(?<!\w)‘([^’]+)’(?!\w)")


class TextReader(Protocol):
    """Made once, at the first picture."""

    def __call__(self, image: Image) -> str:
        """The text in a picture, lines in reading order with spaces between them; "" where there is none."""
        ...


class DrawnText(Config):
    """How much of the text asked for can be read in the drawing. Range [0, 1].

    Spacing does not matter. What is drawn beyond the text asked for counts as wrong; a picture without text gets 0, for
    it was read and has none. A picture that the reader fails on is masked.

    The text asked for: the answers of the prompt's facts of the kind "text", where it has some; else what stands in
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
    _read: TextReader

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._read = resolve("text reader", self.reader, READERS, ("__call__",))()

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and asked_text(prompt) is not None

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                image, problem = trajectory.image, problem_of(trajectory)
                if image is None or problem:
                    failures[p, g] = str(problem)
                    continue
                try:
                    read = self._read(image)
                except LvrpoError:
                    raise
                except Exception as error:  # anybody's reader may raise anything
                    failures[p, g] = f"the text reader failed: {error!r}"
                else:
                    values[p, g] = self.of(asked_text(group.prompt) or "", read)
        return Scores(values, failures)

    def of(self, asked: str, read: str) -> float:
        """The score of a text that was read."""
        one, two = (plain_text(text, self.case) for text in (asked, read))
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
            raise InputError(f"drawn_text: needs the package {error.name}: pip install 'lvrpo[ocr]'") from None
        self._make: Any = RapidOCR  # Any: the package is optional
        self._engine: Any = None

    def __call__(self, image: Image) -> str:
        if self._engine is None:
            settings = {
                "Global.log_level": "critical",
                "Global.use_cls": False,
                # by default small pictures are blown up to 736 pixels: ten times as slow, and no better
                "Det.limit_type": "max",
                "Det.limit_side_len": 960,
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
            self._engine = self._make(params=settings)
        pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        found = self._engine(pixels[..., ::-1].copy())  # it wants blue first
        return " ".join(found.txts or ())


def asked_text(prompt: Prompt) -> str | None:
    """The text that a picture is to show; None where the prompt asks for none."""
    facts = [fact.answer for fact in prompt.facts if fact.kind == "text"]
    quoted = facts or [next(filter(None, groups)) for groups in _QUOTED.findall(words_of(prompt))]
    return plain_text(" ".join(quoted), case=True) or None


def plain_text(text: str, case: bool) -> str:
    """In one spacing and one width of letters, and in lower case unless ``case``."""
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
