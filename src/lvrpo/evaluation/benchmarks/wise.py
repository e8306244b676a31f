"""WISE (arXiv:2503.07265): prompts that need knowledge of the world, rated by a judge that is told what they mean.

``wise`` is the benchmark of the paper (WISE_legacy) with its WiScore, ``wise_verified`` the maintained version, where a
image is right or wrong. The instructions to the judge are lvrpo's own words for the published criteria.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lvrpo.data.geneval import interleave_categories
from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.image_benchmark import digest, image_benchmark
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, HubData, PublishedBenchmark, Rows
from lvrpo.evaluation.benchmarks.vqa import NEEDS, ImageJudge
from lvrpo.evaluation.suite import Benchmark
from lvrpo.policies.base import Judge, require_method
from lvrpo.reading import Record, read_json, validate_type
from lvrpo.rewards.base import SampleIndex, Scores, first_problem, scorable_images
from lvrpo.rewards.endpoint import ChatEndpoint, NoAnswer
from lvrpo.rewards.self_vqa import Reader
from lvrpo.types import Group, Image, Parts, Prompt

REQUEST = """A picture was drawn for this prompt. The explanation says what it means and what a right picture shows.
Prompt: {prompt}
Explanation: {explanation}
Rate the picture by these criteria; in doubt choose the lower number.
{criteria}
Answer with {lines} and nothing else:
{form}"""


@dataclass(frozen=True)
class Aspect:
    """One number that the judge gives."""

    name: str
    weight: float
    criteria: str
    """What each number means."""


@dataclass(frozen=True)
class Protocol:
    """A version of the benchmark."""

    name: str
    files: tuple[str, ...]
    categories: Mapping[str, range]
    """The ids of the prompts of each; the official weights of the categories are their shares of the prompts."""
    aspects: tuple[Aspect, ...]
    best: int
    """The highest number of an aspect; the lowest is 0."""


LEGACY = Protocol(
    "wise",
    ("cultural_common_sense.json", "spatio-temporal_reasoning.json", "natural_science.json"),
    {
        "culture": range(1, 401),
        "time": range(401, 568),
        "space": range(568, 701),
        "biology": range(701, 801),
        "physics": range(801, 901),
        "chemistry": range(901, 1001),
    },
    (
        Aspect(
            "Consistency",
            0.7,
            "2: everything that prompt and explanation ask for is there and right; 1: a part of it; 0: the main point "
            "is missing or contradicted",
        ),
        Aspect(
            "Realism",
            0.2,
            "2: materials, light, space and physics are those of a photograph; 1: believable, with visible flaws; 0: "
            "artificial or physically impossible",
        ),
        Aspect(
            "Aesthetic Quality",
            0.1,
            "2: outstanding composition, color and style; 1: pleasant and ordinary; 0: poor",
        ),
    ),
    2,
)
VERIFIED = Protocol(
    "wise_verified",
    tuple(file.replace(".json", "_verified.json") for file in LEGACY.files),
    {
        "culture": range(1, 401),
        "time": range(401, 521),
        "space": range(521, 641),
        "biology": range(641, 761),
        "physics": range(761, 881),
        "chemistry": range(881, 1001),
    },
    (
        Aspect(
            "Score",
            1.0,
            "1: the picture shows what the explanation asks for, every important relation is right, and it is clear "
            "enough to be judged (plain style or composition does not matter); 0: anything else",
        ),
    ),
    1,
)


COLUMNS = ("Prompt", "Explanation", "prompt_id")


class WiseRow(Record):
    """One prompt of the official files."""

    Prompt: str
    Explanation: str
    prompt_id: int


def read_rows(path: Path, protocol: Protocol) -> dict[str, tuple[Prompt, str]]:
    """The prompts of a file with their explanations, by id; raises InputError."""
    remedy = f"give {path.name} of WISE"
    rows = validate_type(read_json(path, remedy), list[WiseRow], str(path), remedy)
    found: dict[str, tuple[Prompt, str]] = {}
    for row in rows:
        number = row["prompt_id"]
        category = next((name for name, ids in protocol.categories.items() if number in ids), None)
        key = f"{protocol.name}/{number:04d}"
        if category is None or key in found or not row["Prompt"].strip():
            raise InputError(f"{path}: prompt_id {number}: stands twice, has no text or is none of 1 to 1000: {remedy}")
        prompt = Prompt(key, "generate", (row["Prompt"],), ("image",), category=category, source=path.name)
        found[key] = (prompt, row["Explanation"])
    if not found:
        raise InputError(f"{path}: has no prompts: {remedy}")
    return found


def read_scores(said: str, protocol: Protocol) -> tuple[int, ...] | NoAnswer:
    """The numbers of an answer, which holds a line for each aspect and no other; anything else is no answer."""
    lines = [line.replace("*", "").strip() for line in said.splitlines()]
    lines = [line for line in lines if line]
    found: dict[str, int] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        aspect = next((a.name for a in protocol.aspects if a.name.lower() == name.strip().lower()), None)
        number = re.fullmatch(r"[0-9]+", value.strip())
        if not colon or aspect is None or aspect in found or number is None or int(number[0]) > protocol.best:
            break
        found[aspect] = int(number[0])
    if len(found) != len(protocol.aspects) or len(lines) != len(found):
        names = ", ".join(aspect.name for aspect in protocol.aspects)
        return NoAnswer(f"the judge said {' '.join(said.split())[:60]!r}: not 0 to {protocol.best} for {names} alone")
    return tuple(found[aspect.name] for aspect in protocol.aspects)


def wi_score(numbers: Sequence[int], protocol: Protocol) -> float:
    """sum_a w_a k_a / k_max: of ``wise`` (.7 consistency + .2 realism + .1 aesthetic quality) / 2. Range [0, 1]."""
    return sum(a.weight * number for a, number in zip(protocol.aspects, numbers, strict=True)) / protocol.best


class WiScore:
    """The WiScore of an image by a judge that knows the explanation. Range [0, 1].

    An endpoint writes all numbers in one answer; of a policy or a folder each number is the one that it gives the
    highest probability. An image without a number for every aspect is masked.
    """

    judges: ClassVar = ("image",)
    sides: ClassVar = ("read",)

    def __init__(self, protocol: Protocol, explanations: Mapping[str, str], judge: ImageJudge) -> None:
        """``explanations``: by the id of the prompt."""
        self.protocol, self.explanations, self.judge = protocol, explanations, judge

    def applies(self, prompt: Prompt) -> bool:
        return prompt.id in self.explanations

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        reader = self.judge.reader or judge
        images, failures = scorable_images(groups, None if self.judge.endpoint is not None else reader)
        rows = [(groups[p].prompt, image) for (p, _), image in images.items()]
        endpoint = self.judge.endpoint
        found = self._rated(rows, reader) if endpoint is None else self._asked(rows, endpoint)
        scores: dict[SampleIndex, float] = {}
        for cell, numbers in zip(images, found, strict=True):
            if isinstance(numbers, NoAnswer):
                failures[cell] = numbers.reason
            else:
                scores[cell] = wi_score(numbers, self.protocol)
        return Scores.of(groups, scores, failures)

    def request(self, prompt: Prompt, aspects: Sequence[Aspect]) -> str:
        """What the judge is asked about an image of a prompt."""
        span = "0 or 1" if self.protocol.best == 1 else "0, 1 or 2"
        return REQUEST.format(
            prompt=prompt.parts[-1],
            explanation=self.explanations[prompt.id],
            criteria="\n".join(f"{aspect.name}: {aspect.criteria}." for aspect in aspects),
            lines="this line" if len(aspects) == 1 else f"these {len(aspects)} lines",
            form="\n".join(f"{aspect.name}: <{span}>" for aspect in aspects),
        )

    def _asked(self, rows: Sequence[tuple[Prompt, Image]], endpoint: ChatEndpoint) -> list[tuple[int, ...] | NoAnswer]:
        said = endpoint.ask([(image, self.request(prompt, self.protocol.aspects)) for prompt, image in rows])
        return [each if isinstance(each, NoAnswer) else read_scores(each, self.protocol) for each in said]

    def _rated(self, rows: Sequence[tuple[Prompt, Image]], reader: Reader) -> list[tuple[int, ...] | NoAnswer]:
        aspects, levels = self.protocol.aspects, self.protocol.best + 1
        contexts: list[Parts] = []
        answers: list[str] = []
        for prompt, image in rows:
            for aspect in aspects:
                contexts += [(image, self.request(prompt, (aspect,)))] * levels
                answers += [f"{aspect.name}: {level}" for level in range(levels)]
        if not contexts:
            return []
        said = require_method(reader, "text_logprob").text_logprob(contexts, answers).view(len(rows), -1)
        found: list[tuple[int, ...] | NoAnswer] = []
        for row in said.tolist():
            problem = first_problem(row)
            parts = [row[start : start + levels] for start in range(0, len(row), levels)]
            found.append(NoAnswer(problem) if problem else tuple(part.index(max(part)) for part in parts))
        return found


def build(protocol: Protocol, folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    """All prompts, an image each; raises InputError where one of the thousand is missing."""
    rows: dict[str, tuple[Prompt, str]] = {}
    for file in protocol.files:
        rows |= read_rows(folder / file, protocol)
    judge = ImageJudge(inputs.vlm, inputs.device)
    prompts = interleave_categories([prompt for prompt, _ in rows.values()])
    scorer = WiScore(protocol, {key: explanation for key, (_, explanation) in rows.items()}, judge)
    text = "\n".join(f"{prompt.parts} {explanation}" for prompt, explanation in rows.values())
    data = f"{len(prompts)} prompts, {digest(f'{REQUEST}{protocol.aspects}{text}')}"
    return [image_benchmark(protocol.name, prompts, scorer, data, judge.judged_by)]


def files_of(rows: Mapping[str, Rows], protocol: Protocol) -> dict[str, str]:
    """The official files of rows that are in one table; what belongs to no category is in the last."""
    ends = [max(protocol.categories[name]) for name in ("culture", "space")]
    parts: list[list[dict[str, Any]]] = [[], [], []]
    for row in rows[""]:
        parts[sum(int(row["prompt_id"]) > end for end in ends)].append(dict(row))
    return {file: json.dumps(part) for file, part in zip(protocol.files, parts, strict=True)}


def _published(protocol: Protocol, where: str, hub: str | None = None) -> PublishedBenchmark:
    return PublishedBenchmark(
        protocol.name,
        f"github.com/PKU-YuanGroup/WISE, {where} (arXiv:2503.07265)",
        protocol.files,
        sum(map(len, protocol.categories.values())),
        NEEDS,
        "none stated",
        partial(build, protocol),
        lambda path: [prompt for prompt, _ in read_rows(path, protocol).values()],
        hub=None if hub is None else HubData(hub, (), COLUMNS, partial(files_of, protocol=protocol)),
    )


WISE = _published(LEGACY, "WISE_legacy/data", "Yuwei-Niu/WISE")
"""The benchmark of the paper."""
WISE_VERIFIED = _published(VERIFIED, "data_verified")
"""Its maintained version of 2026."""
