"""The benchmarks of the built-in world: held-out prompts of the test split."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Literal

from lvrpo.data.scenes import CATEGORIES, ScenePrompts, ScenesConfig, Split
from lvrpo.evaluation.suite import Benchmark
from lvrpo.types import Prompt, TaskKind


@lru_cache(maxsize=16)
def held_out_prompts(
    task: TaskKind, n: int, split: Split = "test", wording: Literal["trained", "paraphrased"] = "trained"
) -> tuple[Prompt, ...]:
    """The first ``n`` prompts of a task; categories take turns, a fifth of those that can show unseen combinations."""
    return tuple(ScenePrompts(ScenesConfig(wording=wording), split, 0).prompts(task, n))


def _validation(task: TaskKind) -> Callable[[int], tuple[Prompt, ...]]:
    return partial(held_out_prompts, task, split="validation")


PASS_AT_K_SAMPLES = 16
"""Samples per prompt for pass@k and best-of-n."""

GENERATE = Benchmark(
    "generate",
    partial(held_out_prompts, "generate"),
    n=286 * len(CATEGORIES["generate"]),
    pass_at_k_samples=PASS_AT_K_SAMPLES,
    validation=_validation("generate"),
)
"""Images that show all facts of the prompt, drawn without guidance."""
GENERATE_GUIDED = Benchmark(
    "generate_guided",
    partial(held_out_prompts, "generate"),
    n=286 * len(CATEGORIES["generate"]),
    guidance_scale=1.5,
    fixed_sampling=True,
)
"""The same prompts and noise with guidance 1.5."""
GENERATE_PARAPHRASED = Benchmark(
    "generate_paraphrased", partial(held_out_prompts, "generate", wording="paraphrased"), n=490
)
"""The first of these prompts, paraphrased."""
UNDERSTAND = Benchmark(
    "understand", partial(held_out_prompts, "understand"), n=2400, validation=_validation("understand")
)
"""Questions about images, greedy."""
UNDERSTAND_PARAPHRASED = Benchmark(
    "understand_paraphrased", partial(held_out_prompts, "understand", wording="paraphrased"), n=600
)
"""The first of these questions, paraphrased."""
UNDERSTAND_SAMPLED = Benchmark(
    "understand_sampled",
    partial(held_out_prompts, "understand"),
    n=1200,
    temperature=1.0,
    samples=4,
    pass_at_k_samples=PASS_AT_K_SAMPLES,
    fixed_sampling=True,
)
"""The same questions sampled at temperature 1, four times each."""
EDIT = Benchmark(
    "edit",
    partial(held_out_prompts, "edit"),
    n=200 * len(CATEGORIES["edit"]),
    pass_at_k_samples=PASS_AT_K_SAMPLES,
    validation=_validation("edit"),
)
"""Edits of which all facts hold, including that nothing else changed."""
REASON = Benchmark(
    "reason", partial(held_out_prompts, "reason"), n=334 * len(CATEGORIES["reason"]), validation=_validation("reason")
)
"""Sums and comparisons, greedy; draw_answer thinks, then draws."""
