from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lvrpo.config import load_config
from lvrpo.errors import InputError
from lvrpo.rewards.identity import judge_identity, standing_in
from lvrpo.rewards.table import RewardConfig, build_rewards, score_groups
from lvrpo.training.checkpoint import load_state
from lvrpo.training.config import TrainConfig
from lvrpo.training.judge import Judge, JudgeConfig, judge_drift, known_answers, refresh_questions
from lvrpo.training.run import Alignment
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import RunState
from lvrpo.types import Fact, Prompt

PICTURE = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(3))
QUESTIONS = [Prompt(f"q{i}", "understand", (PICTURE * (i + 1) / 4, "what is it"), ("text",), "red") for i in range(4)]


def shifted(policy: Any, size: float, seed: int = 0) -> Any:
    """A copy with every weight moved a little."""
    twin, generator = policy.frozen(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))
    return twin


def surer(policy: Any, sign: float) -> Any:
    """A copy that is more (less) sure of the answer "red"."""
    twin = policy.frozen().requires_grad_(True)
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


def test_the_reference_judges_unless_told_otherwise(lively_policy: Any) -> None:
    state = RunState.start(lively_policy(), TrainConfig())
    assert state.judge is None
    assert state.policies.judge is state.policies.reference
    assert "judge" not in state._tree()


def test_a_better_candidate_is_taken_and_a_worse_one_refused(lively_policy: Any) -> None:
    policy = lively_policy()
    judge = Judge.start(policy.frozen(), JudgeConfig(refresh_every=2))
    better, worse = surer(policy, 1.0), surer(policy, -1.0)
    assert judge.after_step(1, policy, better, QUESTIONS) == {"judge/version": 0}
    row = judge.after_step(2, policy, worse, QUESTIONS)
    assert (row["judge/action"], row["judge/version"], judge.refused) == ("refused", 0, 1)
    assert row["judge/candidate_held_out"] < row["judge/held_out"]
    assert torch.equal(weights(judge.policy), weights(policy))
    row = judge.after_step(4, policy, better, QUESTIONS)
    assert row["judge/action"] == f"refreshed: {judge_identity(better)}"
    assert row["judge/version"] == 1
    assert torch.equal(weights(judge.policy), weights(better))
    with torch.no_grad():
        next(iter(better.parameters())).add_(1)
    assert judge_identity(judge.policy) != judge_identity(better)  # a copy: what it came from moves on without it


def test_a_candidate_without_numbers_is_refused(lively_policy: Any) -> None:
    policy = lively_policy()
    judge, broken = Judge.start(policy, JudgeConfig(refresh_every=1)), policy.frozen()
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(torch.nan)
    assert judge.after_step(1, policy, broken, QUESTIONS)["judge/action"] == "refused"


def test_a_slow_average_follows_the_live_weights_and_waits_for_the_guard(lively_policy: Any) -> None:
    policy = lively_policy()
    live = shifted(policy, 0.1)
    moving = Judge.start(policy, JudgeConfig(kind="average", decay=0.9))
    moving.after_step(1, live, live, [])
    expected = 0.9 * weights(policy) + 0.1 * weights(live)
    torch.testing.assert_close(weights(moving.policy), expected)
    assert moving.version == 1
    guarded = Judge.start(policy, JudgeConfig(kind="average", decay=0.9, refresh_every=2))
    guarded.after_step(1, live, live, QUESTIONS)
    assert torch.equal(weights(guarded.policy), weights(policy))
    torch.testing.assert_close(weights(guarded.slow), expected)


def test_known_answers_are_probabilities(lively_policy: Any) -> None:
    found = known_answers(lively_policy(), QUESTIONS)
    assert found.shape == (4,)
    assert bool(((found > 0) & (found < 1)).all())


def test_a_refresh_needs_questions_with_answers() -> None:
    with pytest.raises(InputError, match="only 1 held-out questions with answers decide"):
        refresh_questions(JudgeConfig(refresh_every=3), {"understand": QUESTIONS[:1]})
    assert refresh_questions(JudgeConfig(), {}) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["judge.decay=0.5"], "is of the slow average"),
        (["judge.kind=live"], "judge.kind"),
        (["judge.refresh_every=0"], "judge.refresh_every"),
        (["judge.kind=average", "rewards=[{name: own_vqa, options: {gate: tiny}}]"], "the judge moves"),
        (["judge.refresh_every=5", "rewards=[{name: learned_preference, options: {head: x}}]"], "the judge moves"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(TrainConfig, None, overrides)


def test_drift_is_what_the_live_policy_would_say_otherwise(lively_policy: Any, bench: Any) -> None:
    policy = lively_policy()
    prompt = Prompt("g", "generate", ("red circle",), ("image",), facts=(Fact("color", "is it red", "blue"),))
    groups = bench.sample([prompt])
    rewards = build_rewards([RewardConfig(name="own_vqa"), RewardConfig(name="text_length", options={"limit": 3})])
    judge = policy.frozen()
    table = score_groups(rewards, groups, judge)
    assert judge_drift(rewards, groups, table, judge, policy) == {}
    live = shifted(policy, 0.05)
    drift = judge_drift(rewards, groups, table, judge, live)
    own = score_groups(rewards, groups, live)
    assert set(drift) == {"judge_drift/generate/own_vqa", "judge_agreement/generate/own_vqa"}
    expected = float((own.scores[..., 0] - table.scores[..., 0]).mean())
    assert drift["judge_drift/generate/own_vqa"] == pytest.approx(expected, rel=1e-5)
    assert -1 <= drift["judge_agreement/generate/own_vqa"] <= 1


def test_a_stand_in_passes_for_the_judge(lively_policy: Any) -> None:
    policy = lively_policy()
    with standing_in("somebody"):
        assert judge_identity(policy) == "somebody"
    assert judge_identity(policy) != "somebody"


SMALL = (
    "steps=6",
    "data.prompts_per_step={generate: 2, understand: 4}",
    "rollout={group_size: 4, num_steps: 4}",
    "rewards=[{name: exact_answer}, {name: own_vqa}]",
    "advantages.std_floor=1e-4",
    "guard={every: 6, prompts: {understand: 8}}",
    "checkpoint_every=1",
    "keep_checkpoints=9",
    "device=cpu",
)


@pytest.mark.parametrize("kind", ["reference", "average"])
def test_a_resumed_run_has_the_same_judge_bit_for_bit(small_base: Path, kind: str) -> None:
    moving = ["judge.refresh_every=2", f"judge.kind={kind}", "judge.drift_every=1"]
    config = load_config(TrainConfig, None, [f"policy={small_base}", *SMALL, *moving])
    runs = Path("straight"), Path("halved")
    for run, halves in zip(runs, ([6], [3, 6]), strict=True):
        for i, stop in enumerate(halves):
            alignment = Alignment.resume(run) if i else Alignment.start(config, run)
            seen: list[int] = []
            with alignment.run:
                alignment.go(lambda row: seen.append(int(row["step"])), lambda: bool(seen) and seen[-1] >= stop)  # noqa: B023
            assert seen[-1] == stop
    rows = [
        [{k: v for k, v in r.items() if "seconds" not in k} for r in RunDirectory.read(run).metrics()] for run in runs
    ]
    assert rows[0] == rows[1]
    actions = [row["judge/action"].split(":")[0] for row in rows[0] if "judge/action" in row]
    assert len(actions) == 3
    assert set(actions) <= {"refreshed", "refused"}
    assert rows[0][-1]["judge/version"] == actions.count("refreshed")
    assert any(key.startswith("judge_drift/") for key in rows[0][-1])
    trees = [load_state(run / "checkpoints" / "step_000006" / "state")["judge"] for run in runs]
    assert trees[0]["policy"].keys() == trees[1]["policy"].keys()
    assert all(torch.equal(trees[0]["policy"][name], trees[1]["policy"][name]) for name in trees[0]["policy"])
    assert ("slow" in trees[0]) == (kind == "average")
