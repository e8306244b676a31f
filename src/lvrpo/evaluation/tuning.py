"""Choosing guidance and temperature of a model on the validation split, by a grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lvrpo.errors import InputError
from lvrpo.evaluation.benchmark import score_prompts
from lvrpo.evaluation.suite import SAMPLING, Benchmark
from lvrpo.evaluation.tuned import GUIDANCE_SCALES, TEMPERATURES, Tuned, content_key
from lvrpo.policies.base import Policy, Sampling
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.types import Prompt, Task

TEXT_SAMPLES = 4
"""Answers per question at a temperature above 0: one alone would say little of it."""


def tune(
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    n: int | None = None,
    seed: int = 0,
    sampling: Sampling = SAMPLING,
    progress: Callable[[Task, str, float, float], None] = lambda task, name, value, score: None,
) -> Tuned:
    """For every task the value with the highest mean success on the benchmarks' validation prompts; of equal ones the
    first, so that nothing is guided or sampled without a gain.

    Drawing tasks choose a guidance scale of ``GUIDANCE_SCALES``, those that write a temperature of ``TEMPERATURES``.
    ``n``: prompts per task (default: as many as the benchmark has test prompts). Benchmarks that are ``fixed`` choose
    nothing. Raises InputError where no benchmark has validation prompts.
    """
    prompts: dict[Task, list[Prompt]] = {}
    for benchmark in benchmarks:
        if benchmark.validation is None or benchmark.fixed:
            continue
        benchmark.check(policy)
        for prompt in benchmark.validation(n or benchmark.n):
            prompts.setdefault(prompt.task, []).append(prompt)
    if not prompts:
        names = ", ".join(benchmark.name for benchmark in benchmarks)
        raise InputError(f"{names}: no validation prompts to choose on: name another benchmark, or a file of rows")
    settings: dict[Task, dict[str, float]] = {}
    grid: dict[Task, dict[str, float]] = {}
    for task, rows in prompts.items():
        draws = all(prompt.output == ("image",) for prompt in rows)
        name = "guidance_scale" if draws else "temperature"
        found: dict[float, float] = {}
        for value in GUIDANCE_SCALES if draws else TEMPERATURES:
            tried = replace(sampling, **{"temperature": 0.0, "guidance_scale": 1.0, name: value})
            samples = 1 if draws or value == 0 else TEXT_SAMPLES
            found[value] = score_prompts(policy, rows, tried, seed, samples).mean
            progress(task, name, value, found[value])
        settings[task] = {name: max(found, key=lambda value: found[value])}
        grid[task] = {f"{value:g}": score for value, score in found.items()}
    keys = frozenset(content_key(prompt) for rows in prompts.values() for prompt in rows)
    return Tuned(judge_fingerprint(policy), settings, keys, grid)


def as_validation(benchmark: Benchmark) -> Benchmark:
    """A file of the user's rows as the prompts to choose on; a benchmark with a validation split as it is."""
    rows = benchmark.validation is None and benchmark.chosen_on
    return replace(benchmark, validation=benchmark.prompts) if rows else benchmark


__all__ = ["as_validation", "tune"]
