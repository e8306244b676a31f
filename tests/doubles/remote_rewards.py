"""What a process of ``tests/rewards/test_remote.py`` does with rewards in Ray actors, two replicas each."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.data.scenes import ScenePrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.policies.base import Policy, Sampling
from lvrpo.registry import allow_code
from lvrpo.rewards import remote
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.types import Group

ROWS: tuple[dict[str, Any], ...] = (
    {"name": "scene_facts", "options": {"mode": "gated"}},
    {"name": "self_vqa", "judge": "tiny"},
    {"name": "semantic", "judge": "tiny"},
    {"name": "caption_back", "judge": "tiny"},
    {"name": "edit_consistency", "options": {"ask": False}},
)
"""Built-in rewards of images, none of which asks the run's judge."""
MINE = """
import os, time

def brightness(image, target=0.5):
    return -abs(float(image.mean()) - target)

def unsteady(trajectory, dies="", raises="", hangs=""):
    if trajectory.prompt.id == dies:
        os._exit(7)
    if trajectory.prompt.id == raises:
        raise ValueError("no such thing")
    if trajectory.prompt.id == hangs:
        time.sleep(1000)
    return float(trajectory.image.mean())
"""


def drawn(policy: Policy) -> list[Group]:
    """Groups of three images and edits."""
    source = ScenePrompts(split="test")
    prompts = [*source.prompts("generate", 4), *source.prompts("edit", 2)]
    sampling = Sampling(group_size=3, num_steps=2, sampler="flow_sde", window=(0, 1))
    return policy.sample(prompts, sampling, seeds=list(range(len(prompts))))


def there(row: dict[str, Any], **ray: Any) -> RewardConfig:
    return RewardConfig.model_validate(row | {"where": {"ray": {"replicas": 2, "num_cpus": 0.1} | ray}})


def same_scores(policy: Policy, groups: list[Group]) -> None:
    allow_code(["./mine.py"])
    rows = [*ROWS, {"name": "./mine.py:brightness", "options": {"target": 0.3}, "weight": 2.0, "clip": [-0.2, None]}]
    here, actors = (
        build_rewards([RewardConfig.model_validate(row) for row in rows]),
        build_rewards(list(map(there, rows))),
    )
    # an actor is given one group at a time, and a model that reads may tell batches apart
    for own in [[group] for group in groups]:
        one, other = (score_groups(sources, own, policy) for sources in (here, actors))
        assert torch.equal(one.scores, other.scores), (one.scores, other.scores)
        assert one.reasons == other.reasons
        assert (one.judges, one.judged_by, one.judge) == (other.judges, other.judged_by, other.judge)
        assert one.noise.keys() == other.noise.keys()
        assert all(torch.equal(one.cut[name], cut) for name, cut in other.cut.items())
    whole = score_groups(actors, groups, policy)
    assert torch.equal(whole.scores, torch.cat([score_groups(here, [group], policy).scores for group in groups]))
    again = build_rewards([there(rows[0]).model_copy(update={"weight": 0.5, "on_failure": "stop"})])
    assert again[0].reward is actors[0].reward


def refusals(policy: Policy, groups: list[Group]) -> None:
    """The same line as here, and one of its own for a reward that asks the run's judge."""
    with pytest.raises(InputError, match=r"rewards\.self_vqa\.where: asks the run's judge, which stays where the run"):
        build_rewards([there({"name": "self_vqa"}, replicas=1)])
    for row in (
        {"name": "scene_facts", "options": {"mode": "x"}},
        {"name": "semantic", "options": {"source": "no"}},
        {"name": "./mine.py:brightness"},
        {"name": "self_vqa", "judge": "nowhere"},
    ):
        with pytest.raises(InputError) as here:
            build_rewards([RewardConfig.model_validate(row)])
        with pytest.raises(InputError) as other:
            build_rewards([there(row, replicas=1)])
        assert str(other.value) == str(here.value)


def deaths(policy: Policy, groups: list[Group]) -> None:
    allow_code(["./mine.py"])
    ids = [group.prompt.id for group in groups]
    options = {"dies": ids[1], "raises": ids[2], "hangs": ids[3]}
    row = {"name": "./mine.py:unsteady", "options": options, "max_failed": 0.6}
    sources = build_rewards([there(row, timeout_s=5)])
    for _ in range(2):
        table = score_groups(sources, groups, policy)
        assert table.mask[..., 0].all(dim=1).tolist() == [True, False, False, False, True, True]
        reasons = {p: {why for (row, _, _), why in table.reasons.items() if row == p} for p in (1, 2, 3)}
        assert reasons == {
            1: {"failed: its actor died (2 times)"},
            2: {"failed: ValueError: no such thing"},
            3: {"failed: no answer within timeout_s=5"},
        }
        right = [float(trajectory.image.mean()) for trajectory in groups[5].trajectories]
        assert table.scores[5, :, 0].tolist() == torch.tensor(right).tolist()
    for changed, line in (({"on_failure": "stop"}, "actor died"), ({"max_failed": 0.1}, "failed on 9 of 18 outputs")):
        with pytest.raises(ContractError, match=line):
            score_groups(build_rewards([there(row | changed, timeout_s=5)]), groups, policy)


def no_room(policy: Policy, groups: list[Group]) -> None:
    remote.ROOM_S = 3.0
    with pytest.raises(InputError) as error:
        build_rewards([there({"name": "scene_facts"}, num_gpus=64, replicas=1)])
    assert "rewards.scene_facts.where: no room within 3 s for 1 x (0.1 CPUs and 64 GPUs)" in str(error.value)
    assert "the Ray cluster has" in str(error.value)


if __name__ == "__main__":
    from lvrpo.policies.loading import load_policy

    torch.set_num_threads(1)
    Path("mine.py").write_text(MINE)
    policy = load_policy("tiny").make_reference()
    chosen = {"same_scores": same_scores, "refusals": refusals, "deaths": deaths, "no_room": no_room}[sys.argv[1]]
    chosen(policy, drawn(policy))
