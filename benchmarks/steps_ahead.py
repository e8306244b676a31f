"""Steps of a run that samples one step ahead against those of one that samples first and trains then.

    OMP_NUM_THREADS=1 python benchmarks/steps_ahead.py [--rounds 3] [--steps 8] [CONFIG section.key=value ...]

Both sample in a process engine with one thread and train with one thread, which needs two idle cores. Runs of the two
take turns: each starts its own engine; its first two steps, and the last, which samples nothing ahead, are left out.
Printed are medians of wall-clock seconds a step and the ratio of the medians of each round; above 1: one step ahead is
faster. The two train on other samples: those of one step ahead come from the weights before the update.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lvrpo.commands.inputs import read_config
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer


def step_seconds(config: str, overrides: Sequence[str], steps: int, ahead: int, folder: Path) -> list[float]:
    """Wall-clock seconds of ``steps`` steps of one run."""
    rare = ["validation.every=1000", "reference_eval_every=1000", "samples_every=1000", "checkpoint_every=1000"]
    own = [f"steps={steps + 3}", "rollout.engine.kind=process", f"rollout.steps_ahead={ahead}", *rare, *overrides]
    trainer = Trainer.start(read_config(TrainConfig, config, own), folder)
    ends: list[float] = []

    def observe(row: Mapping[str, Any]) -> None:
        ends.append(time.perf_counter())

    with trainer.run:
        trainer.train(observe)
    return [after - before for before, after in pairwise(ends[1:-1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="quickstart")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    medians: dict[int, list[float]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory() as name:
        for turn in range(options.rounds):
            for ahead in medians:
                folder = Path(name) / f"{turn}_{ahead}"
                seconds = step_seconds(options.config, options.overrides, options.steps, ahead, folder)
                medians[ahead].append(statistics.median(seconds))
    ratios = [first / ahead for first, ahead in zip(*medians.values(), strict=True)]
    first, ahead, ratio = (statistics.median(values) for values in (*medians.values(), ratios))
    print(f"sampled first {first:.2f} s, one step ahead {ahead:.2f} s a step: {ratio:.2f}", end=" ")
    print(f"({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
