"""Scores of a policy on benchmarks, with intervals, in the shape of ``summary.json``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lvrpo.data.base import LazyPrompts
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.distributed import on_main, rank, relay_errors, split_between_ranks, world_size
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import BENCHMARKS, PUBLISHED
from lvrpo.evaluation.benchmarks.published import NO_INPUTS, BenchmarkInputs, PublishedBenchmark
from lvrpo.evaluation.items import (
    Item,
    ItemFolder,
    ItemStore,
    cluster_of,
    prompt_digest,
    prompts_digest,
    questions,
    without_images,
)
from lvrpo.evaluation.results import benchmark_difference, benchmark_result
from lvrpo.evaluation.scoring import CHUNK, judge_scores, read_back, sample_prompts
from lvrpo.policies.base import Policy, Sampling, abilities, can_draw, check_text
from lvrpo.records import BenchmarkRecord, MeanOver
from lvrpo.registry import resolve
from lvrpo.rewards.base import SIDES, Reward, judge_fingerprint
from lvrpo.rewards.success import SUCCESS_ONLY, HeldOutScorer, Metric
from lvrpo.types import TASKS, Group, Prompt, TaskKind

if TYPE_CHECKING:
    from lvrpo.evaluation.tuning import TunedSampling

SAMPLING = Sampling(group_size=1, temperature=0.0, max_new_tokens=8, num_steps=8)
"""Defaults of every benchmark, which sets its own temperature and guidance."""
STORED_CHUNK = 16
"""Outputs per sampling call of an evaluation that is kept in a folder: what an interruption loses."""


@dataclass(frozen=True)
class Benchmark:
    """Prompts and the sampling parameters to evaluate them with."""

    name: str
    prompts: Callable[[int], Sequence[Prompt]]
    """n to the first n prompts."""
    n: int
    """Default number of prompts."""
    temperature: float = 0.0
    guidance_scale: float = 1.0
    samples: int = 1
    """Outputs per prompt; a prompt's score is their mean."""
    pass_at_k_samples: int = 0
    """Outputs of each of the first ``EvaluationOptions.sampled_prompts``, for pass@k and best of n; 0: ``samples``."""
    validation: Callable[[int], Sequence[Prompt]] | None = None
    """Prompts of the validation split, for tuning temperature and guidance; None: there are none."""
    tunable: bool = False
    """Whether its own prompts may be used for tuning: rows of a file that the user names."""
    own_rule: bool = False
    """Whether the run's own rule of success scores it: rows of a file, and prompts of the run's task."""
    fixed_sampling: bool = False
    """Whether tuned temperature and guidance leave its own in place."""
    metric: Metric = "success"
    """The kind of score."""
    reward: Reward | None = None
    """Scores the outputs, from 0 to 1, in place of the prompts' own answers; of metric "success" 0 or 1 alone."""
    mean_over: MeanOver = "prompts"
    """Whether the score of the whole is the mean over prompts, or over categories of their means."""
    own_sampling: bool = False
    """Whether the model's own defaults hold (guidance, steps, lengths), in place of this and the suite's."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ``Sampling`` that differ from the model's defaults. Any: their values."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Details for the record: the version of the data and the scorer."""
    check: Callable[[Policy], object] = lambda policy: None
    """Raises InputError where a policy cannot read the prompts."""

    def sampling(self, base: Sampling, task: TaskKind | None = None, tuned: TunedSampling | None = None) -> Sampling:
        """``base`` with the benchmark's temperature and guidance, or those tuned for the task.

        With ``own_sampling``, ``base`` is the model's defaults, and only ``changes`` are made.
        """
        if self.own_sampling:
            own = replace(base, **self.changes)
            return own if tuned is None or task is None else tuned.apply(own, task)
        own = replace(base, temperature=self.temperature, guidance_scale=self.guidance_scale)
        return own if tuned is None or task is None or self.fixed_sampling else tuned.apply(own, task)


@dataclass(frozen=True)
class EvaluationOptions:
    """Samples for pass@k and best of n, tuned sampling parameters, and who judges."""

    sampled_prompts: int = 280
    """The first n prompts of a benchmark that are sampled ``num_samples`` times; 0: none."""
    num_samples: int | None = None
    """Samples of each; None: the benchmark's ``pass_at_k_samples``."""
    judge: Policy | None = None
    """Frozen policy that selects the best of n; None: the evaluated policy."""
    tuned: TunedSampling | None = None
    """Temperature and guidance tuned on validation prompts; None: the benchmark's own."""
    scorer: HeldOutScorer = SUCCESS_ONLY
    """Scores the outputs."""
    reward_judge: Policy | None = None
    """Frozen policy that judges for the rewards of ``scorer``, for prompts without a verifiable answer."""
    store: ItemStore | None = None
    """Storage of outputs and scores, so that an interrupted evaluation can be resumed."""

    def scorer_of(self, benchmark: Benchmark) -> HeldOutScorer:
        """The scorer of a benchmark: without the run's rule, unless it is of the run's prompts."""
        return self.scorer if benchmark.own_rule else replace(self.scorer, success=None)


@dataclass(frozen=True)
class Evaluation:
    """The records of a policy on several benchmarks."""

    scored: Mapping[str, BenchmarkRecord]
    groups: Mapping[str, Sequence[Group]] = field(default_factory=dict)
    """Sampled outputs kept for the report."""
    seconds: float = 0.0

    def results(self) -> dict[str, Any]:
        """Per benchmark: score, low, high, n, categories."""
        return {name: benchmark_result(record).as_dict() for name, record in self.scored.items()}

    def difference(self, after: Evaluation) -> dict[str, Any]:
        """For every benchmark that both have: ``after`` minus this, with intervals."""
        return {
            name: benchmark_difference(record, after.scored[name]).as_dict()
            for name, record in self.scored.items()
            if name in after.scored
        }

    def as_dict(self) -> dict[str, Any]:
        """As JSON: results, and the scores of single prompts."""
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
    inputs: BenchmarkInputs = NO_INPUTS,
) -> list[Benchmark]:
    """Benchmarks by name; ``scenes`` is all of the built-in world, a name that ends in .jsonl is a file of rows.

    For files: ``scorer`` scores rows without a verifiable answer, ``side`` is the side of the model's input images in
    pixels, ``root`` another folder of images. ``inputs``: data and judges of the published benchmarks.
    """
    found: list[Benchmark] = []
    for name in names:
        if name == "scenes":
            found += [resolve("benchmark", each, BENCHMARKS) for each in BENCHMARKS]
        elif name.endswith(".jsonl"):
            found += _file_benchmarks(Path(name), scorer, side, root)
        else:
            benchmark = resolve("benchmark", name, {**BENCHMARKS, **PUBLISHED, "scenes": ""})
            if isinstance(benchmark, PublishedBenchmark):
                found += benchmark.open(inputs)
                continue
            if not isinstance(benchmark, Benchmark):
                raise InputError(f"benchmark {name!r}: is a {type(benchmark).__name__}: name a Benchmark")
            found.append(benchmark)
    doubled = [b.name for i, b in enumerate(found) if b.name in [other.name for other in found[:i]]]
    if doubled:
        raise InputError(f"benchmark {doubled[0]!r}: named twice: name each once")
    return found


def with_guidance_scales(
    benchmarks: Sequence[Benchmark], scales: Sequence[float], num_steps: int | None
) -> list[Benchmark]:
    """Benchmarks with ``own_sampling`` once per guidance scale, ``geneval@4``; without scales, at the model's own."""
    found: list[Benchmark] = []
    for benchmark in benchmarks:
        if not benchmark.own_sampling:
            found.append(benchmark)
            continue
        changes = dict(benchmark.changes) | ({} if num_steps is None else {"num_steps": num_steps})
        found += [replace(benchmark, changes=changes)] if not scales else []
        found += [
            replace(benchmark, name=f"{benchmark.name}@{scale:g}", changes={**changes, "guidance_scale": scale})
            for scale in scales
        ]
    return found


def _file_benchmarks(
    path: Path, scorer: HeldOutScorer = SUCCESS_ONLY, side: int | None = None, root: Path | None = None
) -> list[Benchmark]:
    """``prompt_benchmarks`` of the rows of a JSONL file, sampled greedily."""
    source = JsonlPrompts(JsonlConfig(test=path, root=root), "test", 0, side)

    def check(policy: Policy) -> None:
        source.require_readable(partial(check_text, policy))

    return prompt_benchmarks(path.stem, source.in_order(), scorer, check, str(path))


def prompt_benchmarks(
    name: str,
    prompts: Sequence[Prompt],
    scorer: HeldOutScorer,
    check: Callable[[Policy], object] = lambda policy: None,
    where: str = "",
) -> list[Benchmark]:
    """One benchmark of all prompts where each has a verifiable answer; else one per task, as rewards differ in units.

    They are sampled with the model's own defaults unless ``with_sampling`` says otherwise.
    Raises InputError for a prompt that nothing scores.
    """
    kinds: dict[tuple[TaskKind, Metric], list[int]] = {}
    for place, prompt in enumerate(prompts):
        metric = scorer.metric(prompt)
        if metric is None:
            answer = "" if "image" in prompt.output else "give it an 'answer', "
            raise InputError(
                f"{where or name}: row {prompt.id!r} of task '{prompt.task}' cannot be scored: {answer}name rewards "
                "that score it (lvrpo evaluate --rewards CONFIG), or leave it out"
            )
        kinds.setdefault((prompt.task, metric), []).append(place)
    if all(metric == "success" for _, metric in kinds):
        whole = Benchmark(name, lambda n: prompts[:n], len(prompts), tunable=True, own_rule=True, check=check)
        return [replace(whole, own_sampling=True)]
    doubled = len({task for task, _ in kinds}) < len(kinds)
    found = []
    for (task, metric), places in kinds.items():
        rows = LazyPrompts(prompts.__getitem__, places)
        title = name if len(kinds) == 1 else f"{name}/{task}{f'/{metric}' if doubled else ''}"
        own = Benchmark(title, lambda n, rows=rows: rows[:n], n=len(rows), tunable=True, own_rule=True, check=check)
        found.append(replace(own, metric=metric, own_sampling=True))
    return found


def with_sampling(benchmarks: Sequence[Benchmark], sampling: Sampling) -> list[Benchmark]:
    """The benchmarks with these settings for rows of the user in place of the model's own defaults."""
    return [replace(b, changes=vars(sampling)) if b.tunable else b for b in benchmarks]


def evaluate(
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    sampling: Sampling = SAMPLING,
    keep: Callable[[str, Sequence[Prompt]], Collection[int]] | None = None,
    progress: Callable[[str, int], None] = lambda name, prompts: None,
    options: EvaluationOptions = EvaluationOptions(sampled_prompts=0),
) -> Evaluation:
    """Scores ``policy``; prompts, seeds and noise are the same for every policy, so that differences are paired.

    ``sizes`` overrides the number of prompts of a benchmark; ``keep`` selects, by place, the prompts whose outputs are
    returned, with their images, which are dropped of all others. The first sample of a prompt does not depend on how
    many are drawn. Raises InputError where ``options.tuned`` was tuned on one of the prompts, and for a benchmark of a
    task that the policy cannot do. A policy that draws nothing, or not after a text, is not asked those prompts of a
    reasoning benchmark that end in an image.
    """
    for benchmark in benchmarks:
        benchmark.check(policy)
    started = time.perf_counter()
    scored: dict[str, BenchmarkRecord] = {}
    kept: dict[str, Sequence[Group]] = {}
    prompts_of = {b.name: _possible(policy, b.name, b.prompts((sizes or {}).get(b.name, b.n))) for b in benchmarks}
    if options.tuned is not None:
        for name, prompts in prompts_of.items():
            options.tuned.require_unseen(name, prompts)
    for benchmark in benchmarks:
        prompts = prompts_of[benchmark.name]
        plain = [without_images(prompt) for prompt in prompts]
        progress(benchmark.name, len(plain))
        shown = () if keep is None else keep(benchmark.name, plain)
        items, settings = _benchmark_items(policy, benchmark, (prompts, plain), seed, sampling, options, shown)
        scored[benchmark.name] = _benchmark_record(policy, benchmark, items, settings, options)
        kept[benchmark.name] = [items[i].group for i in shown]
    return Evaluation(scored, kept, time.perf_counter() - started)


def _possible(policy: Policy, name: str, prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """The prompts of a benchmark that a policy is asked; raises InputError for a task that it cannot do."""
    tasks = getattr(policy, "tasks", TASKS)  # optional in anybody's class
    draws, after_text = can_draw(tasks), getattr(policy, "draws_after_text", True)  # optional too
    places = []
    for place, prompt in enumerate(prompts):
        left_out = prompt.output == ("text", "image") and not after_text if draws else "image" in prompt.output
        if left_out and (draws or prompt.task in tasks):
            continue
        if prompt.task not in tasks:
            raise InputError(f"benchmark {name}: task {prompt.task!r}: this model {abilities(tasks)}: leave it out")
        places.append(place)
    return LazyPrompts(prompts.__getitem__, places)


def _benchmark_items(
    policy: Policy,
    benchmark: Benchmark,
    asked: tuple[Sequence[Prompt], list[Prompt]],
    seed: int,
    sampling: Sampling,
    options: EvaluationOptions,
    shown: Collection[int],
) -> tuple[list[Item], dict[TaskKind, Sampling]]:
    """The outputs of every prompt with their scores, and how each task was sampled.

    ``asked``: the prompts, and the same without their images, which are read batch by batch.

    With ``options.store`` items that it holds are not sampled again, and the others are added to it batch by batch;
    batches are the same whatever it holds and however many processes share them, so that a resumed or a divided
    evaluation gives the same scores. Several processes divide what is missing; each writes a file of its own.
    """
    prompts, plain = asked
    tasks: tuple[TaskKind, ...] = tuple(dict.fromkeys(prompt.task for prompt in plain))
    base = {task: default_sampling(policy, task) if benchmark.own_sampling else sampling for task in tasks}
    settings: dict[TaskKind, Sampling] = {task: benchmark.sampling(base[task], task, options.tuned) for task in tasks}
    counts = sample_counts(benchmark, plain, settings, options)
    store, own = options.store, identity(policy, benchmark, seed, settings, options)
    folder = None if store is None else _open_folder(store, benchmark.name, own)
    divided = folder is not None and world_size() > 1
    at_once = CHUNK if folder is None else STORED_CHUNK
    # a few prompts at a time: all samples of large images do not fit into memory
    jobs: dict[tuple[TaskKind, int], list[int]] = {}
    for i, prompt in enumerate(plain):
        jobs.setdefault((prompt.task, counts[i]), []).append(i)
    found: dict[int, Item] = {}
    batches: list[tuple[TaskKind, int, list[int]]] = []
    for (task, count), places in jobs.items():
        size = max(1, at_once // count)
        for batch in (places[start : start + size] for start in range(0, len(places), size)):
            known = [] if folder is None or shown else [folder.read(prompts[i], count) for i in batch]
            if known and None not in known:
                found |= {i: item.without_images() for i, item in zip(batch, known, strict=True) if item is not None}
            else:
                batches.append((task, count, batch))
    with relay_errors() if divided else nullcontext():
        for task, count, batch in split_between_ranks(batches) if divided else batches:
            rows = [prompts[i] for i in batch]
            items = _scored_items(policy, benchmark, rows, settings[task], seed, count, options)
            if folder is not None:
                folder.write(items)
            items = [each if i in shown else each.without_images() for i, each in zip(batch, items, strict=True)]
            found |= zip(batch, items, strict=True)
    if store is not None and divided:
        folder = _open_folder(store, benchmark.name, own)
        read = {i: folder.read(prompt, counts[i], failed=True) for i, prompt in enumerate(prompts)}
        found = {i: item if i in shown else item.without_images() for i, item in read.items() if item is not None}
    return [found[i] for i in range(len(prompts))], settings


def _open_folder(store: ItemStore, name: str, settings: Mapping[str, Any]) -> ItemFolder:
    """The folder of a benchmark, opened by rank 0; of several processes each writes a part. Any: JSON values."""
    if world_size() == 1:
        return store.open(name, settings)
    on_main(lambda: bool(store.open(name, settings)))
    return ItemFolder(store.folder_of(name), rank())


def identity(
    policy: Policy, benchmark: Benchmark, seed: int, settings: Mapping[TaskKind, Sampling], options: EvaluationOptions
) -> dict[str, Any]:
    """Everything that the items of a benchmark depend on, apart from their prompts. Any: JSON values."""
    is_rewarded = benchmark.metric == "reward" and benchmark.reward is None
    return {
        "policy": judge_fingerprint(policy),
        "judge": judge_fingerprint(options.judge or policy),
        "rewards": [r.config.model_dump(mode="json") for r in options.scorer.rewards if is_rewarded],
        "reward_judge": judge_fingerprint(options.reward_judge) if is_rewarded and options.reward_judge else None,
        "read_back": _reads_back(policy, benchmark, options),
        "success": options.scorer_of(benchmark).rule,
        "seed": seed,
        "samples": benchmark.samples,
        "sampling": {task: {k: str(v) for k, v in vars(each).items()} for task, each in settings.items()},
        **benchmark.details,
    }


def default_sampling(policy: Policy, task: TaskKind) -> Sampling:
    """The model's own defaults, for one output of each prompt and greedy text."""
    return replace(policy.default_sampling(task), group_size=1, temperature=0.0)


def _scored_items(
    policy: Policy,
    benchmark: Benchmark,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    count: int,
    options: EvaluationOptions,
) -> list[Item]:
    """Samples and scores ``count`` outputs of each prompt."""
    judge, reward = options.judge or policy, benchmark.reward
    groups = sample_prompts(policy, prompts, sampling, seed, count)
    reasons: Mapping[int, str]
    if reward is None:
        rows, reasons = options.scorer_of(benchmark).scores(groups, options.reward_judge)
    else:
        scores = reward.score(groups, judge)
        rows = [
            [math.nan if (p, g) in scores.failures else value for g, value in enumerate(row)]
            for p, row in enumerate(scores.values.tolist())
        ]
        reasons = {p: why for (p, _), why in reversed([*scores.failures.items()])}
    judged = judge_scores(groups, judge) if _reads(judge) and count > benchmark.samples else [()] * len(groups)
    backs = read_back(groups, policy) if _reads_back(policy, benchmark, options) else [None] * len(groups)
    return [
        Item(
            Group(group.prompt, group.trajectories[: benchmark.samples]),
            tuple(rows[p]),
            judged[p],
            backs[p],
            reasons.get(p) or ("" if all(map(math.isfinite, rows[p])) else "no score"),
            cluster_of(group.prompt),
            prompt_digest(group.prompt),
        )
        for p, group in enumerate(groups)
    ]


def _reads(policy: Policy) -> bool:
    return "read" in getattr(policy, "judging_sides", SIDES)  # optional in anybody's class


def _reads_back(policy: Policy, benchmark: Benchmark, options: EvaluationOptions) -> bool:
    """Whether the policy reads its own images."""
    return options.sampled_prompts > 0 and benchmark.metric == "success" and benchmark.reward is None and _reads(policy)


def _benchmark_record(
    policy: Policy,
    benchmark: Benchmark,
    items: Sequence[Item],
    settings: Mapping[TaskKind, Sampling],
    options: EvaluationOptions,
) -> BenchmarkRecord:
    """The record of the items of a benchmark; raises ContractError where none has a score."""
    succeeds = benchmark.metric == "success"
    groups = [item.group for item in items]
    prompts = [group.prompt for group in groups]
    means = tuple(sum(item.scores[: benchmark.samples]) / benchmark.samples for item in items)
    failures = tuple(item.failure for item in items)
    if not any(map(math.isfinite, means)):
        why = next(filter(None, failures), "there are no prompts")
        raise ContractError(f"{benchmark.name}: no output could be scored: {why}: see that its scorer works")
    judged = tuple(item.judged for item in items)
    backs = tuple(item.read_back for item in items)
    return BenchmarkRecord(
        tuple(p.id for p in prompts),
        tuple(p.category for p in prompts),
        tuple(item.cluster for item in items),
        means,
        benchmark.samples,
        tuple(item.scores for item in items) if succeeds else (),
        judged if any(judged) else (),
        backs if any(back is not None for back in backs) else (),
        **questions(groups),
        held_out=tuple(p.held_out for p in prompts) if any(p.held_out for p in prompts) else (),
        settings={
            "prompts": prompts_digest(item.digest for item in items),
            "tasks": {
                t: {"temperature": s.temperature, "guidance_scale": s.guidance_scale} for t, s in settings.items()
            },
            "judge": judge_fingerprint(options.judge or policy) if any(judged) else None,
            **benchmark.details,
        },
        metric=benchmark.metric,
        mean_over=benchmark.mean_over,
        failures=failures if any(failures) else (),
    )


def sample_counts(
    benchmark: Benchmark, prompts: Sequence[Prompt], settings: Mapping[TaskKind, Sampling], options: EvaluationOptions
) -> list[int]:
    """Samples per prompt: more for the first ``options.sampled_prompts`` whose sampling is random."""
    many = benchmark.pass_at_k_samples if options.num_samples is None else options.num_samples
    remaining, counts = options.sampled_prompts, []
    for prompt in prompts:
        is_random = "image" in prompt.output or settings[prompt.task].temperature > 0
        is_resampled = is_random and remaining > 0 and many > benchmark.samples and benchmark.metric == "success"
        counts.append(many if is_resampled else benchmark.samples)
        remaining -= is_resampled
    return counts
