"""Scores of a policy on benchmarks, with intervals, in the shape of ``summary.json`` (DESIGN section 6)."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import BENCHMARKS
from lvrpo.evaluation.benchmark import score_prompts
from lvrpo.policies.base import Policy, Sampling
from lvrpo.registry import resolve
from lvrpo.rewards.success import scorable
from lvrpo.statistics import Interval, mean_interval, paired_difference
from lvrpo.types import Group, Prompt

T = TypeVar("T")

SAMPLING = Sampling(group_size=1, temperature=0.0, max_new_tokens=8, num_steps=8)
"""What every benchmark starts from; temperature and guidance are the benchmark's own."""


@dataclass(frozen=True)
class Benchmark:
    """Prompts, and how they are put to a policy."""

    name: str
    prompts: Callable[[int], Sequence[Prompt]]
    """The first so many prompts."""
    n: int
    """How many by default."""
    temperature: float = 0.0
    guidance_scale: float = 1.0
    samples: int = 1
    """Outputs per prompt; a prompt's score is their mean."""

    def sampling(self, base: Sampling) -> Sampling:
        """``base`` with the benchmark's temperature and guidance."""
        return replace(base, temperature=self.temperature, guidance_scale=self.guidance_scale)


@dataclass(frozen=True)
class Scored:
    """One benchmark, prompt by prompt; enough to compute every interval, and to be paired with another policy's."""

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    clusters: tuple[str, ...]
    """What a prompt shares with others: its picture. Whole clusters are resampled."""
    scores: tuple[float, ...]

    def result(self) -> dict[str, Any]:
        """score, low, high, n, and the same per category."""
        return _by_category(self, lambda rows: mean_interval(_at(self.scores, rows), _at(self.clusters, rows)))

    def difference(self, after: Scored) -> dict[str, Any]:
        """``after`` minus this, paired by prompt."""
        if self.ids != after.ids:
            raise ContractError("the two evaluations hold different prompts: evaluate both with one command")

        def interval(rows: Sequence[int]) -> Interval:
            return paired_difference(_at(self.scores, rows), _at(after.scores, rows), _at(self.clusters, rows))

        return _by_category(self, interval)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: list(values) for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Sequence[Any]]) -> Scored:
        """What ``as_dict`` gave."""
        return cls(**{name: tuple(values) for name, values in raw.items()})


@dataclass(frozen=True)
class Evaluation:
    """A policy on several benchmarks."""

    scored: Mapping[str, Scored]
    groups: Mapping[str, Sequence[Group]] = field(default_factory=dict)
    """Sampled outputs that are kept to be shown."""
    seconds: float = 0.0

    def results(self) -> dict[str, Any]:
        """By benchmark: score, low, high, n, categories."""
        return {name: scored.result() for name, scored in self.scored.items()}

    def difference(self, after: Evaluation) -> dict[str, Any]:
        """By benchmark that both have: ``after`` minus this, with intervals."""
        return {name: s.difference(after.scored[name]) for name, s in self.scored.items() if name in after.scored}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: results for readers, and the scores that they come from."""
        return {
            "results": self.results(),
            "seconds": self.seconds,
            "scores": {name: scored.as_dict() for name, scored in self.scored.items()},
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Evaluation:
        """What ``as_dict`` gave, without the outputs."""
        scored = {name: Scored.from_dict(value) for name, value in raw["scores"].items()}
        return cls(scored, seconds=float(raw["seconds"]))


def find_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name; ``scenes`` is all of the built-in world, a name that ends in .jsonl is a file of rows."""
    found: list[Benchmark] = []
    for name in names:
        if name == "scenes":
            found += [resolve("benchmark", each, BENCHMARKS) for each in BENCHMARKS]
        elif name.endswith(".jsonl"):
            found.append(rows_benchmark(Path(name)))
        else:
            benchmark = resolve("benchmark", name, {**BENCHMARKS, "scenes": ""})
            if not isinstance(benchmark, Benchmark):
                raise InputError(f"benchmark {name!r}: is a {type(benchmark).__name__}: name a Benchmark")
            found.append(benchmark)
    doubled = [b.name for i, b in enumerate(found) if b.name in [other.name for other in found[:i]]]
    if doubled:
        raise InputError(f"benchmark {doubled[0]!r}: named twice: name each once")
    return found


def rows_benchmark(path: Path) -> Benchmark:
    """The user's own rows, greedy; texts need an answer, drawings facts that a verifier can check."""
    source = JsonlPrompts(JsonlConfig(test=path), "test", 0)
    prompts = [prompt for task in source.tasks for prompt in source.prompts(task, source.size(task))]
    unscored = [prompt.id for prompt in prompts if not scorable(prompt)]
    if unscored:
        raise InputError(f"{path}: row {unscored[0]!r} cannot be scored: give it an 'answer', or leave it out")
    return Benchmark(path.stem, lambda n: prompts[:n], n=len(prompts))


def evaluate(
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    sampling: Sampling = SAMPLING,
    keep: Callable[[str, Sequence[Group]], Sequence[Group]] = lambda name, groups: (),
    progress: Callable[[str, int], None] = lambda name, prompts: None,
) -> Evaluation:
    """Scores ``policy``; prompts, seeds and noise are the same for every policy, so that differences are paired.

    ``sizes`` overrides how many prompts a benchmark takes; ``keep`` chooses the outputs to hold on to.
    """
    started = time.perf_counter()
    scored: dict[str, Scored] = {}
    kept: dict[str, Sequence[Group]] = {}
    for benchmark in benchmarks:
        prompts = benchmark.prompts((sizes or {}).get(benchmark.name, benchmark.n))
        progress(benchmark.name, len(prompts))
        result = score_prompts(policy, prompts, benchmark.sampling(sampling), seed, benchmark.samples)
        scored[benchmark.name] = Scored(
            tuple(p.id for p in prompts),
            tuple(p.category for p in prompts),
            tuple(cluster_of(p) for p in prompts),
            result.scores,
        )
        kept[benchmark.name] = keep(benchmark.name, result.groups)
    return Evaluation(scored, kept, time.perf_counter() - started)


def cluster_of(prompt: Prompt) -> str:
    """The fingerprint of the prompt's pictures, or its own id where it has none."""
    digest = hashlib.blake2b(digest_size=8)
    pictures = [part for part in prompt.parts if not isinstance(part, str)]
    for picture in pictures:
        digest.update(picture.numpy().tobytes())
    return digest.hexdigest() if pictures else prompt.id


def _at(values: Sequence[T], rows: Sequence[int]) -> list[T]:
    return [values[i] for i in rows]


def _by_category(scored: Scored, interval: Callable[[Sequence[int]], Interval]) -> dict[str, Any]:
    rows: dict[str, list[int]] = {}
    for i, category in enumerate(scored.categories):
        rows.setdefault(category, []).append(i)
    whole = interval(range(len(scored.ids))).as_dict()
    return {**whole, "categories": {name: interval(chosen).as_dict() for name, chosen in rows.items() if name}}
