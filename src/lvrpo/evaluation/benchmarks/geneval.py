"""GenEval (arXiv:2310.11513): the official protocol on a detector, and its questions put to the model's own judge."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from lvrpo.atomic_io import write_atomic
from lvrpo.data.geneval import (
    METADATA,
    OFFICIAL,
    GenEvalRow,
    Metadata,
    fingerprint,
    interleave_categories,
    read_metadata,
)
from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.detectors import ColorClassifier, Detector
from lvrpo.evaluation.benchmarks.drawn import drawn_benchmark
from lvrpo.evaluation.benchmarks.geneval_rules import Detection, most_confident, problems
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, PublishedBenchmark
from lvrpo.evaluation.scoring import CONFIRMED
from lvrpo.evaluation.suite import Benchmark
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import SampleIndex, Scores, score_images
from lvrpo.rewards.self_vqa import BOTH_ORDERS, SelfVQA
from lvrpo.types import Group, Image, Prompt

SAMPLES = 4
"""Pictures per prompt."""
COUNTING = "counting"
"""The category whose objects have a threshold of their own."""


class FindsObjects(Protocol):
    """A detector."""

    thresholds: tuple[float, float]

    def __call__(self, image: Image, names: Sequence[str]) -> Mapping[str, Sequence[Detection]]:
        """The detections of each name."""
        ...


class NamesColors(Protocol):
    """A classifier of colors."""

    def __call__(self, image: Image, name: str, objects: Sequence[Detection]) -> Sequence[str]:
        """The color of each object."""
        ...


class GenEvalRules:
    """1 where the rules of GenEval hold of the objects that a detector finds in a drawing, else 0.

    A drawing that the detector fails on is masked.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ()

    def __init__(self, rows: Mapping[str, Metadata], detector: FindsObjects, colors: NamesColors) -> None:
        """``rows``: the metadata of each prompt, by its id."""
        self.rows, self.detector, self.colors = rows, detector, colors

    def applies(self, prompt: Prompt) -> bool:
        return prompt.id in self.rows

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        def score(prompt: Prompt, image: Image) -> float:
            return float(not self.problems(self.rows[prompt.id], image))

        return score_images(groups, score, "the detector failed")

    def problems(self, metadata: Metadata, image: Image) -> list[str]:
        """Why a picture is wrong; [] where it is right."""
        names = list(dict.fromkeys(clause.name for clause in (*metadata.include, *metadata.exclude)))
        threshold = self.detector.thresholds[metadata.tag == COUNTING]
        found = {name: most_confident(each, threshold) for name, each in self.detector(image, names).items()}
        return problems(metadata, found, lambda name, objects: self.colors(image, name, objects))


class ConfirmedFacts:
    """1 where the judge confirms every fact of the prompt from the drawing alone, else 0.

    It confirms a fact where it gives the right answer more than half of its confidence: among all numbers or colors,
    or of yes and no, which are offered in both orders.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ("read",)

    def __init__(self) -> None:
        self.vqa = SelfVQA(choices=BOTH_ORDERS)

    def applies(self, prompt: Prompt) -> bool:
        return self.vqa.applies(prompt)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        found, failures = self.vqa.confidences(groups, judge, judge)
        values: dict[SampleIndex, float] = {}
        for cell, confidences in found.items():
            if confidences.isnan().any():
                failures[cell] = "the judge gave no probability to any answer"
            else:
                values[cell] = float((confidences > CONFIRMED).all())
        return Scores.of(groups, values, failures)


def official_rows(path: Path) -> list[GenEvalRow]:
    """The official prompts of a file; raises InputError for others."""
    rows = read_metadata(path)
    found = fingerprint(rows)
    if found != OFFICIAL:
        raise InputError(
            f"{path}: {len(rows)} rows with fingerprint {found}: are not the 553 official prompts ({OFFICIAL}): get "
            f"prompts/{METADATA} of github.com/djghosh13/geneval; other rows of its format: lvrpo data benchmark"
        )
    return rows


def geneval_benchmark(
    name: str, prompts: Sequence[Prompt], reward: ConfirmedFacts | GenEvalRules, scored_by: str
) -> Benchmark:
    """``SAMPLES`` pictures per prompt, whose score is the mean over categories."""

    def texts(prompt: Prompt) -> list[str]:
        asked = [text for fact in prompt.facts for text in (fact.question, *(fact.choices or (fact.answer,)))]
        return [str(prompt.parts[0]), *(asked if isinstance(reward, ConfirmedFacts) else ())]

    return drawn_benchmark(
        name,
        interleave_categories(prompts),
        reward,
        f"GenEval, {len(prompts)} prompts, {OFFICIAL}",
        scored_by,
        metric="success",
        samples=SAMPLES,
        mean_over="categories",
        texts=texts,
    )


def build_geneval(folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    """The official protocol; raises InputError without a detector and a classifier of colors."""
    if inputs.detector is None or inputs.color_classifier is None:
        raise InputError(
            "benchmark geneval: needs --detector and --color-classifier (folders of transformers): a Mask2Former and a "
            "CLIP ViT-L/14 are the official ones; geneval_vqa needs neither"
        )
    rows = official_rows(folder / METADATA)
    detector = Detector(inputs.detector, inputs.thresholds, inputs.device)
    detector.require_names(
        list(dict.fromkeys(c.name for r in rows for c in (*r.metadata.include, *r.metadata.exclude)))
    )
    colors = ColorClassifier(inputs.color_classifier, inputs.device)
    reward = GenEvalRules({row.prompt.id: row.metadata for row in rows}, detector, colors)
    return [geneval_benchmark("geneval", [r.prompt for r in rows], reward, f"{detector.identity}; {colors.identity}")]


def build_geneval_vqa(folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    """The same prompts, whose questions a frozen policy answers."""
    prompts = [row.prompt for row in official_rows(folder / METADATA)]
    return [geneval_benchmark("geneval_vqa", prompts, ConfirmedFacts(), "the questions of the metadata, by the judge")]


def write_layout(folder: Path, rows: Sequence[GenEvalRow], pictures: Mapping[str, Sequence[bytes]]) -> None:
    """The official output layout: 00000/metadata.jsonl with the row, and 00000/samples/0000.png ...

    ``pictures``: PNG files by prompt id. Raises InputError for a prompt without pictures, before it writes anything.
    """
    missing = [row for row in rows if not pictures.get(row.prompt.id)]
    if missing:
        raise InputError(
            f"{folder}: prompt {missing[0].prompt.id} has no picture ({len(missing)} of {len(rows)} have none): "
            "evaluate all prompts first"
        )
    for row in rows:
        samples = folder / f"{row.index:05d}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        write_atomic(samples.parent / "metadata.jsonl", (json.dumps(row.raw) + "\n").encode())
        for number, picture in enumerate(pictures[row.prompt.id]):
            write_atomic(samples / f"{number:04d}.png", picture)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of any file of metadata."""
    return [row.prompt for row in read_metadata(path)]


SOURCE = "github.com/djghosh13/geneval (arXiv:2310.11513)"
GENEVAL = PublishedBenchmark(
    "geneval",
    SOURCE,
    (METADATA,),
    553,
    "--detector FOLDER, --color-classifier FOLDER (Mask2Former and CLIP ViT-L/14 are the official ones)",
    "MIT",
    build_geneval,
    read_prompts,
    SAMPLES,
)
"""The official protocol, on any detector of transformers."""
GENEVAL_VQA = PublishedBenchmark(
    "geneval_vqa",
    SOURCE,
    (METADATA,),
    553,
    "nothing: the model's own reading side, or --judge MODEL",
    "MIT",
    build_geneval_vqa,
    read_prompts,
    SAMPLES,
    folder="geneval",
)
"""Exact questions that follow from the metadata, for the frozen judge; not comparable with published numbers."""
