from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import killed_copy, stored
from weight_sets import sets_of

from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.records import Metrics
from lvrpo.report.charts import other_charts
from lvrpo.rewards.base import judge_fingerprint, override_fingerprint
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.rewards.verifiable_text import ExactAnswer
from lvrpo.training.config import TrainConfig
from lvrpo.training.judge import (
    NUM_DRAWS,
    JudgeConfig,
    JudgeRefresh,
    JudgeRows,
    answer_probability,
    build_judge_rows,
    description_posterior,
    judge_drift,
    judge_questions,
    require_judge_used,
)
from lvrpo.training.policies import Policies
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import TrainState
from lvrpo.training.trainer import Trainer
from lvrpo.types import Example, Fact, Image, Parts, Prompt

IMAGE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))
QUESTIONS = [Prompt(f"q{i}", "understand", (IMAGE * (i + 1) / 4, "what is it"), ("text",), "red") for i in range(4)]


def shifted(policy: Any, size: float, seed: int = 0) -> Any:
    """A copy with every weight moved a little."""
    twin, generator = policy.make_reference(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return twin


def surer(policy: Any, sign: float) -> Any:
    """A copy that is more (less) sure of the answer "red"."""
    twin = policy.make_reference().requires_grad_(True)
    loss = -twin.text_logprob.__wrapped__(twin, [q.parts for q in QUESTIONS], ["red"] * 4).mean()
    loss.backward()
    with torch.no_grad():
        for p in twin.parameters():
            if p.grad is not None:
                p.sub_(sign * 0.05 * p.grad)
                p.grad = None
    return twin.requires_grad_(False)


def weights(policy: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def put(policies: Policies, name: str, policy: Any) -> None:
    """The weights of a policy become a set."""
    with torch.no_grad():
        for key, tensor in policies.weights[name].items():
            tensor.copy_(dict(policy.named_parameters())[key])


def kept(policies: Policies, name: str) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in policies.weights[name].values()])


def test_the_reference_is_the_default_judge(lively_policy: Any) -> None:
    state = TrainState.start(lively_policy(), TrainConfig())
    assert state.judge is None
    assert not state.policies.has("judge")
    put(state.policies, "policy", shifted(lively_policy(), 0.1))
    with state.policies.use("judge") as judge:
        assert torch.equal(weights(judge), weights(lively_policy()))
    assert "judge" not in state._tree()


def test_a_better_candidate_is_taken_and_a_worse_one_refused(lively_policy: Any) -> None:
    policy = lively_policy()
    judge, policies = JudgeRefresh(JudgeConfig(refresh_every=2)), Policies(lively_policy(), ["judge"])
    better, worse = surer(policy, 1.0), surer(policy, -1.0)
    put(policies, "ema", better)
    assert judge.update(1, policies, JudgeRows(QUESTIONS)) == {"judge/version": 0}
    put(policies, "ema", worse)
    row = judge.update(2, policies, JudgeRows(QUESTIONS))
    assert (row["judge/action"], row["judge/version"], judge.refused) == ("refused", 0, 1)
    assert row["judge/candidate_held_out"] < row["judge/held_out"]
    assert torch.equal(kept(policies, "judge"), weights(policy))
    put(policies, "ema", better)
    row = judge.update(4, policies, JudgeRows(QUESTIONS))
    assert row["judge/action"] == f"refreshed: {judge_fingerprint(better)}"
    assert row["judge/version"] == 1
    assert torch.equal(kept(policies, "judge"), weights(better))
    put(policies, "ema", worse)
    assert torch.equal(kept(policies, "judge"), weights(better))  # a copy: what it came from moves on without it


def test_a_candidate_without_numbers_is_refused(lively_policy: Any) -> None:
    policies = Policies(lively_policy(), ["judge"])
    next(iter(policies.weights.sets["ema"].values())).fill_(torch.nan)
    assert (
        JudgeRefresh(JudgeConfig(refresh_every=1)).update(1, policies, JudgeRows(QUESTIONS))["judge/action"]
        == "refused"
    )


def test_a_slow_ema_follows_the_policy_and_is_refreshed_after_the_check(lively_policy: Any) -> None:
    policy = lively_policy()
    live = shifted(policy, 0.1)
    expected = 0.9 * weights(policy) + 0.1 * weights(live)

    def followed(**guarded: Any) -> tuple[JudgeRefresh, Policies]:
        judge = JudgeRefresh(JudgeConfig(kind="average", decay=0.9, **guarded))
        policies = Policies(lively_policy(), judge.sets)
        put(policies, "policy", live)
        judge.update(1, policies, JudgeRows(QUESTIONS))
        return judge, policies

    judge, policies = followed()
    torch.testing.assert_close(kept(policies, "judge"), expected)
    assert judge.version == 1
    judge, policies = followed(refresh_every=2)
    assert torch.equal(kept(policies, "judge"), weights(policy))
    torch.testing.assert_close(kept(policies, "judge_ema"), expected)


def test_known_answers_are_probabilities(lively_policy: Any) -> None:
    found = answer_probability(lively_policy(), QUESTIONS)
    assert found.shape == (4,)
    assert bool(((found > 0) & (found < 1)).all())


def test_a_refresh_needs_questions_with_answers() -> None:
    with pytest.raises(InputError, match="only 1 held-out questions with answers decide"):
        judge_questions(JudgeConfig(refresh_every=3), {"understand": QUESTIONS[:1]})
    assert judge_questions(JudgeConfig(), {}) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge.decay=0.5"], "applies to the slow average"),
        (["judge.kind=live"], "judge.kind"),
        (["judge.refresh_every=0"], "judge.refresh_every"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, None, overrides)


def test_drift_is_the_difference_of_policy_and_judge_scores(lively_policy: Any, bench: Any) -> None:
    policy = lively_policy()
    prompt = Prompt("g", "generate", ("red circle",), ("image",), facts=(Fact("color", "is it red", "blue"),))
    groups = bench.sample([prompt])
    rewards = build_rewards([RewardConfig(name="self_vqa"), RewardConfig(name="text_length", options={"limit": 3})])
    judge = policy.make_reference()
    table = score_groups(rewards, groups, judge)
    assert judge_drift(rewards, groups, table, sets_of(policy=policy)) == {}
    live = shifted(policy, 0.05)
    drift = judge_drift(rewards, groups, table, sets_of(policy=live))
    own = score_groups(rewards, groups, live)
    assert set(drift) == {"judge_drift/generate/self_vqa", "judge_agreement/generate/self_vqa"}
    expected = float((own.scores[..., 0] - table.scores[..., 0]).mean())
    assert drift["judge_drift/generate/self_vqa"] == pytest.approx(expected, rel=1e-5)
    assert -1 <= drift["judge_agreement/generate/self_vqa"] <= 1
    charts = other_charts(Metrics(({"step": 20, **drift},)))  # the report shows both
    assert [group.title for group in charts] == ["judge drift", "judge agreement"]


# --- the generation side ---

DRAWN = ("a cat", "a dog", "a cat", "a cow")


def drawing(i: int, category: str = "") -> Example:
    """The i-th description with an image of level i / 10."""
    prompt = Prompt(f"d{i}", "generate", (DRAWN[i],), ("image",), category=category)
    return Example(prompt, (torch.full((3, 4, 4), i / 10),))


class Drawer(torch.nn.Module):
    """A policy of known likelihoods: ``sure`` nats for an image after its own words, and a common noise per seed."""

    def __init__(self, answers: float, sure: float, noise: float = 1.0) -> None:
        super().__init__()
        self.answers, self.noise = answers, noise
        self.weight = torch.nn.Parameter(torch.tensor(sure))
        self.seeds: list[int] = []

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        return torch.full((len(texts),), self.answers).log()

    def image_logprob(
        self, contexts: Sequence[Parts], images: Sequence[Image], draws: int, seeds: Sequence[int]
    ) -> torch.Tensor:
        self.seeds += seeds
        own = torch.tensor(
            [
                float(context[0] == DRAWN[round(10 * float(image.mean()))])
                for context, image in zip(contexts, images, strict=True)
            ]
        )
        common = torch.tensor([[seed % 97 + k for k in range(draws)] for seed in seeds]) * self.noise
        return own[:, None] * self.weight.detach() + common


def test_the_share_of_the_right_description_by_hand() -> None:
    images = [drawing(i) for i in range(4)]
    drawer = Drawer(0.5, sure=2.0)
    found = description_posterior(drawer, images)  # type: ignore[arg-type]  # a double
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(-2.0))] * 4)
    assert drawer.seeds[:4] == drawer.seeds[4:]  # both texts meet the same noise
    assert len(set(drawer.seeds)) == 4
    blind = description_posterior(Drawer(0.5, sure=0.0), images)  # type: ignore[arg-type]
    assert blind.tolist() == pytest.approx([0.5] * 4)
    assert NUM_DRAWS > 1


def test_the_other_description_is_of_the_same_category_where_there_is_one() -> None:
    asked: list[tuple[str, ...]] = []

    class Listener(Drawer):
        def image_logprob(self, contexts: Sequence[Parts], *rest: Any, **more: Any) -> torch.Tensor:
            asked.append(tuple(str(context[0]) for context in contexts))
            return super().image_logprob(contexts, *rest, **more)

    description_posterior(Listener(0.5, 1.0), [drawing(0, "x"), drawing(1, "y"), drawing(2, "x"), drawing(3, "x")])  # type: ignore[arg-type]
    assert asked[0][:4] == DRAWN
    # cat -> cow (dog is of another category, the other cat the same words); dog -> the next; cat -> cow; cow -> cat
    assert asked[0][4:] == ("a cow", "a cat", "a cow", "a cat")


@pytest.mark.parametrize(
    ("answers", "sure", "action"),
    [
        (0.6, 3.0, "refreshed"),
        (0.5, 2.0, "refreshed"),  # no worse
        (0.4, 3.0, "refused"),
        (0.6, 1.0, "refused"),
        (0.6, math.nan, "refused"),
    ],
)
def test_a_candidate_must_be_no_worse_on_either_side(answers: float, sure: float, action: str) -> None:
    held_out = JudgeRows(QUESTIONS, [drawing(i) for i in range(4)])
    judge = JudgeRefresh(JudgeConfig(refresh_every=1))
    row = judge.update(1, sets_of(judge=Drawer(0.5, 2.0), ema=Drawer(answers, sure)), held_out)
    assert row["judge/action"].split(":")[0] == action
    present, proposed = (1 / (1 + math.exp(-x)) for x in (2.0, sure))
    assert (row["judge/held_out"], row["judge/candidate_held_out"]) == pytest.approx((0.5, answers))
    assert row["judge/held_out_generation"] == pytest.approx(present)
    assert row["judge/candidate_held_out_generation"] == pytest.approx(proposed, nan_ok=True)
    assert (judge.version, judge.refused) == ((1, 0) if action == "refreshed" else (0, 1))


def test_only_the_sides_that_rewards_ask_decide() -> None:
    config, prompts = JudgeConfig(refresh_every=2), {"understand": QUESTIONS}

    class Likely(ExactAnswer):
        """A reward that asks the generation side, as anybody's may."""

        sides = ("draw",)

    drawn = ConfiguredReward(RewardConfig(name="likely"), Likely())

    def rows(*rewards: ConfiguredReward) -> JudgeRows:
        return build_judge_rows(config, rewards, prompts, lambda: [drawing(i) for i in range(4)])

    read, rule = (build_rewards([RewardConfig(name=name)])[0] for name in ("self_vqa", "exact_answer"))
    both = rows(read, drawn)
    assert (len(both.questions), len(both.images)) == (4, 4)
    assert not rows(rule, read).images
    assert not rows(drawn).questions
    assert build_judge_rows(JudgeConfig(), [drawn], {}, list) == JudgeRows()
    with pytest.raises(InputError, match="only 0 held-out images with descriptions decide"):
        build_judge_rows(config, [drawn], prompts, list)


# --- which rewards ask the judge ---


def test_settings_of_an_unused_judge_are_refused() -> None:
    rules = build_rewards([RewardConfig(name="exact_answer"), RewardConfig(name="scene_facts")])
    require_judge_used(JudgeConfig(), rules)
    require_judge_used(JudgeConfig(drift_every=0), rules)
    with pytest.raises(InputError, match=r"judge\.drift_every=5: no reward asks the run's judge"):
        require_judge_used(JudgeConfig(drift_every=5), rules)
    with pytest.raises(InputError, match=r"judge\.refresh_every=5: no reward asks"):
        require_judge_used(JudgeConfig(refresh_every=5), rules)
    require_judge_used(JudgeConfig(refresh_every=5), build_rewards([RewardConfig(name="self_vqa")]))


def test_drift_is_measured_at_validations_by_default() -> None:
    assert [JudgeConfig().drift_due(step, looks) for step, looks in ((1, False), (20, True))] == [False, True]
    assert [JudgeConfig(drift_every=2).drift_due(step, False) for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert not JudgeConfig(drift_every=0).drift_due(20, True)


def test_rules_are_not_scored_again_for_drift(lively_policy: Any, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = lively_policy()
    prompt = Prompt("g", "generate", ("red circle",), ("image",), facts=(Fact("color", "is it red", "blue"),))
    groups = bench.sample([prompt])
    rewards = build_rewards([RewardConfig(name="text_length", options={"limit": 3}), RewardConfig(name="self_vqa")])
    table = score_groups(rewards, groups, policy.make_reference())
    monkeypatch.setattr(type(rewards[0].reward), "score", None)
    drift = judge_drift(rewards, groups, table, sets_of(policy=shifted(policy, 0.05)))
    assert "judge_drift/generate/self_vqa" in drift
    monkeypatch.setattr("lvrpo.training.judge.score_local", None)
    assert judge_drift(rewards[:1], groups, table, sets_of(policy=policy)) == {}


def test_a_stand_in_passes_for_the_judge(lively_policy: Any) -> None:
    policy = lively_policy()
    with override_fingerprint("somebody"):
        assert judge_fingerprint(policy) == "somebody"
    assert judge_fingerprint(policy) != "somebody"


SMALL = (
    "steps=6",
    "data.prompts_per_step={generate: 2, understand: 4}",
    "rollout={group_size: 4, num_steps: 4}",
    "rewards=[{name: exact_answer}, {name: self_vqa}]",
    "advantages.std_floor=1e-4",
    "validation={every: 6, prompts: {understand: 8}}",
    "checkpoint_every=1",
    "keep_checkpoints=9",
    "device=cpu",
)


@pytest.mark.parametrize("kind", ["reference", "average"])
def test_a_resumed_run_has_the_same_judge_bit_for_bit(small_base: Path, kind: str) -> None:
    moving = ["judge.refresh_every=2", f"judge.kind={kind}", "judge.drift_every=1"]
    config = load_config(TrainConfig, None, [f"policy={small_base}", *SMALL, *moving])
    straight = Trainer.start(config, Path("straight"))
    with straight.run:
        assert straight.train()
    runs = Path("straight"), killed_copy(Path("straight"), 3)
    again = Trainer.resume(runs[1])
    with again.run:
        assert again.state.step == 3
        assert again.train()
    rows = [
        [{k: v for k, v in r.items() if "seconds" not in k} for r in RunDirectory.read(run).metrics()] for run in runs
    ]
    assert rows[0] == rows[1]
    actions = [row["judge/action"].split(":")[0] for row in rows[0] if "judge/action" in row]
    assert len(actions) == 3
    assert set(actions) <= {"refreshed", "refused"}
    assert rows[0][-1]["judge/version"] == actions.count("refreshed")
    assert any(key.startswith("judge_drift/") for key in rows[0][-1])
    found = [stored(run / "checkpoints" / "step_000006") for run in runs]
    own = {"judge", "judge_ema"} if kind == "average" else {"judge"}
    assert {place for name in found[0] if (place := name.split("/")[0]).startswith("judge")} == own
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
