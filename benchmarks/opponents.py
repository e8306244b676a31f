"""How well the win rate against a few opponents stands for the one against all, on the shipped base.

    python benchmarks/opponents.py [--steps 2] [--scale 0.5]

Groups of 8 of ``quickstart`` are judged with 2, 4 and 6 opponents and with all 7. Printed per task and number: the mean
over groups of Spearman's correlation with the full round robin, and the mean error of a win rate. Groups whose full
win rates are all equal have no order and are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from scipy.stats import spearmanr

from lvrpo.commands.settings import find_config
from lvrpo.config import load_config
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.preference import Preference
from lvrpo.training.config import TrainConfig
from lvrpo.training.rollout import prompts_of_step, rollout
from lvrpo.training.sources import training_source
from lvrpo.training.state import RunState
from lvrpo.types import Group

COUNTS = (2, 4, 6)


def groups_of(steps: int, scale: float) -> tuple[list[Group], RunState]:
    """What the base draws and answers in the first steps, without any training."""
    base = load_config(TrainConfig, find_config("quickstart"), [])
    counts = {task: max(1, round(scale * n)) for task, n in base.data.prompts_per_step.items()}
    config = base.model_copy(update={"data": base.data.model_copy(update={"prompts_per_step": counts})})
    source, state = training_source(config), RunState.start(load_policy("tiny"), config)
    groups: list[Group] = []
    for step in range(steps):
        groups += rollout(state.policies, prompts_of_step(source, config, step), config, step)
    return groups, state


def rank_correlation(some: torch.Tensor, full: torch.Tensor) -> float | None:
    """Spearman's, ties at their mean rank; 0 where a few opponents tell nobody apart, None where all do not."""
    if len(full) < 2 or bool((full == full[0]).all()):
        return None
    return 0.0 if bool((some == some[0]).all()) else float(spearmanr(some.numpy(), full.numpy())[0])


def compare(groups: Sequence[Group], few: torch.Tensor, full: torch.Tensor) -> dict[str, tuple[int, float, float]]:
    """By task: groups, mean correlation, mean absolute error of a win rate."""
    found: dict[str, list[tuple[float, float]]] = {}
    for group, some, whole in zip(groups, few, full, strict=True):
        there = some.isfinite() & whole.isfinite()
        correlation = rank_correlation(some[there], whole[there])
        if correlation is not None:
            error = float((some[there] - whole[there]).abs().mean())
            found.setdefault(group.prompt.task, []).append((correlation, error))
    return {
        task: (len(rows), sum(c for c, _ in rows) / len(rows), sum(e for _, e in rows) / len(rows))
        for task, rows in found.items()
    }


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--scale", type=float, default=0.5, help="of the prompts per step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    groups, state = groups_of(options.steps, options.scale)

    def win_rates(opponents: int | None) -> torch.Tensor:
        reward = Preference(question="{prompt}", labels=("yes", "no"), opponents=opponents)
        chosen = [group for group in groups if reward.applies(group.prompt)]
        return reward.score(chosen, state.policies.judge).values

    judged = [group for group in groups if Preference().applies(group.prompt)]
    full = win_rates(None)
    print("| opponents | task | groups | rank correlation | error of a win rate |\n|---|---|---|---|---|")
    for count in COUNTS:
        for task, (n, correlation, error) in compare(judged, win_rates(count), full).items():
            print(f"| {count} | {task} | {n} | {correlation:.2f} | {error:.2f} |")


if __name__ == "__main__":
    main()
