from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont

from lvrpo.errors import InputError
from lvrpo.registry import allow_code
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.table import build_rewards
from lvrpo.rewards.verifiable_image import OCR, asked_text, edit_distance
from lvrpo.types import Fact, Group, Image, Prompt

SIGN = Prompt("s", "generate", ('a sign that says "Open late"',), ("image",))


class Fake:
    """Reads what the level of the image stands for."""

    said = {0.0: "", 0.25: "OPEN  LATE", 0.5: "open date", 0.75: "open late at night"}  # noqa: RUF012

    def __call__(self, image: Image) -> str:
        return self.said[round(float(image.mean()), 3)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("somebodys_ocr")
    vars(module).update(Fake=Fake)
    monkeypatch.setitem(sys.modules, "somebodys_ocr", module)
    allow_code(["somebodys_ocr"])
    return "somebodys_ocr:Fake"


def image(level: float) -> Image:
    return torch.full((3, 8, 12), level)


def test_the_share_of_the_text_that_can_be_read(group: Callable[..., Group], fake: str, judge: Any) -> None:
    groups = [group(SIGN, [[image(level)] for level in (0.25, 0.5, 0.75, 0.0)])]
    scores = OCR(reader=fake).score(groups, judge({}))
    assert scores.values[0].tolist() == pytest.approx([1, 1 - 1 / 9, 9 / 18, 0])
    assert OCR(compare="exact", reader=fake).score(groups, judge({})).values.tolist() == [[1, 0, 0, 0]]
    with_case = OCR(case=True, reader=fake).score(groups, judge({})).values[0]
    assert with_case.tolist() == pytest.approx([1 - 7 / 9, 1 - 2 / 9, 1 - 10 / 18, 0])


def test_what_cannot_be_read_is_masked(group: Callable[..., Group], fake: str, judge: Any) -> None:
    scores = OCR(reader=fake).score([group(SIGN, [[image(0.9)], [image(math.nan)], [image(0.0)]])], judge({}))
    assert scores.values[0].isnan().tolist() == [True, True, False]
    assert scores.failures == {
        (0, 0): "the text reader failed: KeyError: 0.9",
        (0, 1): "the image holds values that are no numbers",
    }


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ('a sign "OPEN" above a door with "no. 7"', "OPEN no. 7"),
        ("a shirt with “Hello  World”", "Hello World"),
        ("the word 'don’t' on a wall", "don’t"),
        ("the dog's bowl is the cat's", None),
        ("a sign", None),
        ('a sign ""', None),
        ('a sign " "', None),
    ],
)
def test_the_text_asked_for_stands_in_quotation_marks(words: str, asked: str | None, fake: str) -> None:
    prompt = Prompt("p", "generate", (words,), ("image",))
    assert asked_text(prompt) == asked
    assert OCR(reader=fake).applies(prompt) == (asked is not None)


def test_facts_of_the_kind_text_come_first(fake: str) -> None:
    facts = (Fact("color", "color ?", "red"), Fact("text", "what does it say ?", "EXIT"))
    assert asked_text(Prompt("p", "generate", ('a "red" sign',), ("image",), facts=facts)) == "EXIT"
    assert not OCR(reader=fake).applies(Prompt("q", "understand", (image(0), 'is it "x" ?'), ("text",)))


def test_edit_distances_worked_by_hand() -> None:
    for one, two, distance in (
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("ab", "ba", 2),
        ("a", "a", 0),
    ):
        assert edit_distance(one, two) == distance


@given(st.text("abc", max_size=8), st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_the_edit_distance_is_a_metric(one: str, two: str, three: str) -> None:
    assert edit_distance(one, two) == edit_distance(two, one)
    assert (edit_distance(one, two) == 0) == (one == two)
    assert edit_distance(one, three) <= edit_distance(one, two) + edit_distance(two, three)
    assert abs(len(one) - len(two)) <= edit_distance(one, two) <= max(len(one), len(two))


def test_bad_options_are_refused(fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"options.compare=near: must be 'distance' or 'exact'"):
        build_rewards([RewardConfig(name="ocr", options={"compare": "near"})])
    with pytest.raises(InputError, match="text reader 'rapidor': unknown: did you mean rapidocr"):
        OCR(reader="rapidor")
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(InputError, match=r"ocr: needs the package rapidocr: pip install 'lvrpo\[ocr\]'"):
        OCR()


def test_drawn_words_are_read(group: Callable[..., Group], judge: Any) -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")

    def drawn(text: str) -> Image:
        canvas = PilImage.new("RGB", (200, 64), "white")
        ImageDraw.Draw(canvas).text((10, 12), text, fill="black", font=ImageFont.load_default(32))
        return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1) / 255

    images = [drawn("OPEN LATE"), drawn("OPEN"), torch.ones(3, 32, 32)]
    reward = OCR()
    scores = reward.score([group(SIGN, [[image] for image in images])], judge({}))
    assert not scores.failures
    assert scores.values[0].tolist() == pytest.approx([1, 4 / 9, 0])
