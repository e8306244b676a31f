"""Text rendering: prompts with the text in quotation marks, one a line as flow_grpo has them, scored by OCR."""

from __future__ import annotations

from pathlib import Path

from lvrpo.errors import InputError
from lvrpo.evaluation.benchmarks.image_benchmark import digest, image_benchmark
from lvrpo.evaluation.benchmarks.published import BenchmarkInputs, PublishedBenchmark
from lvrpo.evaluation.suite import Benchmark
from lvrpo.reading import read_lines
from lvrpo.rewards.verifiable_image import OCR, asked_text
from lvrpo.types import Prompt

PROMPTS = "test.txt"


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a text file; raises InputError, with file and line, for one without text in quotation marks."""
    found = []
    for number, line in read_lines(path, "give a file with a prompt a line"):
        prompt = Prompt(f"ocr/{number - 1:05d}", "generate", (line,), ("image",), source=path.name)
        if asked_text(prompt) is None:
            raise InputError(f"{path}:{number}: no text in quotation marks: say which text is to be drawn")
        found.append(prompt)
    return found


def build(folder: Path, inputs: BenchmarkInputs) -> list[Benchmark]:
    """The prompts, scored by the reward ``ocr``."""
    prompts = read_prompts(folder / PROMPTS)
    version = digest("\n".join(str(prompt.parts[0]) for prompt in prompts))
    data = f"{len(prompts)} prompts, {version}"
    return [image_benchmark("ocr", prompts, OCR(), data, "rapidocr, 1 - normalized edit distance")]


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
