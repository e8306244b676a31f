"""Drawn text: prompts with the text in quotation marks, one a line as flow_grpo has them, scored by reading it back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, PublishedBenchmark
from lvrpo.evaluation.suite import Benchmark
from lvrpo.policies.base import Policy, check_text
from lvrpo.reading import read_text
from lvrpo.rewards.verifiable_image import OCR, asked_text
from lvrpo.types import Prompt

PROMPTS = "test.txt"


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a text file; raises InputError, with file and line, for one without text in quotation marks."""
    found = []
    for number, line in enumerate(read_text(path, "give a file with a prompt a line").splitlines()):
        if not line.strip():
            continue
        prompt = Prompt(f"ocr/{number:05d}", "generate", (line.strip(),), ("image",), source=path.name)
        if asked_text(prompt) is None:
            raise InputError(f"{path}:{number + 1}: no text in quotation marks: say which text is to be drawn")
        found.append(prompt)
    if not found:
        raise InputError(f"{path}: no prompts: give a file with a prompt a line")
    return found


def readable(name: str, prompts: Sequence[Prompt], policy: Policy) -> None:
    """Raises InputError, which names the prompt, where a policy cannot read one."""
    for prompt in prompts:
        try:
            check_text(policy, str(prompt.parts[-1]))
        except InputError as error:
            raise InputError(f"benchmark {name}: prompt {prompt.id}: {error}") from None


def build(folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    """The prompts, scored by the reward ``ocr``."""
    prompts = read_prompts(folder / PROMPTS)
    digest = hashlib.sha256("\n".join(str(p.parts[0]) for p in prompts).encode()).hexdigest()[:12]
    return [
        Benchmark(
            "ocr",
            lambda n: prompts[:n],
            n=len(prompts),
            metric="reward",
            check=lambda policy: readable("ocr", prompts, policy),
            reward=OCR(),
            own_sampling=True,
            details={
                "data": f"{len(prompts)} prompts, {digest}",
                "scored_by": "rapidocr, 1 - normalized edit distance",
            },
        )
    ]


BENCHMARK = PublishedBenchmark(
    "ocr",
    "github.com/yifan123/flow_grpo, dataset/ocr (arXiv:2505.05470)",
    (PROMPTS,),
    1018,
    "nothing: PP-OCR (pip install 'lvrpo[ocr]')",
    "MIT",
    build,
    read_prompts,
    digest="4dd8caf3ab6a",
)
"""The share of the requested text that a reader finds; flow_grpo's own scorer counts differently."""
