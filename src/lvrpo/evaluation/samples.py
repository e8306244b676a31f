"""Samples of an evaluation: a few outputs per category with their images, as the report reads them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from lvrpo.evaluation.suite import Evaluation
from lvrpo.images import png
from lvrpo.records import EvaluationRecord, FactCheck, Sample, SampleKey, from_json
from lvrpo.rewards.success import HeldOutScorer, has_success
from lvrpo.rewards.verifiable_image import fact_table
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import Group, Prompt

PER_CATEGORY = 3
WITHOUT_CATEGORY = 12
"""Prompts kept of rows without a category."""
REPEATED_PROMPTS = ("generate_guided", "understand_sampled", "generate_paraphrased", "understand_paraphrased")
"""Benchmarks that reuse the prompts of others: no samples are kept, as ids would collide."""


def first_per_category(name: str, prompts: Sequence[Prompt]) -> list[int]:
    """Places of the first few prompts of every category, whatever their scores."""
    if name in REPEATED_PROMPTS:
        return []
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(prompt.category, []).append(i)
    kept = (own[: PER_CATEGORY if category else WITHOUT_CATEGORY] for category, own in places.items())
    return sorted(i for own in kept for i in own)


def write_evaluation(run: RunDirectory, phase: str, evaluation: Evaluation) -> None:
    """Writes eval/PHASE.json, with the images of the kept samples in eval/PHASE/ and eval/sources/."""
    groups = [(name, group) for name, kept in evaluation.groups.items() for group in kept]
    rewards = {
        (name, prompt): score
        for name, scored in evaluation.scored.items()
        if scored.metric == "reward"
        for prompt, score in zip(scored.ids, scored.scores, strict=True)
    }
    successes = {
        (name, prompt): row[0]
        for name, kept in evaluation.groups.items()
        if kept
        for prompt, row in zip(evaluation.scored[name].ids, evaluation.scored[name].successes, strict=False)
    }
    samples = write_samples(run, phase, groups, successes, rewards)
    run.write_json(f"eval/{phase}.json", {**evaluation.as_dict(), "prompts": [asdict(sample) for sample in samples]})


def read_evaluation(run: RunDirectory, relative: str) -> EvaluationRecord:
    """The inverse of ``write_evaluation``; raises InputError for another shape."""
    return from_json(EvaluationRecord, run.read_json(relative), str(run.path / relative), "restore it or delete it")


def first_successes(groups: Sequence[Group], scorer: HeldOutScorer) -> dict[str, float]:
    """The success of the first member of each group whose success is defined, by prompt id; nan where it failed."""
    first = [Group(group.prompt, group.trajectories[:1]) for group in groups]
    return {first[p].prompt.id: row[0] for p, row in scorer.successes(first).items()}


def write_samples(
    run: RunDirectory,
    phase: str,
    groups: Sequence[tuple[str, Group]],
    successes: Mapping[SampleKey, float],
    rewards: Mapping[SampleKey, float] | None = None,
) -> list[Sample]:
    """One row per group, each with its benchmark, of its first member; writes the images.

    ``successes``: nan where it failed; ``rewards``: scores where success is not defined.
    """
    first = [(name, Group(group.prompt, group.trajectories[:1])) for name, group in groups]
    scores = {key: score for key, score in successes.items() if math.isfinite(score)}
    drawn = [each for each in first if "image" in each[1].prompt.output and has_success(each[1].prompt)]
    facts_hold = fact_table([group for _, group in drawn]) if drawn else []
    holds = {(name, group.prompt.id): row for (name, group), row in zip(drawn, facts_hold, strict=True)}
    rows = []
    for number, (name, group) in enumerate(groups):
        prompt, output = group.prompt, group.trajectories[0]
        key = name, prompt.id
        image = source = None
        if output.image is not None:
            image = f"eval/{phase}/{number:05d}.png"
            run.write_bytes(image, png(output.image))
        shown = next(iter(prompt.images), None)
        if shown is not None:
            content = png(shown)
            source = f"eval/sources/{hashlib.blake2b(content, digest_size=8).hexdigest()}.png"
            if not (run.path / source).exists():
                run.write_bytes(source, content)
        facts = zip(prompt.facts, holds.get(key, [None] * len(prompt.facts)), strict=True)
        rows.append(
            Sample(
                id=prompt.id,
                benchmark=name,
                task=prompt.task,
                category=prompt.category,
                text=prompt.text,
                answer=prompt.answer,
                output_text=output.text,
                score=scores.get(key),
                reward=(rewards or {}).get(key),
                image=image,
                source_image=source,
                facts=tuple(FactCheck(fact.question, fact.answer, held) for fact, held in facts),
            )
        )
    return rows
