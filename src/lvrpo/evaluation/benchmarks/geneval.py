"""GenEval (arXiv:2310.11513): the official protocol on a detector, and its questions put to the model's own judge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from lvrpo.atomic_io import write_atomic
from lvrpo.data.geneval import (
    METADATA,
    OFFICIAL,
    Clause,
    GenEvalRow,
    Metadata,
    Relation,
    fingerprint,
    interleave_categories,
    read_metadata,
)
from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.detectors import ColorClassifier, Detection, Detector
from lvrpo.evaluation.benchmarks.image_benchmark import image_benchmark
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, PublishedBenchmark
from lvrpo.evaluation.scoring import CONFIRMED
from lvrpo.evaluation.suite import Benchmark
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import SampleIndex, Scores, score_images
from lvrpo.rewards.self_vqa import BOTH_ORDERS, SelfVQA
from lvrpo.types import Group, Image, Prompt

MAX_OBJECTS = 16
"""Objects of a class that count, the surest first."""
POSITION_MARGIN = 0.1
"""Share of both objects' sizes that an offset must exceed."""
MIN_COSINE = 0.5
"""A relation holds where the remaining offset has more than this share of the whole one along its axis."""


Colors = Callable[[str, Sequence[Detection]], Sequence[str]]
"""The color of each object of a class."""


def most_confident(found: Sequence[Detection], threshold: float) -> list[Detection]:
    """Up to ``MAX_OBJECTS`` detections with a score above a threshold, the surest first."""
    kept = [each for each in found if each.score > threshold]
    return sorted(kept, key=lambda each: -each.score)[:MAX_OBJECTS]


def relations(a: Detection, b: Detection) -> frozenset[Relation]:
    """Where ``a`` lies seen from ``b``: up to two relations, none where they are too close.

    The offset of the centers is shortened on each axis by ``POSITION_MARGIN`` times the sum of both sizes; what is
    left, divided by the length of the whole offset, must exceed ``MIN_COSINE``.
    """
    offset, left = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        sizes = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        offset.append(distance)
        left.append(math.copysign(max(abs(distance) - POSITION_MARGIN * sizes, 0.0), distance))
    if all(abs(each) < 1e-3 for each in left):
        return frozenset()
    x, y = (each / math.hypot(*offset) for each in left)
    found: set[Relation] = set()
    if abs(x) > MIN_COSINE:
        found.add("left of" if x < 0 else "right of")
    if abs(y) > MIN_COSINE:
        found.add("above" if y < 0 else "below")
    return frozenset(found)


def problems(metadata: Metadata, objects: Mapping[str, Sequence[Detection]], colors: Colors) -> list[str]:
    """The requirements that an image fails; [] if it is right.

    ``objects``: the detections of each class that count, the surest first. Colors and positions are checked of the
    surest ``count`` objects of a clause alone; a position holds where it does of every such object to every object of
    the clause that it refers to, which must itself be fulfilled.
    """
    found: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.include:
        chosen = list(objects.get(clause.name, ()))[: clause.count]
        problem = _problem(clause, chosen, matched, metadata, colors)
        found += [problem] if problem else []
        matched.append(None if problem else chosen)
    for clause in metadata.exclude:
        count = len(objects.get(clause.name, ()))
        if count >= clause.count:
            found.append(f"{count} {clause.name}, fewer than {clause.count} are right")
    return found


def _problem(
    clause: Clause,
    chosen: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    metadata: Metadata,
    colors: Colors,
) -> str | None:
    if len(chosen) < clause.count:
        return f"{len(chosen)} {clause.name}, at least {clause.count} are right"
    if clause.color is not None:
        seen = list(colors(clause.name, chosen))
        if seen.count(clause.color) < clause.count:
            return f"{clause.name} is {' and '.join(dict.fromkeys(seen))}, {clause.color} is right"
    if clause.position is not None:
        relation, target = clause.position
        other = matched[target]
        if other is None:
            return f"no {metadata.include[target].name} for {clause.name} to be {relation}"
        for one in chosen:
            for two in other:
                holds = relations(one, two)
                if relation not in holds:
                    return f"{clause.name} is {' and '.join(sorted(holds)) or 'at no side of it'}, {relation} is right"
    return None


SAMPLES = 4
"""Images per prompt."""
COUNTING = "counting"
"""The category whose objects have a threshold of their own."""


class GenEvalRules:
    """1 where the rules of GenEval hold of the objects that a detector finds in an image, else 0.

    An image that the detector fails on is masked.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ()

    def __init__(self, rows: Mapping[str, Metadata], detector: Detector, colors: ColorClassifier) -> None:
        """``rows``: the metadata of each prompt, by its id."""
        self.rows, self.detector, self.colors = rows, detector, colors

    def applies(self, prompt: Prompt) -> bool:
        return prompt.id in self.rows

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        def score(prompt: Prompt, image: Image) -> float:
            return float(not self.problems(self.rows[prompt.id], image))

        return score_images(groups, score, "the detector failed")

    def problems(self, metadata: Metadata, image: Image) -> list[str]:
        """Why an image is wrong; [] where it is right."""
        names = list(dict.fromkeys(clause.name for clause in (*metadata.include, *metadata.exclude)))
        threshold = self.detector.thresholds[metadata.tag == COUNTING]
        found = {name: most_confident(each, threshold) for name, each in self.detector(image, names).items()}
        return problems(metadata, found, lambda name, objects: self.colors(image, name, objects))


class ConfirmedFacts:
    """1 where the judge confirms every fact of the prompt from the image alone, else 0.

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
    """``SAMPLES`` images per prompt, whose score is the mean over categories."""

    def texts(prompt: Prompt) -> list[str]:
        asked = [text for fact in prompt.facts for text in (fact.question, *(fact.choices or (fact.answer,)))]
        return [str(prompt.parts[0]), *(asked if isinstance(reward, ConfirmedFacts) else ())]

    return image_benchmark(
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


def write_layout(folder: Path, rows: Sequence[GenEvalRow], images: Mapping[str, Sequence[bytes]]) -> None:
    """The official output layout: 00000/metadata.jsonl with the row, and 00000/samples/0000.png ...

    ``images``: PNG files by prompt id. Raises InputError for a prompt without images, before it writes anything.
    """
    missing = [row for row in rows if not images.get(row.prompt.id)]
    if missing:
        raise InputError(
            f"{folder}: prompt {missing[0].prompt.id} has no image ({len(missing)} of {len(rows)} have none): "
            "evaluate all prompts first"
        )
    for row in rows:
        samples = folder / f"{row.index:05d}" / "samples"
        samples.mkdir(parents=True, exist_ok=True)
        write_atomic(samples.parent / "metadata.jsonl", (json.dumps(row.raw) + "\n").encode())
        for number, image in enumerate(images[row.prompt.id]):
            write_atomic(samples / f"{number:04d}.png", image)


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
    "nothing: the model's own understanding side, or --judge MODEL",
    "MIT",
    build_geneval_vqa,
    read_prompts,
    SAMPLES,
    folder="geneval",
)
"""Exact questions that follow from the metadata, for the frozen judge; not comparable with published numbers."""
