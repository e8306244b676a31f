"""Parts of lvrpo in a loop of your own: sample, score, normalise, and look at one step, without the trainer.

python examples/use_the_parts.py
"""

from __future__ import annotations

import torch

from lvrpo.algorithms import gdpo_advantages, signal_mask
from lvrpo.data.scenes import ScenePrompts
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.types import TASKS


def main() -> None:
    """One step of rollouts and rewards on eight prompts, printed."""
    torch.set_num_threads(1)
    policy = load_policy("tiny")
    source = ScenePrompts(split="train")
    prompts = [*source.prompts("generate", 4), *source.prompts("understand", 4)]

    groups = policy.sample(prompts, Sampling(group_size=8), seeds=list(range(len(prompts))))
    rewards = build_rewards(
        [
            RewardConfig(name="exact_answer"),
            RewardConfig(name="scene_facts", label="facts", options={"mode": "gated"}),
            RewardConfig(name="self_vqa"),
        ]
    )
    table = score_groups(rewards, groups, judge=policy.make_reference())
    tasks = torch.tensor([TASKS.index(task) for task in table.tasks])
    advantages = gdpo_advantages(table.scores, table.mask, table.weights, tasks, std_floor=0.01)
    signal = signal_mask(table.scores, table.mask, std_floor=0.01)

    for p, group in enumerate(groups):
        words = " ".join(part for part in group.prompt.parts if isinstance(part, str))
        best = int(advantages[p].argmax())
        said = group.trajectories[best].text or "an image"
        print(f"{words:40} {'signal' if signal[p] else 'no signal':10} best member {best}: {said}")
    for name in table.names:
        print(f"mean {name}: {table.mean(name):.3f}")


if __name__ == "__main__":
    main()
