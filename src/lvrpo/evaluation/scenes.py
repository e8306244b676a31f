"""The benchmarks of the built-in world: held-out prompts of the test split."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from lvrpo.data.scenes import CATEGORIES, ScenePrompts, ScenesConfig, Split
from lvrpo.evaluation.suite import Benchmark
from lvrpo.types import Prompt, Task


@lru_cache(maxsize=12)
def held_out_prompts(task: Task, n: int, split: Split = "test") -> tuple[Prompt, ...]:
    """The first ``n`` prompts of a task; categories take turns, a fifth of the pictures shows held-out combinations."""
    return tuple(ScenePrompts(ScenesConfig(), split, 0).prompts(task, n))


def _validation(task: Task) -> Callable[[int], tuple[Prompt, ...]]:
    return partial(held_out_prompts, task, split="validation")


MANY = 16
"""Samples per prompt for pass@k and best-of-n."""

GENERATE = Benchmark(
    "generate",
    partial(held_out_prompts, "generate"),
    n=70 * len(CATEGORIES["generate"]),
    many=MANY,
    validation=_validation("generate"),
)
"""Pictures that show all facts of the prompt, drawn without guidance."""
GENERATE_GUIDED = Benchmark(
    "generate_guided",
    partial(held_out_prompts, "generate"),
    n=70 * len(CATEGORIES["generate"]),
    guidance_scale=2.0,
    fixed=True,
)
"""The same prompts and noise with guidance 2."""
UNDERSTAND = Benchmark(
    "understand", partial(held_out_prompts, "understand"), n=1200, validation=_validation("understand")
)
"""Questions about pictures, greedy."""
UNDERSTAND_SAMPLED = Benchmark(
    "understand_sampled",
    partial(held_out_prompts, "understand"),
    n=1200,
    temperature=1.0,
    samples=4,
    many=MANY,
    fixed=True,
)
"""The same questions sampled at temperature 1, four times each."""
EDIT = Benchmark("edit", partial(held_out_prompts, "edit"), n=250, many=MANY, validation=_validation("edit"))
"""Edits of which all facts hold, that nothing else changed among them."""
REASON = Benchmark("reason", partial(held_out_prompts, "reason"), n=300, validation=_validation("reason"))
"""Sums and comparisons, greedy; draw_answer thinks, then draws."""
