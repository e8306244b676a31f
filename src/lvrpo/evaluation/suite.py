"""Scores of a policy on benchmarks, with intervals, in the shape of ``summary.json`` (DESIGN section 6)."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import BENCHMARKS
from lvrpo.evaluation.benchmark import score_prompts
from lvrpo.policies.base import Policy, Sampling, check_text
from lvrpo.registry import resolve
from lvrpo.rewards.held_out import SUCCESS_ONLY, HeldOutScorer, Metric
from lvrpo.statistics import Interval, mean_interval, paired_difference
from lvrpo.types import Group, Prompt, Task

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
    metric: Metric = "success"
    """What the scores are."""
    check: Callable[[Policy], object] = lambda policy: None
    """Raises InputError where a policy cannot read the prompts."""

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
    """nan where a reward failed; such prompts are left out of every mean."""
    metric: str = "success"
    """success: shares of right outputs; reward: means of the run's own rewards."""

    def result(self) -> dict[str, Any]:
        """score, low, high, n, metric, and the same per category."""
        found = _by_category(
            self, self._scored(), lambda rows: mean_interval(_at(self.scores, rows), _at(self.clusters, rows))
        )
        return {**found, "metric": self.metric}

    def _scored(self) -> list[int]:
        return [i for i, score in enumerate(self.scores) if math.isfinite(score)]

    def difference(self, after: Scored) -> dict[str, Any]:
        """``after`` minus this, paired by prompt."""
        if self.ids != after.ids:
            raise ContractError("the two evaluations hold different prompts: evaluate both with one command")

        def interval(rows: Sequence[int]) -> Interval:
            return paired_difference(_at(self.scores, rows), _at(after.scores, rows), _at(self.clusters, rows))

        both = sorted({*self._scored()} & {*after._scored()})
        return {**_by_category(self, both, interval), "metric": self.metric}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: values if isinstance(values, str) else list(values) for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Scored:
        """What ``as_dict`` gave."""
        scores = tuple(math.nan if score is None else score for score in raw["scores"])
        lists = {name: tuple(raw[name]) for name in ("ids", "categories", "clusters")}
        return cls(**lists, scores=scores, metric=str(raw.get("metric", "success")))


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


def find_benchmarks(
    names: Sequence[str],
    scorer: HeldOutScorer = SUCCESS_ONLY,
    side: int | None = None,
    root: Path | None = None,
) -> list[Benchmark]:
    """Benchmarks by name; ``scenes`` is all of the built-in world, a name that ends in .jsonl is a file of rows.

    Of files: ``scorer`` scores rows that cannot be told right from wrong, ``side`` is that of the pictures that the
    model reads, ``root`` another folder of pictures.
    """
    found: list[Benchmark] = []
    for name in names:
        if name == "scenes":
            found += [resolve("benchmark", each, BENCHMARKS) for each in BENCHMARKS]
        elif name.endswith(".jsonl"):
            found += file_benchmarks(Path(name), scorer, side, root)
        else:
            benchmark = resolve("benchmark", name, {**BENCHMARKS, "scenes": ""})
            if not isinstance(benchmark, Benchmark):
                raise InputError(f"benchmark {name!r}: is a {type(benchmark).__name__}: name a Benchmark")
            found.append(benchmark)
    doubled = [b.name for i, b in enumerate(found) if b.name in [other.name for other in found[:i]]]
    if doubled:
        raise InputError(f"benchmark {doubled[0]!r}: named twice: name each once")
    return found


def file_benchmarks(
    path: Path, scorer: HeldOutScorer = SUCCESS_ONLY, side: int | None = None, root: Path | None = None
) -> list[Benchmark]:
    """The user's own rows, greedy: ``own_benchmarks`` of a file."""
    source = JsonlPrompts(JsonlConfig(test=path, root=root), "test", 0, side)

    def check(policy: Policy) -> None:
        source.require_readable(partial(check_text, policy))

    return own_benchmarks(path.stem, source.in_order(), scorer, check, str(path))


def own_benchmarks(
    name: str,
    prompts: Sequence[Prompt],
    scorer: HeldOutScorer,
    check: Callable[[Policy], object] = lambda policy: None,
    where: str = "",
) -> list[Benchmark]:
    """One benchmark of all prompts where right and wrong can be told; else one per task, for rewards have own units.

    Raises InputError for a prompt that nothing scores.
    """
    kinds: dict[tuple[Task, Metric], list[Prompt]] = {}
    for prompt in prompts:
        metric = scorer.metric(prompt)
        if metric is None:
            answer = "" if "image" in prompt.output else "give it an 'answer', "
            raise InputError(
                f"{where or name}: row {prompt.id!r} of task '{prompt.task}' cannot be scored: {answer}name rewards "
                "that score it (lvrpo evaluate --rewards CONFIG), or leave it out"
            )
        kinds.setdefault((prompt.task, metric), []).append(prompt)
    if all(metric == "success" for _, metric in kinds):
        return [Benchmark(name, lambda n: prompts[:n], n=len(prompts), check=check)]
    doubled = len({task for task, _ in kinds}) < len(kinds)
    found = []
    for (task, metric), rows in kinds.items():
        title = name if len(kinds) == 1 else f"{name}/{task}{f'/{metric}' if doubled else ''}"
        found.append(Benchmark(title, lambda n, rows=rows: rows[:n], n=len(rows), metric=metric, check=check))
    return found


def evaluate(
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    sampling: Sampling = SAMPLING,
    keep: Callable[[str, Sequence[Group]], Sequence[Group]] = lambda name, groups: (),
    progress: Callable[[str, int], None] = lambda name, prompts: None,
    scorer: HeldOutScorer = SUCCESS_ONLY,
    judge: Policy | None = None,
) -> Evaluation:
    """Scores ``policy``; prompts, seeds and noise are the same for every policy, so that differences are paired.

    ``sizes`` overrides how many prompts a benchmark takes; ``keep`` chooses the outputs to hold on to; ``judge``: the
    frozen policy with which the rewards of ``scorer`` score what cannot be told right from wrong.
    """
    for benchmark in benchmarks:
        benchmark.check(policy)
    started = time.perf_counter()
    scored: dict[str, Scored] = {}
    kept: dict[str, Sequence[Group]] = {}
    for benchmark in benchmarks:
        prompts = benchmark.prompts((sizes or {}).get(benchmark.name, benchmark.n))
        progress(benchmark.name, len(prompts))
        how = benchmark.sampling(sampling)
        result = score_prompts(policy, prompts, how, seed, benchmark.samples, scorer, judge)
        if not any(map(math.isfinite, result.scores)):
            raise ContractError(f"{benchmark.name}: no output could be scored: see that the rewards work on these rows")
        scored[benchmark.name] = Scored(
            tuple(p.id for p in prompts),
            tuple(p.category for p in prompts),
            tuple(cluster_of(p) for p in prompts),
            result.scores,
            benchmark.metric,
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


def _by_category(
    scored: Scored, counted: Sequence[int], interval: Callable[[Sequence[int]], Interval]
) -> dict[str, Any]:
    rows: dict[str, list[int]] = {}
    for i in counted:
        rows.setdefault(scored.categories[i], []).append(i)
    whole = interval(counted).as_dict()
    return {**whole, "categories": {name: interval(chosen).as_dict() for name, chosen in rows.items() if name}}
