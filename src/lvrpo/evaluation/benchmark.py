"""Scoring a policy on held-out prompts: one list of scores per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lvrpo.policies.base import Policy, Sampling
from lvrpo.rewards.success import SUCCESS_ONLY, HeldOutScorer
from lvrpo.sampling import derive_seed
from lvrpo.types import Group, Prompt

CHUNK = 256
"""Outputs sampled at once."""


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task, prompt by prompt."""

    prompts: tuple[Prompt, ...]
    scores: tuple[float, ...]
    """The mean over the samples of each prompt."""
    groups: tuple[Group, ...]
    """The sampled outputs."""
    by_sample: tuple[tuple[float, ...], ...] = ()
    """The score of every sample: 1 or 0 where right and wrong can be told."""

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)

    def by_category(self) -> Mapping[str, list[float]]:
        """Scores per category, in order of first appearance."""
        out: dict[str, list[float]] = {}
        for prompt, score in zip(self.prompts, self.scores, strict=True):
            out.setdefault(prompt.category, []).append(score)
        return out


def sample_prompts(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, seed: int, samples: int = 1
) -> list[Group]:
    """``samples`` outputs per prompt; the same seed gives every policy the same noise."""
    several = replace(sampling, group_size=samples)
    groups: list[Group] = []
    at_once = max(1, CHUNK // samples)
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        groups += policy.sample(chunk, several, [derive_seed(seed, "evaluation", prompt.id) for prompt in chunk])
    return groups


def score_prompts(
    policy: Policy,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seed: int,
    samples: int = 1,
    scorer: HeldOutScorer = SUCCESS_ONLY,
    judge: Policy | None = None,
) -> TaskScores:
    """``sample_prompts``, each output scored; ``judge``: who judges for rewards, where the scorer has some."""
    groups = sample_prompts(policy, prompts, sampling, seed, samples)
    rows = [tuple(row) for row in scorer.scores(groups, judge)]
    return TaskScores(tuple(prompts), tuple(sum(row) / len(row) for row in rows), tuple(groups), tuple(rows))
