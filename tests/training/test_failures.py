"""Why scores are missing stands in the files of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from lvrpo.commands.progress import Progress
from lvrpo.records import Metrics
from lvrpo.report.charts import other_charts, reward_charts
from lvrpo.rewards.base import Scores, offline_group
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import score_groups
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import group_successes
from lvrpo.training.reward_metrics import one_line, reward_means
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.samples import write_samples
from lvrpo.types import Group, Prompt, RewardTable

ASK = [Prompt(f"q{i}", "understand", ("x",), ("text",)) for i in range(2)]
DRAW = Prompt("d", "generate", ("x",), ("image",))
BLANK = torch.zeros(3, 8, 8)


class Fails:
    """Scores texts, but for the cells that it is told."""

    def __init__(self, failures: dict[tuple[int, int], str]) -> None:
        self.failures = failures

    def applies(self, prompt: Prompt) -> bool:
        return prompt.output == ("text",)

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        return Scores(torch.ones(len(groups), len(groups[0])), self.failures)


def scored(failures: dict[tuple[int, int], str]) -> tuple[list[Group], RewardTable]:
    groups = [offline_group(DRAW, [[BLANK]] * 2), *(offline_group(ask, [["a"], ["b"]]) for ask in ASK)]
    sources = [ConfiguredReward(RewardConfig(name="fails"), Fails(failures))]
    return groups, score_groups(sources, groups, None)  # type: ignore[arg-type]  # nobody judges


FAILURES = {(0, 0): "timed out", (0, 1): "cut\noff", (1, 1): "timed out"}


def test_the_share_of_failed_scores_and_the_commonest_reason() -> None:
    groups, table = scored(FAILURES)
    assert reward_means("reward", table, group_successes(groups)) == {
        "reward/understand/fails": 1.0,
        "reward_failed/understand/fails": 0.75,
        "reward_failed_why/understand/fails": "timed out",
    }
    every = dict.fromkeys([(p, g) for p in range(2) for g in range(2)], "away")
    groups, table = scored(every)
    assert reward_means("control", table, group_successes(groups)) == {
        "control_failed/understand/fails": 1.0,
        "control_failed_why/understand/fails": "away",
    }
    groups, table = scored({})
    assert reward_means("reward", table, group_successes(groups)) == {"reward/understand/fails": 1.0}


def test_a_reason_is_one_line_that_a_file_can_hold() -> None:
    assert one_line("two\n lines") == "two lines"
    assert one_line("half \ud800 a pair") == "half \\ud800 a pair"
    assert len(one_line("x" * 1000)) == 200


def test_samples_say_why_a_score_is_missing() -> None:
    run = RunDirectory.create(Path("run"), TrainConfig())
    groups, table = scored(FAILURES)
    write_samples(run, 1, groups, table, group_successes(groups))
    (path,) = Path("run").rglob("groups.jsonl")
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    found = {name: [(m["rewards"], m["masked"]) for m in row["members"]] for name, row in rows.items()}
    assert found == {
        "d": [({"fails": None}, {"fails": "not applicable"})] * 2,
        "q0": [({"fails": None}, {"fails": f"failed: {why}"}) for why in ("timed out", "cut off")],
        "q1": [({"fails": 1.0}, {}), ({"fails": None}, {"fails": "failed: timed out"})],
    }


def test_whoever_reads_the_metrics_reads_past_reasons() -> None:
    """Words in a row, and rows without a mean where everything failed."""
    run = RunDirectory.create(Path("run"), TrainConfig())
    screen = StringIO()
    progress = Progress(3, Console(file=screen))
    every = dict.fromkeys([(p, g) for p in range(2) for g in range(2)], "away \ud800")
    for step, failures in enumerate(({}, FAILURES, every), start=1):
        groups, table = scored(failures)
        row = {
            "step": step,
            **reward_means("reward", table, group_successes(groups)),
            "seconds": 1.0,
            "seconds_left": 1.0,
        }
        run.append_metrics(row)
        progress.step(row)
    metrics = Metrics.read(Path("run") / "metrics.jsonl")
    assert not metrics.broken_lines
    assert metrics.series("reward_failed/understand/fails") == [(2, 0.75), (3, 1.0)]
    assert metrics.series("reward_failed_why/understand/fails") == []
    assert len(reward_charts(metrics)) == 1
    assert [group.title for group in other_charts(metrics)] == ["reward failed"]
    assert "understand fails 1.000" in screen.getvalue()
