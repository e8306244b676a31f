"""Scores of a policy on benchmarks, with intervals, in the shape of ``summary.json``."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import BENCHMARKS
from lvrpo.evaluation.results import benchmark_difference, benchmark_result
from lvrpo.evaluation.scoring import CHUNK, judge_scores, read_back, score_prompts
from lvrpo.metrics import ReadBack
from lvrpo.policies.base import Policy, Sampling, check_text
from lvrpo.records import BenchmarkRecord
from lvrpo.registry import resolve
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.success import SUCCESS_ONLY, HeldOutScorer, Metric
from lvrpo.rewards.verifiable_text import normalize_answer
from lvrpo.types import TASKS, Group, Prompt, Task

if TYPE_CHECKING:
    from lvrpo.evaluation.tuning import Tuned

SAMPLING = Sampling(group_size=1, temperature=0.0, max_new_tokens=8, num_steps=8)
"""What every benchmark starts from; temperature and guidance are the benchmark's own."""
ANSWER_LENGTH = 80
"""Letters of an answer that are kept in a record."""


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
    many: int = 0
    """Outputs of each of the first ``Measuring.prompts``, for pass@k and best-of-n; 0: no more than ``samples``."""
    validation: Callable[[int], Sequence[Prompt]] | None = None
    """Prompts of the validation split, which temperature and guidance are chosen on; None: there are none."""
    chosen_on: bool = False
    """Whether its own prompts may be those to choose on: rows of the user, who names the file."""
    fixed: bool = False
    """Whether its temperature and guidance are its point, so that no chosen ones replace them."""
    metric: Metric = "success"
    """What the scores are."""
    check: Callable[[Policy], object] = lambda policy: None
    """Raises InputError where a policy cannot read the prompts."""

    def sampling(self, base: Sampling, task: Task | None = None, tuned: Tuned | None = None) -> Sampling:
        """``base`` with the benchmark's temperature and guidance, or those chosen for the task."""
        own = replace(base, temperature=self.temperature, guidance_scale=self.guidance_scale)
        return own if tuned is None or task is None or self.fixed else tuned.applied(own, task)


@dataclass(frozen=True)
class Measuring:
    """What is measured beside one score per prompt."""

    prompts: int = 280
    """So many prompts of a benchmark, the first, are sampled ``many`` times; 0: none."""
    many: int | None = None
    """Samples of each; None: what the benchmark says."""
    judge: Policy | None = None
    """Whose frozen reading side chooses the best of n; None: the evaluated policy's own."""
    tuned: Tuned | None = None
    """Temperature and guidance chosen on other prompts; None: the benchmark's own."""
    scorer: HeldOutScorer = SUCCESS_ONLY
    """Scores the outputs."""
    reward_judge: Policy | None = None
    """The frozen policy with which the rewards of ``scorer`` score what cannot be told right from wrong."""


@dataclass(frozen=True)
class Evaluation:
    """A policy on several benchmarks."""

    scored: Mapping[str, BenchmarkRecord]
    groups: Mapping[str, Sequence[Group]] = field(default_factory=dict)
    """Sampled outputs that are kept to be shown."""
    seconds: float = 0.0

    def results(self) -> dict[str, Any]:
        """By benchmark: score, low, high, n, categories."""
        return {name: benchmark_result(record).as_dict() for name, record in self.scored.items()}

    def difference(self, after: Evaluation) -> dict[str, Any]:
        """By benchmark that both have: ``after`` minus this, with intervals."""
        return {
            name: benchmark_difference(record, after.scored[name]).as_dict()
            for name, record in self.scored.items()
            if name in after.scored
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON: results for readers, and the scores that they come from."""
        return {
            "results": self.results(),
            "seconds": self.seconds,
            "scores": {name: record.as_dict() for name, record in self.scored.items()},
        }


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
        return [Benchmark(name, lambda n: prompts[:n], n=len(prompts), chosen_on=True, check=check)]
    doubled = len({task for task, _ in kinds}) < len(kinds)
    found = []
    for (task, metric), rows in kinds.items():
        title = name if len(kinds) == 1 else f"{name}/{task}{f'/{metric}' if doubled else ''}"
        found.append(
            Benchmark(title, lambda n, rows=rows: rows[:n], n=len(rows), chosen_on=True, metric=metric, check=check)
        )
    return found


def evaluate(
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    sampling: Sampling = SAMPLING,
    keep: Callable[[str, Sequence[Group]], Sequence[Group]] = lambda name, groups: (),
    progress: Callable[[str, int], None] = lambda name, prompts: None,
    measuring: Measuring = Measuring(prompts=0),
) -> Evaluation:
    """Scores ``policy``; prompts, seeds and noise are the same for every policy, so that differences are paired.

    ``sizes`` overrides how many prompts a benchmark takes; ``keep`` chooses the outputs to hold on to. The first sample
    of a prompt is the same however many there are. Raises InputError for a benchmark that ``measuring.tuned`` was
    chosen on, and for one of a task that the policy cannot do.
    """
    for benchmark in benchmarks:
        benchmark.check(policy)
    started = time.perf_counter()
    scored: dict[str, BenchmarkRecord] = {}
    kept: dict[str, Sequence[Group]] = {}
    asked = {b.name: b.prompts((sizes or {}).get(b.name, b.n)) for b in benchmarks}
    tasks = getattr(policy, "tasks", TASKS)  # optional in anybody's class
    for name, prompts in asked.items():
        if wrong := next((prompt.task for prompt in prompts if prompt.task not in tasks), None):
            raise InputError(
                f"benchmark {name}: task {wrong!r}: this model does {', '.join(tasks)} alone: leave it out"
            )
    if measuring.tuned is not None:
        for name, prompts in asked.items():
            measuring.tuned.refuse(name, prompts)
    for benchmark in benchmarks:
        prompts = asked[benchmark.name]
        progress(benchmark.name, len(prompts))
        scored[benchmark.name], groups = record(policy, benchmark, prompts, seed, sampling, measuring)
        kept[benchmark.name] = keep(benchmark.name, groups)
    return Evaluation(scored, kept, time.perf_counter() - started)


def record(
    policy: Policy, benchmark: Benchmark, prompts: Sequence[Prompt], seed: int, sampling: Sampling, measuring: Measuring
) -> tuple[BenchmarkRecord, list[Group]]:
    """The record of one benchmark, and the first ``benchmark.samples`` outputs of every prompt.

    Of rewards it holds the scores alone: what many samples and answers say is of right and wrong.
    """
    succeeds = benchmark.metric == "success"
    tasks: tuple[Task, ...] = tuple(dict.fromkeys(prompt.task for prompt in prompts))
    settings: dict[Task, Sampling] = {task: benchmark.sampling(sampling, task, measuring.tuned) for task in tasks}
    counts = sample_counts(benchmark, prompts, settings, measuring)
    # a few prompts at a time: of large pictures not all samples can be held
    jobs: dict[tuple[Task, int], list[int]] = {}
    for i, prompt in enumerate(prompts):
        jobs.setdefault((prompt.task, counts[i]), []).append(i)
    rows: list[tuple[float, ...]] = [()] * len(prompts)
    judged: list[tuple[float | None, ...]] = [()] * len(prompts)
    backs: list[ReadBack | None] = [None] * len(prompts)
    groups: dict[int, Group] = {}
    for (task, count), places in jobs.items():
        at_once = max(1, CHUNK // count)
        for start in range(0, len(places), at_once):
            part = places[start : start + at_once]
            asked, how = [prompts[i] for i in part], settings[task]
            result = score_prompts(policy, asked, how, seed, count, measuring.scorer, measuring.reward_judge)
            reads = judge_scores(result.groups, measuring.judge or policy) if count > benchmark.samples else None
            back = read_back(result.groups, policy) if measuring.prompts and succeeds else [None] * len(part)
            for place, i in enumerate(part):
                group = result.groups[place]
                groups[i] = Group(group.prompt, group.trajectories[: benchmark.samples])
                rows[i], backs[i] = result.by_sample[place], back[place]
                judged[i] = () if reads is None else reads[place]
    ordered = [groups[i] for i in range(len(prompts))]
    means = tuple(sum(row[: benchmark.samples]) / benchmark.samples for row in rows)
    if not any(map(math.isfinite, means)):
        raise ContractError(f"{benchmark.name}: no output could be scored: see that the rewards work on these rows")
    scored = BenchmarkRecord(
        tuple(p.id for p in prompts),
        tuple(p.category for p in prompts),
        tuple(cluster_of(p) for p in prompts),
        means,
        benchmark.samples,
        tuple(rows) if succeeds else (),
        tuple(judged) if any(judged) else (),
        tuple(backs) if any(back is not None for back in backs) else (),
        **questions(ordered),
        held_out=tuple(p.held_out for p in prompts) if any(p.held_out for p in prompts) else (),
        settings={
            "tasks": {
                t: {"temperature": s.temperature, "guidance_scale": s.guidance_scale} for t, s in settings.items()
            },
            "judge": judge_fingerprint(measuring.judge or policy) if any(judged) else None,
        },
        metric=benchmark.metric,
    )
    return scored, ordered


def sample_counts(
    benchmark: Benchmark, prompts: Sequence[Prompt], settings: Mapping[Task, Sampling], measuring: Measuring
) -> list[int]:
    """How often each prompt is sampled: many times the first ones of which two samples can differ."""
    many = benchmark.many if measuring.many is None else measuring.many
    left, counts = measuring.prompts, []
    for prompt in prompts:
        varies = "image" in prompt.output or settings[prompt.task].temperature > 0
        often = varies and left > 0 and many > benchmark.samples and benchmark.metric == "success"
        counts.append(many if often else benchmark.samples)
        left -= often
    return counts


def questions(groups: Sequence[Group]) -> dict[str, tuple[Any, ...]]:
    """forms, right and answers of a record, for the prompts whose output is a text with a right answer; {} if none."""
    asked = [group.prompt.output == ("text",) and group.prompt.answer is not None for group in groups]
    if not any(asked):
        return {}
    rows = list(zip(groups, asked, strict=True))
    return {
        "forms": tuple(form_of(group.prompt) if text else "" for group, text in rows),
        "right": tuple(normalize_answer(str(group.prompt.answer)) if text else None for group, text in rows),
        "answers": tuple(
            tuple(normalize_answer(t.text or "")[:ANSWER_LENGTH] for t in group.trajectories) if text else ()
            for group, text in rows
        ),
    }


def form_of(prompt: Prompt) -> str:
    """What a question has in common with others: its form, else its category, or its task where it has none."""
    return prompt.form or prompt.category or prompt.task


def cluster_of(prompt: Prompt) -> str:
    """The fingerprint of the prompt's pictures; where it has none, what its text says, or its own id."""
    digest = hashlib.blake2b(digest_size=8)
    pictures = [part for part in prompt.parts if not isinstance(part, str)]
    for picture in pictures:
        digest.update(picture.numpy().tobytes())
    return digest.hexdigest() if pictures else prompt.content or prompt.id
