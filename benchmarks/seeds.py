"""Several runs of one configuration as a markdown table: mean over seeds with 95 % t intervals.

    python benchmarks/seeds.py runs/seed0 runs/seed1 runs/seed2

Reads each run's summary.json; a row per task, and per category with --categories.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lvrpo.statistics import Interval, seeds_interval

TASKS = ("generate", "generate_guided", "understand", "understand_sampled", "edit", "reason")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--categories", action="store_true")
    options = parser.parse_args()
    summaries = [json.loads((run / "summary.json").read_text()) for run in options.runs]
    with_baseline = all("baseline" in summary for summary in summaries)
    print("| task | before | after | difference |" + (" baseline | ours minus it |" if with_baseline else ""))
    print("|---|---|---|---|" + ("---|---|" if with_baseline else ""))
    for name, path in rows(summaries, options.categories):
        cells = [mean(summaries, "before", path), mean(summaries, "after", path), change(summaries, path)]
        if with_baseline:
            cells += [mean(summaries, "baseline.after", path), against_baseline(summaries, path)]
        print(f"| {name} | " + " | ".join(cells) + " |")
    seconds = [summary["seconds"] for summary in summaries]
    print(f"\nalignment {min(seconds):.0f} to {max(seconds):.0f} s")


def rows(summaries: Sequence[dict[str, Any]], categories: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names and paths of the rows."""
    for task in TASKS:
        if task not in summaries[0]["after"]:
            continue
        yield task.replace("_", " "), (task,)
        if categories:
            for category in summaries[0]["after"][task]["categories"]:
                yield "&nbsp;&nbsp;" + category.replace("_", " "), (task, "categories", category)


def scores(summaries: Sequence[dict[str, Any]], section: str, path: tuple[str, ...]) -> list[float]:
    """One score per run."""
    out = []
    for summary in summaries:
        node: Any = summary
        for key in (*section.split("."), *path):
            node = node[key]
        out.append(node["score"])
    return out


def mean(summaries: Sequence[dict[str, Any]], section: str, path: tuple[str, ...]) -> str:
    """The mean over seeds."""
    values = scores(summaries, section, path)
    return f"{sum(values) / len(values):.3f}"


def change(summaries: Sequence[dict[str, Any]], path: tuple[str, ...]) -> str:
    """After minus before."""
    return spread(difference(scores(summaries, "after", path), scores(summaries, "before", path)))


def against_baseline(summaries: Sequence[dict[str, Any]], path: tuple[str, ...]) -> str:
    """Ours minus the baseline."""
    return spread(difference(scores(summaries, "after", path), scores(summaries, "baseline.after", path)))


def difference(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Seed by seed."""
    return [a - b for a, b in zip(one, other, strict=True)]


def spread(values: Sequence[float]) -> str:
    """Mean with its interval over seeds."""
    interval: Interval = seeds_interval(values)
    return f"{interval.score:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


if __name__ == "__main__":
    main()
