"""Training curves of methods as one picture: a row per method, a column per task, the first method in grey behind.

    python benchmarks/curves.py runs/methods lvrpo dpo flow_grpo --image docs/images/methods.png

Reads RUNS/NAME-SEED/metrics.jsonl of every finished seed. A curve is the share of sampled outputs that are right as a
whole, on the training prompts, as a running mean over five steps, the mean over seeds; the dotted line is the
untrained base on such prompts. Where nothing is sampled (supervised training) the two evaluations are drawn instead.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

TASKS = ("generate", "understand", "edit", "reason")
OVER = 5
"""Steps of the running mean."""
GRID = 60
"""Points in time at which the seeds' curves meet."""

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]


def main() -> None:
    """Draws and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder that benchmarks/methods.py wrote")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--image", type=Path, default=Path("methods.png"))
    options = parser.parse_args()
    folders = {method: sorted(options.runs.glob(f"{method}-[0-9]*")) for method in options.methods}
    missing = [method for method, found in folders.items() if not any((f / "summary.json").exists() for f in found)]
    if missing:
        raise SystemExit(
            f"error: {options.runs}: no finished run of {', '.join(missing)}: run benchmarks/methods.py first"
        )
    draw(
        {method: [f for f in found if (f / "summary.json").exists()] for method, found in folders.items()},
        options.image,
    )
    print(options.image)


def draw(folders: dict[str, list[Path]], image: Path) -> None:
    """The picture."""
    height = 0.4 + 1.05 * len(folders)
    figure, axes = plt.subplots(
        len(folders), len(TASKS), figsize=(10, height), sharex=True, sharey="col", squeeze=False
    )
    first = next(iter(folders.values()))
    for row, (method, runs) in zip(axes, folders.items(), strict=True):
        for axis, task in zip(row, TASKS, strict=True):
            panel(axis, task, runs, first)
        row[0].set_ylabel(method.replace("_", "\n"), rotation=0, ha="right", va="center", fontsize=8)
    for axis, task in zip(axes[0], TASKS, strict=True):
        axis.set_title(task, fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("processor seconds", fontsize=8)
    figure.tight_layout(h_pad=0.3)
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image, dpi=90)
    plt.close(figure)
    with Image.open(image) as drawn:
        drawn.convert("RGB").quantize(32).save(image, optimize=True)


def panel(axis: Axes, task: str, runs: Sequence[Path], first: Sequence[Path]) -> None:
    """One method, one task."""
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
    if runs is not first:
        plot(axis, first, task, color="0.75", linewidth=1.5)
    base = [value for run in first for value in column(run, f"control/{task}/success")[1]]
    if base:
        axis.axhline(statistics.mean(base), color="0.4", linewidth=0.8, linestyle=":")
    if not plot(axis, runs, task, color="tab:blue", linewidth=1.2) and supervised(runs):
        ends = [summary(run) for run in runs]
        times = (0.0, statistics.mean(end["processor_seconds"] for end in ends))
        scores = [statistics.mean(end[when][task]["score"] for end in ends) for when in ("before", "after")]
        axis.plot(times, scores, "o--", color="tab:blue", markersize=3, linewidth=0.8)


def plot(axis: Axes, runs: Sequence[Path], task: str, **style: Any) -> bool:
    """The mean over the seeds; false where none of them samples that task."""
    curves = [curve for run in runs if len((curve := training(run, task))[0])]
    if not curves:
        return False
    times = np.linspace(max(c[0][0] for c in curves), min(c[0][-1] for c in curves), GRID)
    axis.plot(times, np.mean([np.interp(times, *curve) for curve in curves], axis=0), **style)
    return True


def training(run: Path, task: str) -> Curve:
    """Processor seconds and the running mean of the share of right outputs."""
    steps, values = column(run, f"reward/{task}/success")
    if len(steps) < OVER:
        return np.empty(0), np.empty(0)
    ends = summary(run)
    mean = np.convolve(values, np.ones(OVER) / OVER, mode="valid")
    return steps[OVER - 1 :] * ends["processor_seconds"] / ends["steps"], mean


def column(run: Path, name: str) -> Curve:
    """Steps and values of one metric."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([step for step, _ in found], dtype=float), np.array([value for _, value in found], dtype=float)


def supervised(runs: Sequence[Path]) -> bool:
    """Whether nothing was sampled."""
    return not any(len(column(run, f"reward/{task}/success")[0]) for run in runs for task in TASKS)


def summary(run: Path) -> dict[str, Any]:
    """The run's numbers."""
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
