"""The samples that the report shows: of two benchmarks whose rows have the same ids, each its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lvrpo.evaluation.samples import write_evaluation, write_samples
from lvrpo.evaluation.suite import Evaluation
from lvrpo.images import load_image
from lvrpo.records import BenchmarkRecord
from lvrpo.report.run import load_run
from lvrpo.report.samples import ImageStore, sample_sections
from lvrpo.rewards.base import offline_group
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import Group, Prompt


def answered(answers: Sequence[str], given: str, shade: float) -> list[Group]:
    """Rows 0, 1, ... of one file, with an image of one shade."""
    image = torch.full((3, 4, 4), shade)
    return [
        offline_group(Prompt(str(i), "understand", (image, "what color is it ?"), ("text",), answer), [(given,)])
        for i, answer in enumerate(answers)
    ]


def evaluation(**groups: Sequence[Group]) -> Evaluation:
    def record(own: Sequence[Group]) -> BenchmarkRecord:
        ids = tuple(group.prompt.id for group in own)
        right = tuple(float(group.prompt.answer == group.trajectories[0].text) for group in own)
        return BenchmarkRecord(ids, ("",) * len(ids), ids, right, successes=tuple((score,) for score in right))

    return Evaluation({name: record(own) for name, own in groups.items()}, groups)


def test_rows_of_two_files_with_the_same_ids_are_shown_each_with_its_own_score(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / "config.yaml").write_text("name: run\n")
    for phase in ("before", "after"):
        write_evaluation(run, phase, evaluation(a=answered(["red", "blue"], "red", 0), b=answered(["red"], "blue", 1)))
    rows = json.loads((tmp_path / "eval/after.json").read_text())["prompts"]
    assert [(row["benchmark"], row["id"], row["score"]) for row in rows] == [
        ("a", "0", 1),
        ("a", "1", 0),
        ("b", "0", 0),
    ]
    sections = sample_sections(load_run(tmp_path), ImageStore(tmp_path))
    assert (sections.judged, sections.answers.total, sections.still_wrong.total) == (3, 3, 2)


def test_the_image_beside_a_question_is_its_own_in_whatever_order_the_prompts_are_sampled(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    shown = [(name, group) for name, shade in (("a", 0.0), ("b", 1.0)) for group in answered(["red"], "red", shade)]
    for phase, order in (("before", shown), ("step_000010", shown[::-1]), ("after", shown[1:])):
        rows = write_samples(run, phase, order, {})
        assert [load_image(tmp_path / str(row.source_image)).mean().item() for row in rows] == [
            group.prompt.images[0].mean().item() for _, group in order
        ]
