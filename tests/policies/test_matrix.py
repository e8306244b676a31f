"""Every policy with every task, objective and reward: a step is trained, or the configuration refused in one line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_vlm import without_videos

from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.policies.base import listening
from lvrpo.policies.defaults import TokenPolicy
from lvrpo.registry import allow_code
from lvrpo.rewards.table import score_groups
from lvrpo.training.advantages import segment_advantages
from lvrpo.training.components import open_components
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of
from lvrpo.training.rollout import prompts_of_step, rollout
from lvrpo.training.setup import open_policy, require_judge
from lvrpo.training.state import TrainState
from lvrpo.training.trainer import train_step
from lvrpo.types import TASKS, TextSegment, Trajectory

SECTIONS = {
    "tiny": ("text", "flow"),
    "janus": ("text", "tokens"),
    "emu3": ("text", "tokens"),
    "showo": ("text", "masked"),
    "mmada": ("text", "masked"),
    "showo2": ("text", "flow"),
    "qwen3_vl": ("text",),
    "sd3": ("flow",),
}
"""Sections of the configuration for the segments of a policy."""
THINK = "think"
"""Prompts of ``reason`` that ask for an image after a plan."""
CELLS = (*TASKS, THINK)
CAN: dict[str, tuple[str, ...]] = {
    "tiny": CELLS,
    "janus": ("understand", "generate", "reason", THINK),
    "emu3": ("understand", "generate", "reason", THINK),
    "showo": ("understand", "generate", "reason", THINK),
    "mmada": ("understand", "generate", "reason", THINK),
    "showo2": ("understand", "generate", "reason"),
    "qwen3_vl": ("understand", "reason"),
    "sd3": ("generate",),
}
ALIKE = [
    *(("emu3", cell) for cell in CELLS),
    ("mmada", "generate"),
    ("mmada", THINK),
    *((name, "reason") for name in SECTIONS),
]
"""Policies with the code of another, tasks with the kinds of segments of another: not every objective again."""
OBJECTIVES = {
    "text": ("grpo", "gspo", "cispo", "dpo", "best_of"),
    "tokens": ("grpo", "gspo", "cispo", "dpo", "best_of"),
    "masked": ("grpo", "gspo", "cispo", "dpo", "best_of"),
    "flow": ("nft", "awm", "flow_grpo", "dpo", "best_of"),
}
RECORDED = ("rollout.sampler=flow_sde", "rollout.window={kind: full}")
"""For flow_grpo, which scores recorded steps."""
SCORES: dict[str, tuple[str, ...]] = {
    "spread:Spread": CELLS,
    "exact_answer": ("understand", "reason", THINK),
    "scene_facts": ("generate", "edit", THINK),
    "self_vqa": ("generate", "edit", THINK),
    "caption_back": ("generate",),
    "agreement": ("understand", "reason", THINK),
    "semantic": ("generate", THINK),
    "edit_consistency": ("edit",),
}
"""The tasks whose prompts a reward scores."""
BLIND = ("sd3",)
"""Policies without a understanding side, which rewards of ``ASK_READER`` need."""
ASK_READER = ("self_vqa", "caption_back", "agreement", "semantic")


@pytest.fixture(scope="module", autouse=True)
def images_alone() -> Iterator[None]:
    """See ``without_videos``."""
    with without_videos():
        yield


def section_of(name: str, cell: str) -> str:
    """Of the objective that a cell is about."""
    return SECTIONS[name][-1 if cell in ("generate", "edit", THINK) else 0]


def overrides(name: str, folder: Path, cell: str, reward: str, kind: str | None = None) -> list[str]:
    """One prompt of a task, a small group; ``kind``: of the objective of images, else of texts; None: the default."""
    task = "reason" if cell == THINK else cell
    counts = ", ".join(f"{each}: {int(each == task)}" for each in TASKS)
    answers = "reason/sum: 0, reason/compare: 0" if cell == THINK else "reason/draw_answer: 0"
    section = section_of(name, cell)
    given = {each: "{}" for each in SECTIONS[name] if each != "flow"}
    if kind is not None:
        given[section] = f"{{kind: {kind}}}"
    return [
        f"policy={folder}",
        "device=cpu",
        f"data.prompts_per_step={{{counts}}}",
        "rollout.group_size=4",
        *(["rollout.max_new_tokens=3"] if "text" in SECTIONS[name] else []),
        *(["rollout.num_steps=2"] if SECTIONS[name][-1] in ("flow", "masked") else []),
        *(RECORDED if kind == "flow_grpo" else ()),
        *(f"{each}={value}" for each, value in given.items()),
        f"rewards=[{{name: '{reward}'}}]",
        "allow_code=[spread]",
        "optimizer={kind: adamw, adamw_lr: 1e-3, warmup_steps: 0}",
        f"validation.prompts={{{counts}}}",
        *(["rollout.image_size=[32, 32]"] if name == "sd3" else []),
        f"data.scenes.weights={{{answers}}}",
        *(["rollout.temperature=10"] if name == "tiny" else []),  # whose answers would all be the same
    ]


def outputs(trajectory: Trajectory) -> tuple[object, ...]:
    """Whose it is, and the objects that a reward scores."""
    drawn = [s.text if isinstance(s, TextSegment) else s.image for s in trajectory.segments]
    return trajectory.prompt.id, trajectory.member, trajectory.seed, *map(id, drawn)


def train_one_step(settings: list[str]) -> bool | InputError:
    """Whether weights moved, or why the configuration is refused; what fails later is raised."""
    try:
        config = load_config(TrainConfig, None, settings)
        allow_code(config.allow_code)
        parts = open_components(config)
        require_judge(config, parts)
        policy, _ = open_policy(config)
        state = TrainState.start(policy, config)
    except InputError as error:
        return error
    announced: list[Trajectory] = []
    with listening(announced.extend):
        groups = rollout(state.policies, prompts_of_step(parts.source, config, 0), config, 0, None)
    if not issubclass(type(policy), TokenPolicy):
        assert sorted(map(outputs, announced)) == sorted(outputs(t) for group in groups for t in group.trajectories)
    with state.policies.use("judge") as judge:
        table = score_groups(parts.rewards, groups, judge)
    advantages = segment_advantages(table, groups, config.advantages)
    objectives = objectives_of(config, policy.segment_kinds)
    before = [p.detach().clone() for p in policy.parameters()]
    train_step(state.policies, objectives, state.optimizers, groups, advantages, config, 0)
    moved = any(not torch.equal(p, q) for p, q in zip(before, policy.parameters(), strict=True))
    return moved


@pytest.mark.filterwarnings("ignore:semantic. of texts:UserWarning")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", SECTIONS)
def test_a_step_is_trained_or_the_configuration_is_refused(
    name: str, cell: str, small_base: Path, family_folder: Callable[[str], Path]
) -> None:
    folder = small_base if name == "tiny" else family_folder(name)
    kinds = OBJECTIVES[section_of(name, cell)] if cell in CAN[name] and (name, cell) not in ALIKE else ()
    for reward, kind in [*((reward, None) for reward in SCORES), *(("spread:Spread", kind) for kind in kinds)]:
        found = train_one_step(overrides(name, folder, cell, reward, kind))
        works = cell in CAN[name] and cell in SCORES[reward] and not (name in BLIND and reward in ASK_READER)
        assert isinstance(found, bool) == works, (reward, kind, found)
        if isinstance(found, InputError):
            assert "\n" not in str(found)
        elif reward == "spread:Spread":
            assert found, (reward, kind)
