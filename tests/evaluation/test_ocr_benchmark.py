"""The benchmark of drawn text: its prompts, a perfect and a blank model."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks import ocr
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs
from lvrpo.evaluation.suite import evaluate, find_benchmarks
from lvrpo.policies.base import Sampling
from lvrpo.registry import allow_code
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.verifiable_image import OCR
from lvrpo.types import Group, Image, Prompt

LINES = ('A shop sign that says "Open Late"', "", 'A cake with "Happy" in icing')


class Reads:
    """Reads what the level of the image stands for."""

    def __call__(self, image: Image) -> str:
        return {0: "", 1: "Open late", 2: "HAPPY", 3: "Hoppy"}[round(float(image.mean()) * 4)]


class Draws:
    def __init__(self, levels: Sequence[int]) -> None:
        self.levels = levels

    def default_sampling(self, task: str) -> Sampling:
        return Sampling()

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        levels = dict(zip(("ocr/00000", "ocr/00002"), self.levels, strict=True))
        return [offline_group(p, [(torch.full((3, 4, 4), levels[p.id] / 4),)]) for p in prompts]


@pytest.fixture
def data(tmp_path: Path, few_prompts: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    module = types.ModuleType("somebodys_reader")
    vars(module).update(Reads=Reads)
    monkeypatch.setitem(sys.modules, "somebodys_reader", module)
    allow_code(["somebodys_reader"])
    monkeypatch.setattr(ocr, "OCR", lambda: OCR(reader="somebodys_reader:Reads"))
    (tmp_path / "ocr").mkdir()
    (tmp_path / "ocr" / ocr.PROMPTS).write_text("\n".join(LINES))
    return tmp_path


def score(data: Path, levels: Sequence[int]) -> Any:
    policy: Any = Draws(levels)
    return evaluate(policy, find_benchmarks(["ocr"], inputs=BenchmarkInputs(data))).results()["ocr"]


def test_a_perfect_model_scores_one_and_a_blank_one_zero(data: Path) -> None:
    assert (score(data, [1, 2])["score"], score(data, [0, 0])["score"]) == (1.0, 0.0)
    half = score(data, [1, 3])  # one letter of five is wrong
    assert (half["score"], half["n"]) == (pytest.approx((1 + 0.8) / 2), 2)


def test_a_prompt_without_text_to_draw_is_named(data: Path) -> None:
    file = data / "ocr" / ocr.PROMPTS
    file.write_text("A sign\n")
    with pytest.raises(InputError, match=r"test\.txt:1: no text in quotation marks"):
        find_benchmarks(["ocr"], inputs=BenchmarkInputs(data))
    file.write_text("\n")
    with pytest.raises(InputError, match="is empty"):
        find_benchmarks(["ocr"], inputs=BenchmarkInputs(data))
