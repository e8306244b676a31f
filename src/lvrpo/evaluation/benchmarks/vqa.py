"""Benchmarks whose prompts come with questions: GenEval 2 and DPG-Bench, by one scorer for all judges.

The judge is the model's own frozen understanding side, a model of ``transformers`` in a folder, or one behind an
OpenAI-compatible address.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

from lvrpo.config import parse_section, read_yaml
from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.image_benchmark import digest, image_benchmark
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, PublishedBenchmark
from lvrpo.evaluation.scoring import CONFIRMED
from lvrpo.evaluation.suite import Benchmark
from lvrpo.policies.base import Judge
from lvrpo.reading import Record, parse_typed_json, read_lines, read_text
from lvrpo.records import MeanOver
from lvrpo.rewards.base import Failures, SampleIndex, Scores, scorable_images
from lvrpo.rewards.endpoint import ChatEndpoint, EndpointConfig
from lvrpo.rewards.external import ExternalVLM
from lvrpo.rewards.self_vqa import BOTH_ORDERS, SelfVQA
from lvrpo.rewards.vlm_endpoint import ask_endpoint, read_answer
from lvrpo.types import Fact, Group, Prompt

Combine = Callable[[Prompt, Sequence[float]], float]
"""The score of an image from the score of each of its questions, both in [0, 1]."""
ONE_WORD = "{question} Answer in one word."
"""Template of a question to an endpoint."""
SMALLEST = 1e-6
"""Below this a score counts as this in a geometric mean, which one question would otherwise set to 0."""


class ImageJudge:
    """Who looks at images: a folder of ``transformers``, an endpoint, or neither, which is the policy's judge."""

    def __init__(self, vlm: Path | None = None, device: str = "auto") -> None:
        """``vlm``: a folder, or a YAML file with the keys of an endpoint; None: the judge itself. Raises InputError."""
        is_folder = vlm is not None and vlm.is_dir()
        self.reader = ExternalVLM(str(vlm), device) if is_folder else None
        self.endpoint = None
        if vlm is not None and not is_folder:
            self.endpoint = ChatEndpoint(parse_section(EndpointConfig, read_yaml(vlm), vlm))
        named = self.reader or self.endpoint
        self.judged_by = "the judge" if named is None else named.identity


class QuestionScorer:
    """Asks a judge every question of a prompt about its image and combines the answers. Range [0, 1].

    Of a policy or a folder, the score of a question is the share of the right answer among those to choose from
    (``SelfVQA``); of an endpoint, 1 for the right answer and 0 for another. One question without an answer masks the
    image.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ("read",)

    def __init__(self, combine: Combine, vlm: Path | None = None, device: str = "auto") -> None:
        """``vlm``: see ``ImageJudge``. Raises InputError."""
        self.combine = combine
        self._vqa = SelfVQA(choices=BOTH_ORDERS)
        self._judge = ImageJudge(vlm, device)
        self.judged_by = self._judge.judged_by

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and bool(prompt.facts)

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        if self._judge.endpoint is not None:
            found, failures = self._ask_endpoint(groups, self._judge.endpoint)
        else:
            confidences, failures = self._vqa.confidences(groups, judge, self._judge.reader or judge)
            found = {cell: each.tolist() for cell, each in confidences.items()}
        combined = {(p, g): self.combine(groups[p].prompt, answers) for (p, g), answers in found.items()}
        return Scores.of(groups, combined, failures)

    def _ask_endpoint(
        self, groups: Sequence[Group], endpoint: ChatEndpoint
    ) -> tuple[dict[SampleIndex, list[float]], Failures]:
        images, failures = scorable_images(groups)
        asked = [
            ((p, g), (image, ONE_WORD.format(question=fact.question)), fact.answer)
            for (p, g), image in images.items()
            for fact in groups[p].prompt.facts
        ]
        found, unanswered = ask_endpoint(endpoint, asked, read_answer)
        return found, failures | unanswered


# --- GenEval 2 ---


GENEVAL2_FILE = "geneval2_data.jsonl"
NUMBER_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class GenEval2Row(Record):
    """One line of the prompts of GenEval 2."""

    prompt: str
    atom_count: int
    vqa_list: list[list[str]]
    skills: list[str]


def read_geneval2(path: Path) -> list[Prompt]:
    """The prompts of a file with their questions; raises InputError, with file and line."""
    found = []
    for number, line in read_lines(path, f"give {GENEVAL2_FILE} of GenEval 2"):
        where = f"{path}:{number}"
        row = parse_typed_json(line, GenEval2Row, where, "give a file of GenEval 2")
        pairs, skills = row["vqa_list"], row["skills"]
        if not pairs or len(pairs) != len(skills) or any(len(pair) != 2 for pair in pairs):
            raise InputError(f"{where}: vqa_list must hold a question with its answer for each of skills: restore it")
        facts = []
        for (question, answer), skill in zip(pairs, skills, strict=True):
            right = answer.lower()
            facts.append(Fact(skill, question, right, choices=NUMBER_WORDS if right in NUMBER_WORDS else ()))
        key = f"geneval2/{number - 1:05d}"
        category = f"{row['atom_count']} atoms"
        found.append(Prompt(key, "generate", (row["prompt"],), ("image",), None, tuple(facts), category, path.name))
    return found


def geometric_mean(prompt: Prompt, answers: Sequence[float]) -> float:
    """Soft-TIFA GM (arXiv:2512.16853): exp(mean_k log s_k), scores below ``SMALLEST`` taken as that."""
    return math.exp(sum(math.log(max(score, SMALLEST)) for score in answers) / len(answers))


def arithmetic_mean(prompt: Prompt, answers: Sequence[float]) -> float:
    """Soft-TIFA AM (arXiv:2512.16853): mean_k s_k."""
    return sum(answers) / len(answers)


def _build_geneval2(name: str, mean: Combine, folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    return [
        question_benchmark(name, read_geneval2(folder / GENEVAL2_FILE), QuestionScorer(mean, inputs.vlm, inputs.device))
    ]


# --- DPG-Bench ---


DPG_FILE = "dpg_bench.csv"
DPG_SAMPLES = 4
DPG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "category_broad", "question_natural_language")


def read_dpg(path: Path) -> tuple[list[Prompt], dict[str, list[list[int]]]]:
    """The prompts of the table with their questions, and by prompt the places of the questions that each depends on.

    Raises InputError, with file and line, for a table of another form.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, f"give {DPG_FILE} of DPG-Bench")))
    lost = [name for name in DPG_COLUMNS if name not in (reader.fieldnames or ())]
    if lost:
        raise InputError(f"{path}: has no column {lost[0]!r}: give {DPG_FILE} of DPG-Bench (not a pointer of Git LFS)")
    texts: dict[str, str] = {}
    rows: dict[str, list[tuple[int, list[int], Fact]]] = {}
    for number, row in enumerate(reader, start=2):
        try:
            own = int(row["proposition_id"])
            needed = [int(each) for each in row["dependency"].split(",")]
        except (ValueError, AttributeError):
            raise InputError(
                f"{path}:{number}: proposition_id and dependency must be whole numbers: restore it"
            ) from None
        item = row["item_id"]
        texts.setdefault(item, row["text"])
        fact = Fact(row["category_broad"] or "question", row["question_natural_language"], "yes")
        rows.setdefault(item, []).append((own, needed, fact))
    prompts, parents = [], {}
    for item, questions in rows.items():
        places = {own: place for place, (own, _, _) in enumerate(questions)}
        missing = [each for _, needed, _ in questions for each in needed if each and each not in places]
        if missing or not texts[item]:
            raise InputError(
                f"{path}: item {item!r}: depends on question {missing[:1]}, which it lacks, or has no text"
            )
        key = f"dpg/{item}"
        facts = tuple(fact for _, _, fact in questions)
        prompts.append(Prompt(key, "generate", (texts[item],), ("image",), facts=facts, source=path.name))
        parents[key] = [[places[each] for each in needed if each] for _, needed, _ in questions]
    if not prompts:
        raise InputError(f"{path}: no rows: give {DPG_FILE} of DPG-Bench")
    return prompts, parents


def dpg_score(parents: Sequence[Sequence[int]], answers: Sequence[float]) -> float:
    """Share of questions that are confirmed and whose parents are; a question is asked after its parents."""
    held = [score > CONFIRMED for score in answers]
    for place, needed in enumerate(parents):
        held[place] = held[place] and all(held[parent] for parent in needed)
    return sum(held) / len(held)


def build_dpg(folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    """The prompts, four images each."""
    prompts, parents = read_dpg(folder / DPG_FILE)
    scorer = QuestionScorer(lambda prompt, answers: dpg_score(parents[prompt.id], answers), inputs.vlm, inputs.device)
    return [question_benchmark("dpg", prompts, scorer, samples=DPG_SAMPLES)]


def question_benchmark(
    name: str, prompts: Sequence[Prompt], scorer: QuestionScorer, samples: int = 1, mean_over: MeanOver = "prompts"
) -> Benchmark:
    """A benchmark of images whose prompts come with questions."""
    text = "\n".join(str((p.parts, [(f.question, f.answer) for f in p.facts])) for p in prompts)
    data = f"{len(prompts)} prompts, {digest(text)}"
    return image_benchmark(name, prompts, scorer, data, scorer.judged_by, samples=samples, mean_over=mean_over)


NEEDS = "nothing: the model's own understanding side, --judge MODEL; or --vlm FOLDER or ENDPOINT.yaml"
GENEVAL2 = PublishedBenchmark(
    "geneval2",
    "github.com/facebookresearch/GenEval2 (arXiv:2512.16853)",
    (GENEVAL2_FILE,),
    800,
    NEEDS,
    "CC BY-NC 4.0",
    partial(_build_geneval2, "geneval2", geometric_mean),
    read_geneval2,
    digest="669b30703f73",
)
"""Soft-TIFA with the geometric mean, for whole prompts."""
GENEVAL2_AM = replace(
    GENEVAL2,
    name="geneval2_am",
    build=partial(_build_geneval2, "geneval2_am", arithmetic_mean),
    folder="geneval2",
)
"""Soft-TIFA with the arithmetic mean, for single questions."""
DPG = PublishedBenchmark(
    "dpg",
    "github.com/TencentQQGYLab/ELLA, dpg_bench (arXiv:2403.05135)",
    (DPG_FILE,),
    1065,
    NEEDS,
    "Apache-2.0",
    build_dpg,
    lambda path: read_dpg(path)[0],
    DPG_SAMPLES,
)
"""Dense prompts, whose questions depend on each other."""
