from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradients_only import differentiate
from settings import FLOW_GRPO

from lvrpo.policies.base import Sampling
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.sampling import normal_noise
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import base
from lvrpo.training.losses.base import KINDS, GroupAdvantages, Metrics
from lvrpo.training.policies import Policies
from lvrpo.types import FlowSegment, Group, Prompt, TextSegment

Gradients = dict[str, torch.Tensor]
SDE = {"sampler": "flow_sde", "num_steps": 4, "window": {"kind": "full"}}


def make_config(text: dict[str, Any] | None = None, flow: dict[str, Any] | None = None, **rest: Any) -> TrainConfig:
    """Only the policy terms: the divergences have coefficient 0 unless given."""
    tree: dict[str, Any] = {"text": text or {}, "flow": flow or {}} | rest
    for section, without in (("text", ("dpo", "best_of")), ("flow", ("dpo",))):
        if tree[section].get("kind") not in without:
            tree[section] = {"kl_coef": 0.0} | tree[section]
    if tree["flow"].get("kind") == "flow_grpo":
        tree.setdefault("rollout", SDE)
    return TrainConfig.model_validate(tree)


NFT = {"kind": "nft", "top_bottom_k": 2, "timesteps_per_sample": 4}


@pytest.fixture
def policies(lively_policy: Callable[..., TinyPolicy]) -> Policies:
    return Policies(lively_policy())


def sample(policies: Policies, prompts: list[Prompt], group_size: int = 4, **changes: Any) -> list[Group]:
    sampling = Sampling(
        group_size, max_new_tokens=5, num_steps=4, timestep_shift=1.0, sampler="flow_sde", window=(0, 1, 2)
    )
    return policies.policy.sample(prompts, replace(sampling, **changes), list(range(len(prompts))))


def run_update(policies: Policies, groups: list[Group], A: Any, config: TrainConfig, step: int = 0) -> Metrics:
    """One advantage per trajectory, for whichever of its segments."""
    advantages = dict.fromkeys(KINDS, GroupAdvantages.all_valid(torch.as_tensor(A, dtype=torch.float32)))
    return differentiate(policies, groups, advantages, config, step)


def gradients(policies: Policies, groups: list[Group], A: Any, config: TrainConfig, step: int = 0) -> Gradients:
    live = policies.policy
    assert isinstance(live, TinyPolicy)
    live.zero_grad(set_to_none=True)
    run_update(policies, groups, A, config, step)
    found = {name: p.grad.clone() for name, p in live.named_parameters() if p.grad is not None}
    live.zero_grad(set_to_none=True)
    return found


def norm(found: Gradients) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in found.values()))


def distance(one: Gradients, other: Gradients, scale: float = 1.0) -> float:
    """Of one and scale * other, relative to one."""
    names = set(one) | set(other)
    zero = torch.zeros(())
    return norm({n: one.get(n, zero) - scale * other.get(n, zero) for n in names}) / norm(one)


def nudge(policies: Policies, seed: int = 0, size: float = 0.01) -> None:
    """Moves the live weights a little."""
    generator = torch.Generator().manual_seed(seed)
    assert isinstance(policies.policy, TinyPolicy)
    with torch.no_grad():
        for p in policies.policy.parameters():
            p.add_(size * torch.randn(p.shape, generator=generator))


def descend(policies: Policies, found: Gradients, rate: float) -> None:
    assert isinstance(policies.policy, TinyPolicy)
    with torch.no_grad():
        for name, p in policies.policy.named_parameters():
            if name in found:
                p.sub_(rate * found[name])


# --- text ---


@pytest.mark.parametrize("reduction", ["token", "trajectory"])
def test_the_text_gradient_at_ratio_1_is_reinforce(reduction: str, policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[:2])
    A = torch.tensor([[1.0, -0.5, 0.0, -0.5], [2.0, 0.25, -1.0, -1.25]])
    config = make_config({"reduction": reduction})
    found = gradients(policies, groups, A, config)

    live = policies.policy
    assert isinstance(live, TinyPolicy)
    replayed = live.logprobs([t for group in groups for t in group.trajectories])
    logprobs = [row[0].logprobs for row in replayed]
    lengths = {len(row) for row in logprobs}
    assert len(lengths) > 1
    if reduction == "token":
        objective = sum(a * row.sum() for a, row in zip(A.flatten(), logprobs, strict=True)) / sum(map(len, logprobs))
    else:
        objective = sum(a * row.mean() for a, row in zip(A.flatten(), logprobs, strict=True)) / len(logprobs)
    assert isinstance(objective, torch.Tensor)
    (-objective).backward()
    by_hand = {name: p.grad.clone() for name, p in live.named_parameters() if p.grad is not None}
    assert norm(by_hand) > 1e-3
    assert distance(by_hand, found) < 1e-5


def test_a_good_answer_becomes_likelier_and_a_bad_one_less(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[:1], temperature=2.0)
    for advantages, sign in (([1.0, 0, 0, 0], 1), ([-1.0, 0, 0, 0], -1)):
        start = policies.policy.make_reference()
        found = gradients(policies, groups, [advantages], make_config())
        descend(policies, found, 1e-3 / norm(found))
        segment = groups[0].trajectories[0].segments[0]
        change = (
            policies.policy.logprobs(groups[0].trajectories[:1])[0][0].logprobs.sum() - segment.behavior_logprobs.sum()
        )
        assert sign * float(change.detach()) > 1e-5
        assert isinstance(policies.policy, TinyPolicy)
        policies.policy.load_state_dict(start.state_dict())  # type: ignore[attr-defined]


def test_a_text_far_off_the_policy_is_clipped(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[:1])
    (group,) = groups

    def shifted(by: float) -> list[Group]:
        trajectories = []
        for trajectory in group.trajectories:
            (segment,) = trajectory.segments
            assert isinstance(segment, TextSegment)
            trajectories.append(
                replace(trajectory, segments=(replace(segment, behavior_logprobs=segment.behavior_logprobs + by),))
            )
        return [replace(group, trajectories=tuple(trajectories))]

    up, down = [[1.0, 1.0, 1.0, 0.5]], [[-1.0, -1.0, -1.0, -0.5]]
    assert norm(gradients(policies, shifted(-0.5), up, make_config())) == 0
    assert norm(gradients(policies, shifted(-0.5), down, make_config())) > 0
    assert norm(gradients(policies, shifted(0.5), down, make_config())) == 0
    assert norm(gradients(policies, shifted(0.5), up, make_config())) > 0


def test_the_text_divergence_pulls_back_once_the_weights_moved(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[:2])
    config, nothing = make_config({"kl_coef": 1.0}), [[1e-9, 0, 0, -1e-9]] * 2
    before = norm(gradients(policies, groups, nothing, config))
    nudge(policies)
    assert before < 1e-6
    found = gradients(policies, groups, nothing, config)
    assert norm(found) > 100 * before

    def divergence() -> float:
        metrics = run_update(policies, groups, nothing, config, 0)
        return metrics.means()["kl/text/understand"]

    start = divergence()
    assert start > 0
    descend(policies, found, 1e-3 / norm(found))
    assert divergence() < start


def test_entropy_bonus_raises_the_entropy(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[:2])
    nothing = [[1e-9, 0, 0, -1e-9]] * 2
    config = make_config({"entropy_coef": 1.0})
    found = gradients(policies, groups, nothing, config)
    before = run_update(policies, groups, nothing, config, 0).means()["entropy/understand"]
    descend(policies, found, 1e-3 / norm(found))
    assert run_update(policies, groups, nothing, config, 0).means()["entropy/understand"] > before


# --- images ---


def latent_loss(policy: Any, group: Group, member: int) -> float:
    """The flow loss of one image, over many times and noises."""
    trajectory = group.trajectories[member]
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    draws = 256
    noise = normal_noise(range(draws), segment.latent.shape)
    t = 0.1 + 0.9 * (torch.arange(draws) + 0.5) / draws
    x_t = (1 - t[:, None, None]) * segment.latent + t[:, None, None] * noise
    with torch.no_grad():
        v = policy.velocity([trajectory] * draws, x_t, t)
    x0 = x_t - t[:, None, None] * v
    return float((x0 - segment.latent).square().mean())


@pytest.mark.parametrize("kind", [NFT, FLOW_GRPO], ids=["nft", "grpo"])
def test_advantage_0_pulls_nowhere_at_first(kind: dict[str, Any], policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[2:5])
    config = make_config(flow=kind)
    pulled = norm(gradients(policies, groups, [[1.0, 0.5, -0.5, -1.0]] * 3, config))
    unmoved = norm(gradients(policies, groups, [[1e-9, 0.0, 0.0, -1e-9]] * 3, config))
    assert pulled > 1e-3
    assert unmoved < 1e-5 * pulled


@pytest.mark.parametrize(("advantages", "member", "sign"), [([1.0, 0.0], 0, -1), ([0.0, -1.0], 1, 1)])
def test_nft_pulls_to_the_good_drawing_and_away_from_the_bad(
    advantages: list[float], member: int, sign: int, policies: Policies, prompts: list[Prompt]
) -> None:
    groups = sample(policies, prompts[2:3], group_size=2, sampler="ode")
    config = make_config(flow={"top_bottom_k": 1, "timesteps_per_sample": 16})
    before = latent_loss(policies.policy, groups[0], member)
    found = gradients(policies, groups, [advantages], config)
    descend(policies, found, 3e-3 / norm(found))
    assert sign * (latent_loss(policies.policy, groups[0], member) - before) > 1e-5


@pytest.mark.parametrize(("advantages", "member", "sign"), [([1.0, 0.0], 0, 1), ([0.0, -1.0], 1, -1)])
@pytest.mark.parametrize("weighting", ["level", "equal"])
def test_grpo_raises_the_density_of_the_good_steps_and_lowers_the_bad(
    advantages: list[float], member: int, sign: int, weighting: str, policies: Policies, prompts: list[Prompt]
) -> None:
    groups = sample(policies, prompts[2:3], group_size=2)
    config = make_config(flow={"kind": "flow_grpo", "top_bottom_k": 1, "step_weighting": weighting})
    found = gradients(policies, groups, [advantages], config)
    descend(policies, found, 1e-3 / norm(found))
    trajectory = groups[0].trajectories[member]
    change = policies.policy.logprobs([trajectory])[0][0].logprobs - trajectory.segments[0].behavior_logprobs
    assert sign * float(change.detach().mean()) > 1e-5


def test_grpo_at_ratio_1_is_reinforce_with_leveled_steps(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[2:4], num_steps=4)
    A = torch.tensor([[1.0, -0.5, 0.25, -0.75], [2.0, 0.5, -1.0, -1.5]])
    found = gradients(policies, groups, A, make_config(flow=FLOW_GRPO))
    live = policies.policy
    assert isinstance(live, TinyPolicy)
    logprobs = torch.stack([row[0].logprobs for row in live.logprobs([t for g in groups for t in g.trajectories])])
    raw = []
    for i, t in enumerate((1.0, 0.75, 0.5)):
        s = 0.7 * math.sqrt(t / (1 - (0.75 if i == 0 else t)))
        raw.append(s * 0.5 / ((0.25 / t) * (1 + s**2 * (1 - t) / (2 * t))))
    weights = torch.tensor(raw) / (sum(raw) / 3)
    (-(A.flatten()[:, None] * weights * logprobs).mean()).backward()
    by_hand = {name: p.grad.clone() for name, p in live.named_parameters() if p.grad is not None}
    assert distance(by_hand, found) < 1e-4


@pytest.mark.parametrize("kind", [NFT, FLOW_GRPO], ids=["nft", "grpo"])
def test_the_velocity_divergence_pulls_back_once_the_weights_moved(
    kind: dict[str, Any], policies: Policies, prompts: list[Prompt]
) -> None:
    groups = sample(policies, prompts[2:3])
    config, nothing = make_config(flow={**kind, "kl_coef": 1.0}), [[1e-9, 0, 0, -1e-9]]
    before = norm(gradients(policies, groups, nothing, config))
    nudge(policies)
    policies.weights.copy("old", "policy")
    found = gradients(policies, groups, nothing, config)
    assert norm(found) > 100 * before
    start = run_update(policies, groups, nothing, config, 0).means()["kl/flow/generate"]
    descend(policies, found, 1e-3 / norm(found))
    assert run_update(policies, groups, nothing, config, 0).means()["kl/flow/generate"] < start


def test_nft_draws_fresh_noise_every_step_and_the_same_when_repeated(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[2:3])
    A, config = [[1.0, 0.5, -0.5, -1.0]], make_config(flow=NFT)
    first, again, later = (gradients(policies, groups, A, config, step) for step in (0, 0, 1))
    assert distance(first, again) == 0
    assert distance(first, later) > 0.01


def test_only_the_best_and_the_worst_are_trained(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[2:3])
    config = make_config(flow={"kind": "flow_grpo", "top_bottom_k": 1})
    kept = gradients(policies, groups, [[1.0, 0.4, -0.4, -1.0]], config)
    other = gradients(policies, groups, [[1.0, -0.2, 0.2, -1.0]], config)
    assert distance(kept, other) == 0
    assert distance(kept, gradients(policies, groups, [[0.4, 1.0, -1.0, -0.4]], config)) > 0.1


# --- both ---


ALL = [[1.0, -0.5, 0.25, -0.75], [0.5, -1.0, 1.5, -1.0], [2.0, 0.5, -1.0, -1.5]] * 2


@pytest.mark.parametrize(
    "config",
    [
        make_config({"reduction": "trajectory", "kl_coef": 0.5}, NFT | {"kl_coef": 0.2}),
        make_config({"reduction": "trajectory", "entropy_coef": 0.1}, FLOW_GRPO | {"kl_coef": 0.2}),
        make_config({"reduction": "token", "kl_coef": 0.5}, NFT),
    ],
    ids=["trajectory-nft", "trajectory-grpo", "token"],
)
def test_micro_batches_do_not_change_gradients(
    config: TrainConfig, policies: Policies, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = sample(policies, [*prompts, *[replace(p, id=f"{p.id}'") for p in prompts]])
    nudge(policies, size=0.003)
    A = ALL * 2
    whole = gradients(policies, groups, A, config)
    reported = run_update(policies, groups, A, config, 0).means()
    monkeypatch.setattr(base, "MICROBATCH_DRAWINGS", 1)
    assert distance(whole, gradients(policies, groups, A, config)) < 1e-4
    split = run_update(policies, groups, A, config, 0).means()
    assert split.keys() == reported.keys()
    exact = [name for name in reported if name.startswith(("loss/", "kl/", "signal/"))]
    assert [split[name] for name in exact] == pytest.approx([reported[name] for name in exact], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", [NFT, FLOW_GRPO], ids=["nft", "grpo"])
def test_groups_without_signal_contribute_nothing(
    kind: dict[str, Any], policies: Policies, prompts: list[Prompt]
) -> None:
    pairs = [prompts[0], prompts[1], prompts[2], prompts[3]]
    groups = sample(policies, pairs)
    config = make_config({"kl_coef": 0.5, "entropy_coef": 0.1}, kind | {"kl_coef": 0.2})
    nudge(policies)
    A, none = [1.0, -0.5, 0.25, -0.75], [0.0] * 4
    some = gradients(policies, groups, [A, none, A, none], config)
    alone = gradients(policies, [groups[0], groups[2]], [A, A], config)
    assert distance(alone, some) < 1e-5
    assert gradients(policies, groups, [none] * 4, config) == {}
    metrics = run_update(policies, groups, [A, none, A, none], config, 0).means()
    assert (metrics["signal/understand"], metrics["signal/generate"]) == (0.5, 0.5)


def test_weights_of_tasks_and_of_kinds(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts)
    plain = gradients(policies, groups, ALL, make_config(flow=NFT))
    parts = {
        task: gradients(policies, [g for g in groups if g.prompt.task == task], rows, make_config(flow=NFT))
        for task, rows in (
            ("understand", ALL[0:2]),
            ("generate", ALL[2:4]),
            ("edit", ALL[4:5]),
            ("reason", ALL[5:6]),
        )
    }

    def mix(**weights: float) -> Gradients:
        out: Gradients = {}
        for task, found in parts.items():
            for name, g in found.items():
                out[name] = out.get(name, torch.zeros(())) + weights.get(task, 1.0) * g
        return out

    assert distance(plain, mix()) < 1e-5
    weighted = make_config(flow=NFT, task_weights={"understand": 3.0, "edit": 0.5, "reason": 0.0})
    assert distance(gradients(policies, groups, ALL, weighted), mix(understand=3.0, edit=0.5, reason=0.0)) < 1e-5

    text = gradients(policies, groups, ALL, make_config(flow={"weight": 0.0}))
    flow = gradients(policies, groups, ALL, make_config({"weight": 0.0}, NFT))
    double = gradients(policies, groups, ALL, make_config({"weight": 2.0}, NFT | {"weight": 0.5}))
    joined = {
        n: 2 * text.get(n, torch.zeros(())) + 0.5 * flow.get(n, torch.zeros(())) for n in text.keys() | flow.keys()
    }
    assert distance(double, joined) < 1e-5


def test_thinking_is_trained_as_text_and_as_drawing(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts[5:6])
    A = [[1.0, -0.5, 0.25, -0.75]]
    text = gradients(policies, groups, A, make_config(flow={"weight": 0.0}))
    flow = gradients(policies, groups, A, make_config({"weight": 0.0}, NFT))
    assert text["encoders.lm_head.weight"].any()
    assert not text.get("encoders.latent_out.weight", torch.zeros(1)).any()
    assert flow["encoders.latent_out.weight"].any()
    assert "encoders.lm_head.weight" not in flow


def test_nothing_reaches_the_frozen_policies(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts)
    before = {name: {n: t.clone() for n, t in kept.items()} for name, kept in policies.weights.sets.items()}
    gradients(policies, groups, ALL, make_config({"kl_coef": 0.5}, NFT | {"kl_coef": 0.2}))
    assert set(before) == {"old", "reference", "ema"}
    for name, kept in policies.weights.sets.items():
        assert all(t.grad is None and torch.equal(t, before[name][n]) for n, t in kept.items())


def test_metrics_at_ratio_1(policies: Policies, prompts: list[Prompt]) -> None:
    groups = sample(policies, prompts)
    metrics = run_update(policies, groups, ALL, make_config({"kl_coef": 0.5}, FLOW_GRPO | {"kl_coef": 0.2}), 0)
    means = metrics.means()
    assert means["ratio/text"] == pytest.approx(1, abs=1e-5)
    assert means["ratio/flow"] == pytest.approx(1, abs=1e-5)
    assert means["clip_fraction/text"] == means["clip_fraction/flow"] == 0
    assert means["kl/text/understand"] == pytest.approx(0, abs=1e-9)
    assert means["kl/flow/generate"] == 0
    assert means["entropy/understand"] > 0
    assert all(means[f"signal/{task}"] == 1 for task in ("understand", "generate", "edit", "reason"))


def test_metrics_are_weighted_means() -> None:
    metrics = Metrics()
    metrics.add("a", 1.0, 0.25)
    metrics.add("a", torch.tensor(3.0, requires_grad=True), 0.75)
    metrics.add("b", 5.0, 0.0)
    metrics.pending.insert(1, ("a", torch.tensor(2.5), 3.0))  # as of a GPU
    assert metrics.means() == metrics.means() == {"a": 2.5}
    metrics.add("a", 4.5, 4.0)
    assert metrics.means() == {"a": 3.5}


def test_metrics_of_several_updates_are_one_mean() -> None:
    one, other = Metrics({"a": 3.0}, {"a": 3.0}), Metrics({"a": 5.0, "b": 4.0}, {"a": 1.0, "b": 2.0})
    one.include(other)
    assert one.means() == {"a": 2.0, "b": 2.0}
    assert one.counts == {"a": 4.0, "b": 2.0}
