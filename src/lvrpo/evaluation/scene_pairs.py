"""Pairs for ``lvrpo fit-preference`` from the built-in world: a right output and one with a single fact corrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Literal

from lvrpo.data.scenes.objects import DEFAULT_SIZE, Split
from lvrpo.evaluation.cases import png
from lvrpo.evaluation.judge_cases import JudgeCase, judge_cases

Of = Literal["drawings", "edits", "answers"]
OF: tuple[Of, ...] = ("drawings", "edits", "answers")
_TASKS = {"drawings": "generate", "edits": "edit", "answers": "understand"}


def scene_pairs(
    per_category: int, of: Sequence[Of] = ("drawings",), split: Split = "train", seed: int = 0, size: int = DEFAULT_SIZE
) -> Iterator[tuple[dict[str, object], dict[str, bytes]]]:
    """Rows as ``lvrpo.data.preferences.PlainRow`` has them, and the pictures that each names, as PNG.

    A pure function of its arguments. Drawings and edits that look alike but for what their prompt does not say are
    no pairs.
    """
    wanted = {_TASKS[name] for name in of}
    for number, case in enumerate(judge_cases(per_category, split, seed, size)):
        task = case.group.prompt.task
        if task not in wanted or case.kind not in _kinds(case):
            continue
        yield _row(case, f"pictures/{number:06d}")


def _kinds(case: JudgeCase) -> Sequence[str]:
    """The kinds of a case that are about the prompt as a whole."""
    return ("prompt", "instruction") if case.side == "read" else (case.kind,)


def _row(case: JudgeCase, stem: str) -> tuple[dict[str, object], dict[str, bytes]]:
    prompt, files = case.group.prompt, {}
    named: list[str] = []
    for name, trajectory in zip(("better", "worse"), case.group.trajectories, strict=True):
        if trajectory.image is None:
            named.append(str(trajectory.text))
        else:
            named.append(f"{stem}_{name}.png")
            files[named[-1]] = png(trajectory.image)
    shown = [part for part in prompt.parts if not isinstance(part, str)]
    sources = [f"{stem}_{i}.png" for i in range(len(shown))]
    files |= {name: png(image) for name, image in zip(sources, shown, strict=True)}
    words = " ".join(part for part in prompt.parts if isinstance(part, str))
    row: dict[str, object] = {"prompt": words, "better": named[0], "worse": named[1]}
    return (row | {"images": sources} if sources else row), files


def json_line(row: dict[str, object]) -> str:
    """One line of ``pairs.jsonl``."""
    return json.dumps(row) + "\n"
