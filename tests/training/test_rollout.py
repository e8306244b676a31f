from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
import torch
from weight_sets import sets_of

from lvrpo.rewards.base import Scores
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import score_groups
from lvrpo.sampling import compressed_grid
from lvrpo.training.config import TrainConfig
from lvrpo.training.policies import Policies
from lvrpo.training.rollout import RESAMPLE_OFFSET, Rollouts, prompts_of_step, resample
from lvrpo.types import Group, Prompt, TaskKind, TextSegment, Trajectory


@dataclass
class Source:
    """Prompts that are called by their place."""

    tasks: tuple[TaskKind, ...] = ("understand", "reason")

    def prompt(self, task: TaskKind, index: int) -> Prompt:
        return Prompt(f"{task}/{index}", task, ("?",), ("text",))


@dataclass
class Writer:
    """A policy that only samples; its texts are its name."""

    name: str
    calls: list[str] = field(default_factory=list)
    writes = ("text", "flow")

    def sample(self, prompts: Sequence[Prompt], sampling: Any, seeds: Sequence[int]) -> list[Group]:
        self.calls += [prompt.id for prompt in prompts]
        none = torch.zeros(0)
        return [
            Group(
                prompt,
                tuple(
                    Trajectory(prompt, g, (TextSegment(none, none, 1.0, self.name, True),), seed + g)
                    for g in range(sampling.group_size)
                ),
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]


class EveryThird:
    """Every third prompt spreads, by its index; the others score 1 throughout."""

    def applies(self, prompt: Prompt) -> bool:
        return True

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        rows = []
        for group in groups:
            alive = int(group.prompt.id.split("/")[1]) % 3 == 0
            rows.append([float(not alive or g % 2) for g in range(len(group))])
        return Scores(torch.tensor(rows))


def policies() -> Policies:
    return sets_of(**{name: Writer(name) for name in ("policy", "old", "reference", "judge")})


def config(**rollout: Any) -> TrainConfig:
    counts = {"understand": 6, "reason": 3, "generate": 0, "edit": 0}
    tree = {"data": {"prompts_per_step": counts}, "rollout": {"group_size": 4} | rollout}
    if rollout.get("sample_from") == "reference":
        tree |= {"text": {"kind": "dpo"}, "flow": {"kind": "dpo"}}
    return TrainConfig.model_validate(tree)


JUDGE: Any = Writer("judge")
REWARDS = [ConfiguredReward(RewardConfig(name="every_third"), EveryThird())]


def step_of(settings: TrainConfig, step: int = 0) -> tuple[list[Group], Any, dict[str, float]]:
    live = policies()
    rollouts = Rollouts(live, settings)
    groups = rollouts.groups(prompts_of_step(Source(), settings, step), step)
    table = score_groups(REWARDS, groups, JUDGE)
    return resample(rollouts, Source(), REWARDS, groups, table, step)


def dead(table: Any) -> int:
    return int((table.scores[..., 0].std(dim=1) == 0).sum())


def test_groups_without_signal_are_drawn_again_until_all_have_it() -> None:
    groups, table, counts = step_of(config(max_resamples=100))
    assert dead(table) == 0
    assert [group.prompt.task for group in groups] == ["understand"] * 6 + ["reason"] * 3
    assert len({group.prompt.id for group in groups}) == 9
    assert groups[0].prompt.id == "understand/0"  # what had signal stays
    assert groups[3].prompt.id == "understand/3"
    assert counts["refill/given_up"] == 0
    # four of six and two of three had none; fresh prompts come in turn, one in three of them has signal
    fresh = sorted(
        int(g.prompt.id.split("/")[1]) - RESAMPLE_OFFSET
        for g in groups
        if int(g.prompt.id.split("/")[1]) >= RESAMPLE_OFFSET
    )
    assert all((RESAMPLE_OFFSET + i) % 3 == 0 for i in fresh)
    assert counts["refill/drawn"] >= 6
    for p, group in enumerate(groups):
        again = score_groups(REWARDS, [group], JUDGE)
        assert torch.equal(again.scores[0], table.scores[p])


def test_what_the_budget_did_not_reach_is_counted() -> None:
    _, table, counts = step_of(config(max_resamples=2))
    assert counts["refill/drawn"] == 2
    assert counts["refill/given_up"] == dead(table) > 0
    whole = step_of(config())
    assert whole[2] == {"refill/drawn": 0.0, "refill/given_up": 6.0}


def test_refills_are_a_function_of_the_step() -> None:
    def ids(step: int) -> list[str]:
        return [group.prompt.id for group in step_of(config(max_resamples=20), step)[0]]

    assert ids(3) == ids(3)
    drawn = [{i for i in ids(step) if int(i.split("/")[1]) >= RESAMPLE_OFFSET} for step in range(4)]
    assert all(drawn)
    assert len(set.union(*drawn)) == sum(map(len, drawn))  # no two steps share a refill


def test_no_outputs_are_drawn_twice_though_a_small_file_repeats_its_prompts() -> None:
    class Small(Source):
        def prompt(self, task: TaskKind, index: int) -> Prompt:
            return super().prompt(task, index % 4)

    settings = config(max_resamples=12)
    rollouts = Rollouts(policies(), settings)
    groups = rollouts.groups(prompts_of_step(Small(), settings, 0), 0)
    seeds = {group.trajectories[0].seed for group in groups}
    found, _, counts = resample(rollouts, Small(), REWARDS, groups, score_groups(REWARDS, groups, JUDGE), 0)
    assert counts["refill/drawn"] > 4
    fresh = [group.trajectories[0].seed for group, before in zip(found, groups, strict=True) if group is not before]
    assert len(fresh) == len(set(fresh)) > 0
    assert not seeds & set(fresh)


def test_a_failed_score_keeps_its_reason_where_the_group_stays() -> None:
    class Failing(EveryThird):
        def score(self, groups: Sequence[Group], judge: Any) -> Scores:
            values = super().score(groups, judge).values
            failures = {(p, 0): f"no {g.prompt.id}" for p, g in enumerate(groups)}
            return Scores(values, failures)

    rewards = [ConfiguredReward(RewardConfig(name="every_third"), Failing())]
    settings, live = config(max_resamples=3), policies()
    rollouts = Rollouts(live, settings)
    groups = rollouts.groups(prompts_of_step(Source(), settings, 0), 0)
    groups, table, _ = resample(rollouts, Source(), rewards, groups, score_groups(rewards, groups, JUDGE), 0)
    assert {cell[0] for cell in table.reasons} == set(range(9))
    for (p, g, _), reason in table.reasons.items():
        assert g == 0
        assert reason == f"failed: no {groups[p].prompt.id}"
        assert not table.mask[p, 0, 0]


def test_the_reference_samples_a_pool_once() -> None:
    settings, sets = config(sample_from="reference", pool=2), policies()
    rollouts = Rollouts(sets, settings)
    seen = []
    for step in range(5):
        prompts = prompts_of_step(Source(), settings, step)
        seen.append(rollouts.groups(prompts, step))
    assert seen[0] is seen[2] is seen[4]
    assert seen[1] is seen[3]
    assert seen[0][0].prompt.id == "understand/0"
    assert seen[1][0].prompt.id == "understand/6"
    assert {t.text for groups in seen for g in groups for t in g.trajectories} == {"reference"}
    with sets.use("reference") as reference:
        assert len(cast(Writer, reference).calls) == 18
    again = Rollouts(policies(), settings).groups(prompts_of_step(Source(), settings, 3), 3)
    assert [t.seed for g in again for t in g.trajectories] == [t.seed for g in seen[1] for t in g.trajectories]


def test_a_pool_with_on_policy_sampling_repeats_prompts_but_not_outputs() -> None:
    settings = config(pool=2)
    rollouts = Rollouts(policies(), settings)
    one, other = (rollouts.groups(prompts_of_step(Source(), settings, step), step) for step in (0, 2))
    assert [g.prompt.id for g in one] == [g.prompt.id for g in other]
    assert one[0].trajectories[0].seed != other[0].trajectories[0].seed


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"rollout": {"sample_from": "reference"}}, "text.kind=grpo learns from its own outputs only"),
        ({"rollout": {"sample_from": "reference"}, "text": {"weight": 0.0}}, "flow.kind=nft learns from its own"),
        (
            {
                "rollout": {"sample_from": "reference", "max_resamples": 1},
                "text": {"kind": "dpo"},
                "flow": {"kind": "dpo"},
            },
            "max_resamples needs fresh outputs",
        ),
        ({"rollout": {"image_guidance_scale": 2.0}}, "has no effect while rollout.guidance_scale=1"),
        ({"flow": {"ratio": "guard"}}, "flow.nft.ratio"),
        ({"flow": {"kl": "gaussian"}}, "flow.nft.kl"),
        ({"flow": {"kind": "best_of", "top_k": 8}}, "flow.top_k=8: the best of rollout.group_size=8 are fewer"),
        ({"rollout": {"guidance_interval": [0.9, 0.1]}}, "must be .low, high. with 0 <= low < high <= 1"),
        ({"rollout": {"window": {"steps_after": 3}}}, "steps_after=3: rollout.sampler=ode does not use it"),
        (
            {"rollout": {"sampler": "cps", "window": {"steps_after": 8}}, "flow": {"kind": "flow_grpo"}},
            "steps_after=8: must be less than rollout.num_steps=8",
        ),
        (
            {"rollout": {"sampler": "cps", "noise_level": 1.2}, "flow": {"kind": "flow_grpo"}},
            "noise_level=1.2: must be at most 1",
        ),
        ({"text": {"kind": "dpo", "importance_cap": 2.0}}, "text.dpo.importance_cap"),
        ({"num_minibatches": 500}, "a step has only"),
        ({"text": {"weight": 0.0}, "flow": {"weight": 0.0}}, "nothing would be trained"),
        (
            {"task_weights": dict.fromkeys(["generate", "understand", "edit", "reason"], 0.0)},
            "nothing would be trained",
        ),
        (
            {"rewards": [{"name": "exact_answer", "tasks": ["understand"]}]},
            "data.prompts_per_step.generate=28: every reward is for other tasks only",
        ),
        (
            {"rewards": [{"name": "exact_answer"}, {"name": "./rules.py:success"}]},
            "rewards.success: metrics .* call verified success by this name: give the reward another label",
        ),
        (
            {"advantages": {"kind": "grpo", "joint": ["generate", "understand"]}},
            "name two tasks with as many prompts each",
        ),
        (
            {
                "advantages": {"kind": "grpo", "joint": ["generate", "edit"]},
                "data": {"prompts_per_step": {"understand": 8}},
            },
            "name two tasks with as many prompts each",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sections_that_do_not_fit(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.model_validate(tree)


@pytest.mark.parametrize("tree", [{"flow": {"weight": 0.0}}, {"data": {"prompts_per_step": {"understand": 8}}}])
def test_image_settings_are_not_checked_without_image_training(tree: dict[str, Any]) -> None:
    settings = tree | {"rollout": {"guidance_scale": 2.0, "sampler": "flow_sde"}}
    assert TrainConfig.model_validate(settings).flow.kind == "nft"
    with pytest.raises(ValueError, match=r"flow\.kind=nft"):
        TrainConfig.model_validate({"rollout": settings["rollout"]})


@pytest.mark.parametrize("kind", ["full", "fast", "sliding", "random", "decaying"])
@pytest.mark.parametrize("after", [1, 4, 7])
def test_steps_after_a_window_fit_wherever_it_is(kind: str, after: int) -> None:
    window: dict[str, Any] = {"kind": kind, "steps_after": after}
    if kind != "full":
        window["size"] = 2
    if kind in ("sliding", "decaying"):
        window["iterations_per_stride"] = 3
    rollout = TrainConfig.model_validate(
        {"rollout": {"sampler": "flow_sde", "window": window, "num_steps": 8}, "flow": {"kind": "flow_grpo"}}
    ).rollout
    lengths = set()
    for step in range(140):
        sampling = rollout.sampling(0, step)
        end = sampling.window[-1] + 1
        assert sampling.steps_after_window == min(after, 8 - end)
        lengths.add(len(compressed_grid(8, end, sampling.steps_after_window)) - 1)
    assert max(lengths) <= 8


def test_a_prompt_that_a_small_file_repeats_gets_other_outputs() -> None:
    settings = config()
    prompts = [Source().prompt("understand", 0), Source().prompt("reason", 1), Source().prompt("understand", 0)]
    first, other, again = Rollouts(policies(), settings).groups(prompts, 0)
    assert first.prompt.id == again.prompt.id
    assert len({group.trajectories[0].seed for group in (first, other, again)}) == 3
    (alone,) = Rollouts(policies(), settings).groups(prompts[:1], 0)
    assert alone.trajectories[0].seed == first.trajectories[0].seed  # the repeat moves nothing else
