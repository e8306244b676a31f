"""Grid search for a model's guidance and temperature on the validation split."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation.scoring import sample_prompts
from lvrpo.evaluation.suite import SAMPLING, Benchmark, default_sampling
from lvrpo.policies.base import Policy, Sampling
from lvrpo.reading import read_json_object
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.success import SUCCESS_ONLY
from lvrpo.types import Group, Prompt, TaskKind

GUIDANCE_SCALES = (1.0, 1.25, 1.5, 2.0, 3.0)
TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 1.0)
"""Temperatures for text; 0 is greedy."""
SETTINGS = ("guidance_scale", "temperature")


@dataclass(frozen=True)
class TunedSampling:
    """The tuned sampling parameters of a model, and the prompts that they were tuned on."""

    model: str
    """``judge_fingerprint`` of the model."""
    settings: Mapping[TaskKind, Mapping[str, float]]
    """The selected ``guidance_scale`` or ``temperature``, per task."""
    prompts: frozenset[str]
    """``content_key`` of every tuning prompt."""
    grid: Mapping[TaskKind, Mapping[str, float]] = field(default_factory=dict)
    """The score at each value of the grid, per task."""

    def apply(self, sampling: Sampling, task: TaskKind) -> Sampling:
        """``sampling`` with the tuned parameters of the task; unchanged where the task was not tuned."""
        return replace(sampling, **self.settings.get(task, {}))

    def require_unseen(self, benchmark: str, prompts: Sequence[Prompt]) -> None:
        """Raises InputError where a prompt of the benchmark is a tuning prompt."""
        seen = [prompt for prompt in prompts if content_key(prompt) in self.prompts]
        if seen:
            raise InputError(
                f"benchmark {benchmark}: {len(seen)} of {len(prompts)} prompts, {seen[0].id!r} first, are those that "
                "its guidance or temperature was chosen on: choose on another split"
            )

    def require_model(self, model: str) -> None:
        """Raises InputError for a model other than the tuned one."""
        if model != self.model:
            raise InputError(f"settings chosen for {self.model}, but this is {model}: tune each model for itself")

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "prompts": sorted(self.prompts)}

    @classmethod
    def read(cls, path: Path) -> TunedSampling:
        """Reads the file of ``lvrpo evaluate MODEL --tune FILE``; raises InputError for anything else."""
        remedy = "give a file that lvrpo evaluate --tune wrote"
        raw = read_json_object(path, remedy)
        try:
            settings = {task: dict(values) for task, values in raw["settings"].items()}
            wrong = [task for task in settings if task not in get_args(TaskKind)]
            wrong += [name for values in settings.values() for name in values if name not in SETTINGS]
            numbers = [value for values in settings.values() for value in values.values()]
            if wrong or not all(isinstance(value, int | float) and value >= 0 for value in numbers):
                raise ValueError
            return cls(str(raw["model"]), settings, frozenset(raw["prompts"]), raw.get("grid", {}))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(f"{path}: holds no settings of a model: {remedy}") from None


def content_key(prompt: Prompt) -> str:
    """Hash of the task, texts and images of a prompt, whatever its id."""
    digest = hashlib.blake2b(prompt.task.encode(), digest_size=8)
    for part in prompt.parts:
        if isinstance(part, str):
            digest.update(b"text" + " ".join(part.lower().split()).encode())
        else:
            digest.update(b"picture" + part.numpy().tobytes())
    return digest.hexdigest()


TEXT_SAMPLES = 4
"""Answers per question at a temperature above 0."""


def tune(
    policy: Policy,
    benchmarks: Sequence[Benchmark],
    n: int | None = None,
    seed: int = 0,
    sampling: Sampling = SAMPLING,
    progress: Callable[[TaskKind, str, float, float], None] = lambda task, name, value, score: None,
) -> TunedSampling:
    """Selects per task the value with the highest mean success on validation prompts; the first of ties.

    Image tasks tune the guidance scale (``GUIDANCE_SCALES``), text tasks the temperature (``TEMPERATURES``). ``n``:
    prompts per task (default: the number of test prompts); ``sampling``: the rest, except for benchmarks with
    ``own_sampling``. Benchmarks with ``fixed_sampling`` are left out. Raises
    InputError where no benchmark has validation prompts.
    """
    prompts: dict[TaskKind, list[Prompt]] = {}
    base: dict[TaskKind, Sampling] = {}
    for benchmark in benchmarks:
        if benchmark.validation is None or benchmark.fixed_sampling:
            continue
        benchmark.check(policy)
        for prompt in benchmark.validation(n or benchmark.n):
            task = prompt.task
            prompts.setdefault(task, []).append(prompt)
            if task not in base:
                own = benchmark.own_sampling
                base[task] = benchmark.sampling(default_sampling(policy, task)) if own else sampling
    if not prompts:
        names = ", ".join(benchmark.name for benchmark in benchmarks)
        raise InputError(f"{names}: no validation prompts to choose on: name another benchmark, or a file of rows")
    settings: dict[TaskKind, dict[str, float]] = {}
    grid: dict[TaskKind, dict[str, float]] = {}
    for task, rows in prompts.items():
        draws = all(prompt.output == ("image",) for prompt in rows)
        name = "guidance_scale" if draws else "temperature"
        found: dict[float, float] = {}
        for value in GUIDANCE_SCALES if draws else TEMPERATURES:
            candidate = replace(base[task], **{"temperature": 0.0, "guidance_scale": 1.0, name: value})
            samples = 1 if draws or value == 0 else TEXT_SAMPLES
            found[value] = mean_success(sample_prompts(policy, rows, candidate, seed, samples))
            progress(task, name, value, found[value])
        settings[task] = {name: max(found, key=lambda value: found[value])}
        grid[task] = {f"{value:g}": score for value, score in found.items()}
    keys = frozenset(content_key(prompt) for rows in prompts.values() for prompt in rows)
    return TunedSampling(judge_fingerprint(policy), settings, keys, grid)


def mean_success(groups: Sequence[Group]) -> float:
    """Of the prompts with a score; raises ContractError where there is none."""
    rows, reasons = SUCCESS_ONLY.scores(groups, None)
    known = [mean for row in rows if math.isfinite(mean := sum(row) / len(row))]
    if not known:
        raise ContractError(f"no output could be scored: {next(iter(reasons.values()), 'no score')}: correct it")
    return sum(known) / len(known)


def as_validation(benchmark: Benchmark) -> Benchmark:
    """The benchmark with its own prompts as validation prompts, where it is ``tunable`` and has no validation split."""
    rows = benchmark.validation is None and benchmark.tunable
    return replace(benchmark, validation=benchmark.prompts) if rows else benchmark
