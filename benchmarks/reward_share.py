"""What each reward costs of a training step on the tiny policy, as shares measured in one run.

    python benchmarks/reward_share.py [--steps 3] [--scale 0.5] [--json FILE]

A step is the rollout, the reward and the update of ``quickstart``; every reward is scored alone on the same groups. Its
share is reward / (rollout + reward + update), in processor seconds of one thread, the median over steps. The first step
is left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from lvrpo.commands.settings import find_config
from lvrpo.config import load_config
from lvrpo.evaluation.preference_fit import fit_preference
from lvrpo.evaluation.scene_pairs import json_line, scene_pairs
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.table import RewardConfig, build_rewards, score_groups
from lvrpo.training.advantages import segment_advantages
from lvrpo.training.config import TrainConfig
from lvrpo.training.rollout import prompts_of_step, rollout
from lvrpo.training.sources import training_source
from lvrpo.training.state import RunState
from lvrpo.training.update import take_steps

T = TypeVar("T")

BAR = 0.35
"""A reward from the model itself should cost less of a step than this."""
ENSEMBLE = [{"name": "own_vqa", "options": {"paraphrases": 3}}, {"name": "drawing_likelihood", "options": {"draws": 2}}]


def rows(head: str) -> dict[str, RewardConfig]:
    """The rewards that are measured, by what the table calls them."""
    made: dict[str, dict[str, Any]] = {
        "mutual": {"name": "mutual", "options": {"gate": "tiny", "draws": 4}},
        "own_vqa": {"name": "own_vqa"},
        "own_vqa, 3 wordings": {"name": "own_vqa", "options": {"paraphrases": 3, "bound": 1.0}},
        "preference, 4 opponents": {"name": "preference", "options": {"question": "{prompt}", "labels": ["yes", "no"]}},
        "learned_preference": {"name": "learned_preference", "options": {"head": head}},
        "caption_back": {"name": "caption_back"},
        "drawing_likelihood, 2 draws": {"name": "drawing_likelihood", "options": {"draws": 2}},
        "drawing_likelihood, 8 draws": {"name": "drawing_likelihood", "options": {"draws": 8}},
        "lower_bound of own_vqa and it": {"name": "lower_bound", "options": {"members": ENSEMBLE}},
        "agreement": {"name": "agreement"},
        "edit_consistency": {"name": "edit_consistency"},
        "semantic, instruction, knowledge": {
            "name": "lower_bound",
            "options": {"members": [{"name": "semantic"}, {"name": "instruction"}, {"name": "knowledge"}]},
        },
        "scene_facts (the verifier)": {"name": "scene_facts"},
    }
    return {name: RewardConfig(label=name, **row) for name, row in made.items()}


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and its processor seconds."""
    started = time.process_time()
    found = work()
    return found, time.process_time() - started


def make_head(folder: Path) -> str:
    """A small preference head of the tiny policy."""
    (folder / "pictures").mkdir()
    with (folder / "pairs.jsonl").open("w") as lines:
        for row, files in scene_pairs(8):
            lines.write(json_line(row))
            for name, content in files.items():
                (folder / name).write_bytes(content)
    head = folder / "head"
    head.mkdir()
    fit_preference(load_policy("tiny").frozen(), folder / "pairs.jsonl").head.save(head)
    return str(head)


def measure(steps: int, scale: float) -> dict[str, Any]:
    """Median seconds of rollout and update, and of each reward with its share."""
    torch.set_num_threads(1)
    base = load_config(TrainConfig, find_config("quickstart"), [])
    counts = {task: max(1, round(scale * n)) for task, n in base.data.prompts_per_step.items()}
    config = base.model_copy(update={"data": base.data.model_copy(update={"prompts_per_step": counts})})
    source, state = training_source(config), RunState.start(load_policy("tiny"), config)
    verifiable = build_rewards(config.rewards)
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: build_rewards([row]) for name, row in rows(make_head(Path(folder))).items()}
        for step in range(steps + 1):
            prompts = prompts_of_step(source, config, step)
            groups, seconds = timed(lambda: rollout(state.policies, prompts, config, step))  # noqa: B023
            row = {"rollout": seconds}
            for name, reward in sources.items():
                _, row[name] = timed(lambda: score_groups(reward, groups, state.policies.judge))  # noqa: B023
            table = score_groups(verifiable, groups, state.policies.judge)
            advantages = segment_advantages(table, groups, config.advantages)
            _, row["update"] = timed(
                lambda: take_steps(state.policies, state.optimizers, groups, advantages, config, step)  # noqa: B023
            )
            if step:
                for name, value in row.items():
                    times.setdefault(name, []).append(value)
    middle = {name: statistics.median(values) for name, values in times.items()}
    rest = middle["rollout"] + middle["update"]
    rewards = {
        name: {"seconds": value, "share": value / (rest + value)}
        for name, value in middle.items()
        if name not in ("rollout", "update")
    }
    return {"prompts": counts, "rollout": middle["rollout"], "update": middle["update"], "rewards": rewards}


def main() -> None:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the prompts per step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.steps, options.scale)
    print(f"rollout {found['rollout']:.2f} s, update {found['update']:.2f} s, one thread; prompts {found['prompts']}\n")
    print("| reward | seconds a step | share of the step |\n|---|---|---|")
    for name, row in found["rewards"].items():
        print(
            f"| {name} | {row['seconds']:.2f} | {row['share']:.0%}{'' if row['share'] < BAR else ' (over the bar)'} |"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
