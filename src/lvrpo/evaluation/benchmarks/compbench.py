"""T2I-CompBench++ (TPAMI 2025, arXiv:2307.06350): its prompts, with questions that a judge of images answers.

The official scores come from BLIP (attributes: the product over noun phrases of P(yes)), UniDet and CLIP. Here one
judge answers questions that follow from the form of a prompt; of another form the question is about the whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from lvrpo.data.geneval import interleave_categories, plural
from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, HubData, PublishedBenchmark
from lvrpo.evaluation.benchmarks.vqa import NEEDS, NUMBER_WORDS, QuestionScorer, question_benchmark
from lvrpo.evaluation.suite import Benchmark
from lvrpo.reading import read_lines
from lvrpo.types import Fact, Prompt

ATTRIBUTES = ("color", "shape", "texture")
CATEGORIES = (*ATTRIBUTES, "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
FILES = tuple(f"{name}_val.txt" for name in CATEGORIES)
SAMPLES = 10
"""Images per prompt."""
LONGEST_PHRASE = 5
"""Words; what is longer is part of a sentence."""
_RELATIONS = (
    *("next to", "near", "on side of", "on the side of", "on the left of", "on the right of", "on the top of"),
    *("on the bottom of", "in front of", "behind", "hidden by"),
)
_RELATION = re.compile(rf"(an? [\w' -]+?) ({'|'.join(_RELATIONS)}) (an? [\w' -]+)", re.IGNORECASE)
_COUNT = re.compile(rf"\b({'|'.join(NUMBER_WORDS)}) (\w[\w-]*)", re.IGNORECASE)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of an official file, whose name says the category; raises InputError."""
    category = re.sub(r"_(val|train)$", "", path.stem)
    if category not in CATEGORIES:
        raise InputError(f"{path}: is no file of T2I-CompBench++: give {', '.join(FILES)}")
    return [
        Prompt(
            f"t2i_compbench/{category}/{number - 1:04d}",
            "generate",
            (line,),
            ("image",),
            facts=facts_of(line, category),
            category=category,
            source=path.name,
        )
        for number, line in read_lines(path, f"give {path.name} of T2I-CompBench++")
    ]


def facts_of(text: str, category: str) -> tuple[Fact, ...]:
    """The questions of a prompt: of its two phrases, of two objects and their relation, of its numbers, or one."""
    plain = text.rstrip(" .")
    found: list[Fact] = []
    if category in ATTRIBUTES:
        phrases = plain.split(" and ")
        if len(phrases) == 2 and all(map(_is_phrase, phrases)):
            found = [_exists(category, phrase) for phrase in phrases]
    elif category in ("spatial", "3d_spatial"):
        named = _RELATION.fullmatch(plain)
        if named is not None:
            one, relation, other = named[1], named[2].lower(), named[3]
            words = f"Is the {_bare(one)} {relation} the {_bare(other)} in the picture?"
            found = [_exists("exists", one), _exists("exists", other), Fact(category, words, "yes")]
    elif category == "numeracy":
        for number, noun in _COUNT.findall(plain):
            many = plural(noun.lower()) if number.lower() == "one" else noun.lower()
            words = f"How many {many} are in the picture?"
            found.append(Fact("count", words, number.lower(), choices=NUMBER_WORDS))
    return tuple(found) or (Fact(category, f'Does the picture show exactly this: "{plain}"?', "yes"),)


def _is_phrase(text: str) -> bool:
    """Whether a part of a prompt is a thing with its attribute, and not half a sentence."""
    words = text.split()
    return 2 <= len(words) <= LONGEST_PHRASE and "with" not in words and "," not in text and words[0] != "The"


def _exists(kind: str, phrase: str) -> Fact:
    words = phrase[:1].lower() + phrase[1:]
    article = words.split()[0] in ("a", "an", "the")
    be = "Is" if article or not words.endswith("s") or words.endswith("ss") else "Are"
    return Fact(kind, f"{be} there {words} in the picture?", "yes")


def _bare(phrase: str) -> str:
    return re.sub(r"^an? ", "", phrase, flags=re.IGNORECASE)


def combine(prompt: Prompt, answers: Sequence[float]) -> float:
    """Numbers: the mean over the things that are counted; else the product, as of the official attributes."""
    return sum(answers) / len(answers) if prompt.category == "numeracy" else math.prod(answers)


def build(folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    """The eight categories, whose scores have equal weight."""
    prompts = interleave_categories([prompt for file in FILES for prompt in read_prompts(folder / file)])
    scorer = QuestionScorer(combine, inputs.vlm, inputs.device)
    return [question_benchmark("t2i_compbench", prompts, scorer, SAMPLES, "categories")]


HUB = HubData(
    "NinaKarine/t2i-compbench",
    tuple(file.removesuffix(".txt") for file in FILES),
    ("text",),
    lambda rows: {f"{table}.txt": "".join(f"{row['text']}\n" for row in found) for table, found in rows.items()},
)
BENCHMARK = PublishedBenchmark(
    "t2i_compbench",
    "github.com/Karine-Huang/T2I-CompBench, examples/dataset (T2I-CompBench++, arXiv:2307.06350)",
    FILES,
    2400,
    NEEDS,
    "MIT",
    build,
    read_prompts,
    SAMPLES,
    hub=HUB,
)
"""Attributes, relations, numbers and whole sentences by one judge; the official experts are others."""
