"""Common code of published text-to-image benchmarks: the model's own sampling settings, and a reward as score."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from lvrpo.errors import InputError
from lvrpo.evaluation.suite import Benchmark, Metric
from lvrpo.policies.base import Policy, check_text
from lvrpo.records import MeanOver
from lvrpo.rewards.base import Reward
from lvrpo.types import Prompt


def digest(text: str) -> str:
    """12 hexadecimal digits that identify a version of the data."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def image_benchmark(
    name: str,
    prompts: Sequence[Prompt],
    reward: Reward,
    data: str,
    scored_by: str,
    *,
    metric: Metric = "reward",
    samples: int = 1,
    mean_over: MeanOver = "prompts",
    texts: Callable[[Prompt], Sequence[str]] = lambda prompt: [str(prompt.parts[-1])],
) -> Benchmark:
    """A benchmark of ``samples`` images per prompt; ``texts``: what the policy must be able to read of a prompt."""

    def check(policy: Policy) -> None:
        for prompt in prompts:
            try:
                for text in texts(prompt):
                    check_text(policy, text)
            except InputError as error:
                raise InputError(f"benchmark {name}: prompt {prompt.id}: {error}") from None

    return Benchmark(
        name,
        lambda n: prompts[:n],
        n=len(prompts),
        samples=samples,
        metric=metric,
        check=check,
        reward=reward,
        mean_over=mean_over,
        own_sampling=True,
        details={"data": data, "scored_by": scored_by},
    )
