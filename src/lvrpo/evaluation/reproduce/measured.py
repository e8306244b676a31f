"""What a run of the table is measured by: validation for choices, the test split once, packed into a summary."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lvrpo.atomic_io import write_whole
from lvrpo.errors import InputError
from lvrpo.evaluation.reproduce.plan import Experiment
from lvrpo.evaluation.results import BEST_OF
from lvrpo.evaluation.suite import SAMPLING, Benchmark, Measuring, cluster_of, evaluate, find_benchmarks, form_of
from lvrpo.evaluation.tuned import Tuned, content_key
from lvrpo.evaluation.tuning import tune
from lvrpo.metrics import best_of_n
from lvrpo.policies.base import Policy
from lvrpo.reading import is_there
from lvrpo.records import BenchmarkRecord
from lvrpo.report.evidence import Outcome, PromptSet, prompts_file
from lvrpo.rewards.verifiable_text import normalize_answer
from lvrpo.types import Prompt

PLAIN = "_plain"
"""End of the name of a benchmark that is measured unguided and greedy as well."""
ANSWERS = 10
"""Answers of a form of question that a summary counts by themselves; the others are ``OTHER``."""
OTHER = "(other answers)"

Say = Callable[[str], None]


def validated(policy: Policy, experiment: Experiment) -> Tuned:
    """Guidance and temperature at which the policy is best on the validation split, with the scores there."""
    return tune(policy, find_benchmarks(experiment.test.benchmarks), experiment.tuning.prompts)


def validation_score(tuned: Tuned) -> float:
    """The mean over tasks of the best success on validation: what members of a grid are compared by."""
    best = [max(grid.values()) for grid in tuned.grid.values()]
    return sum(best) / len(best)


def tested(policy: Policy, experiment: Experiment, tuned: Tuned, folder: Path, say: Say) -> dict[str, Any]:
    """By benchmark the packed outcome on the test split; the prompts are written into ``folder`` once.

    Drawing benchmarks are measured twice, at the settings chosen and unguided. Raises InputError where a test prompt is
    among those that anything was chosen on.
    """
    test = experiment.test
    found: dict[str, Any] = {}
    for benchmark in find_benchmarks(test.benchmarks):
        n = test.sizes.get(benchmark.name, benchmark.n)
        prompts = benchmark.prompts(n)
        say(f"test: {benchmark.name}, {len(prompts)} prompts")
        fingerprint = keep_prompts(prompts, folder)
        scored = _score(policy, benchmark, n, Measuring(test.sampled_prompts, tuned=tuned))
        found[benchmark.name] = packed(scored, fingerprint).as_dict()
        plain = replace(benchmark, name=benchmark.name + PLAIN, fixed=True)
        if all(_same(plain, prompt, tuned) for prompt in prompts):
            found[plain.name] = benchmark.name  # the same measurement
        else:
            found[plain.name] = packed(_score(policy, plain, n, Measuring(0, tuned=tuned)), fingerprint).as_dict()
    return found


def _score(policy: Policy, benchmark: Benchmark, n: int, measuring: Measuring) -> BenchmarkRecord:
    result = evaluate(policy, [benchmark], sizes={benchmark.name: n}, measuring=measuring)
    return result.scored[benchmark.name]


def _same(plain: Benchmark, prompt: Prompt, tuned: Tuned) -> bool:
    """Whether what was chosen for the prompt's task is what the benchmark does anyway."""
    base = plain.sampling(SAMPLING)
    return tuned.applied(base, prompt.task) == base


def packed(scored: BenchmarkRecord, fingerprint: str) -> Outcome:
    """A record as a summary holds it: the first sample of every prompt, and what many of some gave."""
    sizes = [len(row) for row in scored.successes]
    most = max(sizes)
    often = [most > 1 and size == most for size in sizes]
    unknown = np.full(len(sizes), np.nan)
    counts = np.array([sum(row) if many else np.nan for row, many in zip(scored.successes, often, strict=True)])
    best = {n: unknown.copy() for n in BEST_OF if n <= most} if scored.judged else {}
    for n, values in best.items():
        for i, many in enumerate(often):
            judged = [score for score in scored.judged[i] if score is not None] if many else []
            if many and len(judged) == most:
                values[i] = best_of_n(judged, scored.successes[i], n)
    known = {n: values for n, values in best.items() if not np.isnan(values[often]).any()}
    answers: dict[str, Counter[str]] = {}
    for form, given in zip(scored.forms, scored.answers, strict=True):
        if form:
            answers.setdefault(form, Counter()).update(given[:1])
    shown = {form: _commonest(given) for form, given in answers.items()}
    first = np.array([row[0] for row in scored.successes], dtype=np.float64)
    settings = scored.settings["tasks"]
    return Outcome(fingerprint, first, most, counts, known, shown, settings)


def _commonest(given: Counter[str]) -> dict[str, int]:
    """The answers given most often, the rest of them as one."""
    shown = dict(given.most_common(ANSWERS))
    rest = given.total() - sum(shown.values())
    return {**shown, **({OTHER: rest} if rest else {})}


def keep_prompts(prompts: Sequence[Prompt], folder: Path) -> str:
    """Writes what tables need to know of the prompts, once; returns their fingerprint."""
    digest = hashlib.blake2b(digest_size=6)
    for prompt in prompts:
        digest.update(f"{content_key(prompt)} {prompt.answer}\n".encode())
    fingerprint = digest.hexdigest()
    path = prompts_file(folder, fingerprint)
    if not is_there(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, (json.dumps(prompt_set(prompts).as_dict(), separators=(",", ":")) + "\n").encode())
    return fingerprint


def prompt_set(prompts: Sequence[Prompt]) -> PromptSet:
    """What tables need to know of prompts."""
    clusters: dict[str, int] = {}
    asked = [prompt.output == ("text",) and prompt.answer is not None for prompt in prompts]
    return PromptSet(
        tuple(prompt.category for prompt in prompts),
        tuple(clusters.setdefault(cluster_of(prompt), len(clusters)) for prompt in prompts),
        tuple(prompt.held_out for prompt in prompts),
        tuple(form_of(prompt) if text else "" for prompt, text in zip(prompts, asked, strict=True)),
        tuple(normalize_answer(str(p.answer)) if text else None for p, text in zip(prompts, asked, strict=True)),
    )


def chosen_member(scores: Sequence[float]) -> int:
    """The member of a grid with the highest score on validation; of equal ones the first."""
    if not scores or not all(np.isfinite(scores)):
        raise InputError(f"validation scores {list(scores)}: a member has none: run its job again")
    return int(np.argmax(scores))


__all__ = ["Say", "chosen_member", "packed", "prompt_set", "tested", "validated", "validation_score"]
