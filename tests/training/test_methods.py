"""Every way of training a segment, by hand and by what it does to a small policy."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from settings import FLOW_GRPO

from lvrpo.algorithms import gaussian_kl
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import score_groups
from lvrpo.training import losses
from lvrpo.training.advantages import segment_advantages
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import KINDS, GroupAdvantages, Member, Metrics, Microbatch
from lvrpo.training.losses.flow import FlowLossConfig, add_noise
from lvrpo.training.losses.flow_grpo import FlowGRPOConfig, MixGRPOConfig, RecordedStepsConfig
from lvrpo.training.losses.grpo import DAPOConfig, DrGRPOConfig
from lvrpo.training.losses.tokens import TokenLossConfig, recompute_behavior_logprobs
from lvrpo.training.microbatches import minibatches
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.trainer import train_step
from lvrpo.types import FlowSegment, Group, Prompt, Segment, TextSegment, Trajectory

A2 = [[1.0, -0.5, 0.0, -0.5], [2.0, 0.25, -1.0, -1.25]]


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Distance of two gradients, relative to the first."""
    return float((one - other).norm() / one.norm())


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def changed(groups: list[Group], kind: type, change: Any) -> list[Group]:
    """The groups with ``change`` done to every segment of a kind."""

    def edited(trajectory: Trajectory) -> Trajectory:
        segments: list[Segment] = [change(s) if isinstance(s, kind) else s for s in trajectory.segments]
        return replace(trajectory, segments=tuple(segments))

    return [replace(g, trajectories=tuple(map(edited, g.trajectories))) for g in groups]


def likelier(by: float) -> Any:
    """A text that the sampler held ``e^by`` times as likely per token."""
    return lambda s: replace(s, behavior_logprobs=s.behavior_logprobs + by)


def texts(bench: Any, groups: list[Group]) -> list[torch.Tensor]:
    """Log-probs of every token of every member, with a gradient."""
    return [row[0].logprobs for row in bench.live.logprobs([t for g in groups for t in g.trajectories])]


# --- text ---


def test_at_ratio_1_all_clips_pull_alike(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[:2])
    for reduction in ("token", "trajectory"):
        plain, gspo, cispo = (
            bench.gradient(groups, A2, bench.config(text={"kind": kind, "reduction": reduction}))
            for kind in ("grpo", "gspo", "cispo")
        )
        assert apart(plain, cispo) < 1e-5
        if reduction == "trajectory":  # gspo gives every token of a text the same weight already
            assert apart(plain, gspo) < 1e-5


def test_gspo_clips_whole_texts_and_cispo_none(bench: Any, prompts: list[Prompt]) -> None:
    groups = changed(bench.sample(prompts[:1]), TextSegment, likelier(-0.5))
    up = [[1.0, 1.0, 1.0, 0.5]]
    config = {kind: bench.config(text={"kind": kind}) for kind in ("grpo", "gspo", "cispo")}
    assert bench.gradient(groups, up, config["grpo"]).norm() == 0
    assert bench.gradient(groups, up, config["gspo"]).norm() == 0
    free = bench.gradient(bench.sample(prompts[:1]), up, config["cispo"])
    assert apart(1.28 * free, bench.gradient(groups, up, config["cispo"])) < 1e-5
    assert bench.update(groups, up, config["gspo"])["ratio/text"] == pytest.approx(math.exp(0.5), rel=1e-5)
    assert bench.update(groups, up, config["cispo"])["clip_fraction/text"] == 1


def test_the_constant_reduction_divides_sums_by_the_length_limit(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[:2])
    found = bench.gradient(groups, A2, bench.config(text={"reduction": "constant"}, rollout={"max_new_tokens": 7}))
    rows = texts(bench, groups)
    assert len({len(row) for row in rows}) > 1
    (-sum(a * row.sum() for a, row in zip(torch.tensor(A2).flatten(), rows, strict=True)) / (8 * 7)).backward()
    assert apart(bench.taken(), found) < 1e-5


def test_weights_for_another_sampler_are_capped_and_leave_the_ratio_at_1(bench: Any, prompts: list[Prompt]) -> None:
    honest = bench.sample(prompts[:2])
    plain = bench.gradient(honest, A2, bench.config())
    capped = bench.config(text={"importance_cap": 2.0})
    assert apart(plain, bench.gradient(recompute_behavior_logprobs(bench.live, honest), A2, capped)) < 1e-5
    for by, weight in ((-1.0, 2.0), (0.25, math.exp(-0.25))):
        other = recompute_behavior_logprobs(bench.live, changed(honest, TextSegment, likelier(by)))
        metrics = bench.update(other, A2, capped)
        assert metrics["importance/text"] == pytest.approx(weight, rel=1e-5)
        assert metrics["ratio/text"] == pytest.approx(1, abs=1e-6)
        assert apart(weight * plain, bench.gradient(other, A2, capped)) < 1e-5


def test_k2_and_k3_pull_the_same_way_near_the_reference(bench: Any, prompts: list[Prompt]) -> None:
    groups, nothing = bench.sample(prompts[:2]), [[1e-9, 0, 0, -1e-9]] * 2
    bench.nudge(0.003)
    k2, k3 = (bench.gradient(groups, nothing, bench.config(text={"kl": kl, "kl_coef": 1.0})) for kl in ("k2", "k3"))
    assert 0 < apart(k2, k3) < 0.2


def test_text_dpo_by_hand(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[:2])
    config = bench.config(text={"kind": "dpo", "dpo_beta": 0.5})
    assert bench.update(groups, A2, config)["loss/text/understand"] == pytest.approx(math.log(2), abs=1e-6)
    found = bench.gradient(groups, A2, config)
    rows = [row.sum() for row in texts(bench, groups)]
    margins = (rows[0] - rows[1]) + (rows[4] - rows[7])  # best and worst of each group, ties to the first
    (-0.5 / 2 * margins / 2).backward()
    assert apart(bench.taken(), found) < 1e-5
    bench.descend(found, 1e-3)
    after = bench.update(groups, A2, config)
    assert after["loss/text/understand"] < math.log(2) - 1e-5
    assert after["preference/text/understand"] == 1


def test_best_of_imitates_the_best_text(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[:2])
    found = bench.gradient(groups, [*A2[:1], [0.0] * 4], bench.config(text={"kind": "best_of"}))
    (-texts(bench, groups)[0].mean()).backward()
    assert apart(bench.taken(), found) < 1e-5


# --- images ---


def flow_loss(bench: Any, trajectory: Trajectory) -> float:
    """Over many times and noises."""
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    noise = torch.randn(256, *segment.latent.shape, generator=torch.Generator().manual_seed(0))
    t = 0.1 + 0.9 * (torch.arange(256) + 0.5) / 256
    x_t = (1 - t[:, None, None]) * segment.latent + t[:, None, None] * noise
    with torch.no_grad():
        v = bench.live.velocity([trajectory] * 256, x_t, t)
    return float((v - (noise - segment.latent)).square().mean())


def test_best_of_imitates_the_best_drawings(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[2:3], sampler="ode")
    config = bench.config(flow={"kind": "best_of", "top_k": 1, "timesteps_per_sample": 16})
    before = flow_loss(bench, groups[0].trajectories[2])
    bench.descend(bench.gradient(groups, [[0.0, 0.5, 1.0, -1.0]], config), 3e-3)
    assert flow_loss(bench, groups[0].trajectories[2]) < before - 1e-5


def test_flow_dpo_prefers_the_best_to_the_worst(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[2:3], sampler="ode")
    config = bench.config(flow={"kind": "dpo", "dpo_beta": 10.0, "timesteps_per_sample": 16})
    A = [[0.5, 1.0, 0.0, -1.0]]
    assert bench.update(groups, A, config)["loss/flow/generate"] == pytest.approx(math.log(2), abs=1e-6)
    best, worst = groups[0].trajectories[1], groups[0].trajectories[3]
    before = flow_loss(bench, best) - flow_loss(bench, worst)
    bench.descend(bench.gradient(groups, A, config), 3e-3)
    assert flow_loss(bench, best) - flow_loss(bench, worst) < before - 1e-5
    metrics = bench.update(groups, A, config)
    assert metrics["loss/flow/generate"] < math.log(2)
    assert metrics["preference/flow/generate"] > 0.5


def test_awm_moves_to_the_good_and_from_the_bad(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[2:3], sampler="ode")
    config = bench.config(
        flow={"kind": "awm", "timesteps_per_sample": 16, "top_bottom_k": 1, "clip_low": 0.5, "clip_high": 0.5}
    )
    A = [[0.0, 1.0, 0.0, -1.0]]
    best, worst = groups[0].trajectories[1], groups[0].trajectories[3]
    before = flow_loss(bench, best) - flow_loss(bench, worst)
    found = bench.gradient(groups, A, config)
    bench.descend(found, 3e-3)
    assert flow_loss(bench, best) - flow_loss(bench, worst) < before - 1e-5
    assert bench.update(groups, A, config)["clip_fraction/flow"] == 0


def test_awm_pulls_as_weighted_matching_at_ratio_1(bench: Any, prompts: list[Prompt]) -> None:
    """The gradient of A |v - (noise - x_0)|^2, averaged over the two members."""
    groups = bench.sample(prompts[2:3], sampler="ode")
    flow = {"kind": "awm", "timesteps_per_sample": 2, "top_bottom_k": 1, "advantage_max": 3.0}
    found = bench.gradient(groups, [[2.0, 0.0, 0.0, -2.0]], bench.config(flow=flow))
    chosen = [groups[0].trajectories[i] for i in (0, 3)]
    batch = Microbatch("generate", "flow", 0, [Member(t, 0.0) for t in chosen], 1.0)
    noised = add_noise(bench.live, batch, bench.config(flow=flow).flow, "awm", [t.seed for t in chosen])
    losses = noised.flow_loss(noised.velocity(bench.live))
    (torch.tensor([2.0, 2.0, -2.0, -2.0]) * losses).mean().backward()
    assert apart(bench.taken(), found) < 1e-4


@pytest.mark.parametrize("kind", ["nft", "awm"])
def test_a_guided_reference_pulls_one_pass_to_what_guidance_gives(bench: Any, prompts: list[Prompt], kind: str) -> None:
    groups, nothing = bench.sample(prompts[2:3], sampler="ode"), [[1e-9, 0, 0, -1e-9]]
    bench.nudge(0.05)
    reference = bench.reference
    config = bench.config(
        flow={"kind": kind, "kl_coef": 1.0, "reference_guidance": 2.0, "timesteps_per_sample": 2, "top_bottom_k": 1}
    )
    found = bench.update(groups, nothing, config)["kl/flow/generate"]
    chosen = [groups[0].trajectories[i] for i in (0, 3)]
    batch = Microbatch("generate", "flow", 0, [Member(t, 0.0) for t in chosen], 1.0)
    noised = add_noise(bench.live, batch, config.flow, kind, [t.seed for t in chosen])
    with torch.no_grad():
        v, v_no_text = noised.velocity(reference), noised.unguided(reference)
        guided = v_no_text + 2 * (v - v_no_text)
        by_hand = (noised.velocity(bench.live) - guided).square().mean()
    assert found == pytest.approx(float(by_hand), rel=1e-4)
    assert float((guided - v).square().mean()) > 1e-8


def test_guided_drawings_are_trained_guided(bench: Any, prompts: list[Prompt]) -> None:
    """At the start both branches are the old policy's, so the loss is that of the guided velocity at a pull of 0."""
    groups = bench.sample(prompts[2:3], sampler="ode", guidance_scale=2.0)
    config = bench.config(flow={"kind": "nft", "kl_coef": 0.0}, rollout={"guidance_scale": 2.0})
    metrics = bench.update(groups, [[1.0, -0.5, 0.0, -0.5]], config)
    assert metrics["distance/old"] == pytest.approx(0, abs=1e-9)
    trajectory = groups[0].trajectories[0]
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    x_t, t = segment.latent[None], torch.tensor([0.5])
    with torch.no_grad():
        v, none, guided = (bench.live.velocity([trajectory], x_t, t, scale) for scale in (1.0, 0.0, 2.0))
    torch.testing.assert_close(guided, none + 2 * (v - none))


def test_the_branch_without_text_is_held(bench: Any, prompts: list[Prompt]) -> None:
    groups, nothing = bench.sample(prompts[2:3], sampler="ode"), [[1e-9, 0, 0, -1e-9]]
    config = bench.config(flow={"kind": "nft", "kl_coef": 0.0, "unguided_kl_coef": 1.0})
    assert bench.update(groups, nothing, config)["kl/flow_unguided/generate"] == pytest.approx(0, abs=1e-9)
    bench.nudge(0.05)
    before = bench.update(groups, nothing, config)["kl/flow_unguided/generate"]
    assert before > 1e-8
    bench.descend(bench.gradient(groups, nothing, config), 1e-3)
    assert bench.update(groups, nothing, config)["kl/flow_unguided/generate"] < before


def test_two_of_a_pair_share_noise_and_times(bench: Any, prompts: list[Prompt]) -> None:
    """Equal images cannot be told apart, so nothing is left of the gradient."""
    (group,) = bench.sample(prompts[2:3], sampler="ode")
    first = group.trajectories[0]
    twins = replace(group, trajectories=(first, replace(first, member=1, seed=first.seed + 1)))
    found = bench.gradient([twins], [[1.0, -1.0]], bench.config(flow={"kind": "dpo"}, rollout={"group_size": 4}))
    assert found.norm() < 1e-5


def test_the_gaussian_divergence_is_that_of_the_recorded_steps(bench: Any, prompts: list[Prompt]) -> None:
    groups, nothing = bench.sample(prompts[2:4], guidance_scale=1.5), [[1e-9, 0, 0, -1e-9]] * 2
    for reduction in ("mean", "sum"):
        same = changed(groups, FlowSegment, lambda s, r=reduction: replace(s, logprob_reduction=r))
        config = bench.config(flow=FLOW_GRPO | {"kl": "gaussian", "kl_coef": 1.0, "top_bottom_k": 2})
        assert bench.update(same, nothing, config)["kl/flow/generate"] == pytest.approx(0, abs=1e-9)
    bench.nudge()
    chosen = [groups[0].trajectories[i] for i in (0, 1, 2, 3)]
    live, ref = bench.live.logprobs(chosen), bench.reference.logprobs(chosen)
    by_hand = torch.stack(
        [
            gaussian_kl(a[0].means[w][None], b[0].means[w][None], a[0].stds[w])[0]
            for a, b in zip(live, ref, strict=True)
            for w in range(3)
        ]
    ).mean()
    config = bench.config(flow=FLOW_GRPO | {"kl": "gaussian", "kl_coef": 1.0})
    found = bench.update(groups[:1], nothing[:1], config)["kl/flow/generate"]
    assert found == pytest.approx(float(by_hand.detach()), rel=1e-4)
    assert found > 0


def test_the_recorded_means_are_those_of_the_sampler(bench: Any, prompts: list[Prompt]) -> None:
    (group,) = bench.sample(prompts[2:3])
    replayed = bench.live.logprobs(list(group.trajectories))
    for trajectory, row in zip(group.trajectories, replayed, strict=True):
        assert torch.equal(trajectory.segments[0].means, row[0].means)
        assert row[0].stds.shape == (3,)
    assert bench.sample(prompts[2:3], sampler="ode")[0].trajectories[0].segments[0].means is None


def test_the_guarded_ratio_is_centered(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[2:4])
    A = [[1.0, -0.5, 0.5, -1.0]] * 2
    plain, guard = bench.config(flow=FLOW_GRPO), bench.config(flow=FLOW_GRPO | {"ratio": "guard"})
    assert bench.update(groups, A, guard)["ratio/flow"] == pytest.approx(1, abs=1e-6)
    assert cosine(bench.gradient(groups, A, plain), bench.gradient(groups, A, guard)) > 0.99
    bench.nudge(0.05)
    ratios = {name: bench.update(groups, A, c)["ratio/flow"] for name, c in (("plain", plain), ("guard", guard))}
    assert ratios["plain"] < 0.99
    assert abs(ratios["guard"] - 1) < 0.5 * abs(ratios["plain"] - 1)


def test_a_sum_is_clipped_where_the_mean_is(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts[2:4])
    A = [[1.0, -0.5, 0.5, -1.0]] * 2
    summed = bench.sample(prompts[2:4], logprob_reduction="sum")
    bench.nudge(0.003)
    config = bench.config(flow=FLOW_GRPO | {"clip_low": 1e-4, "clip_high": 1e-4})
    mean, total = bench.update(groups, A, config), bench.update(summed, A, config)
    assert 0 < mean["clip_fraction/flow"] < 1
    assert total["clip_fraction/flow"] == mean["clip_fraction/flow"]


# --- members without a score ---


@pytest.mark.parametrize(
    ("section", "tree", "advantages", "members"),
    [
        ("text", {"kind": "grpo"}, [1.73, -0.58, -0.58, -0.58], [0, 1, 2, 3]),
        ("text", {"kind": "gspo"}, [-0.5, 0.0, 0.0, 0.5], [0, 1, 2, 3]),
        ("text", {"kind": "dpo"}, [2.0, 1.0, 0.5, 0.25], [0, 3]),
        ("text", {"kind": "best_of"}, [-1.0, -0.25, -2.0, -0.5], [1]),
        ("flow", {"kind": "nft", "top_bottom_k": 2}, [1.73, -0.58, -0.58, -0.58], [0, 1, 2, 3]),
        ("flow", {"kind": "flow_grpo", "top_bottom_k": 1}, [-1.0, -0.25, -2.0, -0.5], [1, 2]),
        ("flow", {"kind": "dpo"}, [-1.0, -0.25, -2.0, -0.5], [1, 2]),
        ("flow", {"kind": "best_of", "top_k": 2}, [1.73, -0.58, -0.58, -0.58], [0, 1]),
    ],
    ids=str,
)
def test_a_masked_member_is_never_chosen(
    section: str, tree: dict[str, Any], advantages: list[float], members: list[int], bench: Any, prompts: list[Prompt]
) -> None:
    """Half of the group has no score, hence advantage 0, which is neither the best nor the worst nor the middle."""
    other = "flow" if section == "text" else "text"
    (objective,) = objectives_of(bench.config(**{section: tree, other: {"weight": 0.0}}), bench.live.segment_kinds)
    groups = bench.sample([prompts[0] if section == "text" else prompts[2]], 8)
    A, valid = torch.tensor([[*advantages, *[0.0] * 4]]), torch.tensor([[True] * 4 + [False] * 4])
    chosen = objective.select_members(groups, GroupAdvantages(A, valid))
    assert sorted(member.trajectory.member for member in chosen) == members


class Listed:
    """Scores by member; nan for one that failed."""

    def __init__(self, *scores: float) -> None:
        self.scores = scores

    def applies(self, prompt: Prompt) -> bool:
        return True

    def score(self, groups: list[Group], judge: Policy) -> Scores:
        return Scores(torch.tensor([self.scores] * len(groups)))


def stepped(bench: Any, groups: list[Group], config: Any) -> torch.Tensor:
    """The weights after a step on the groups; they are put back."""
    start = {name: tensor.clone() for name, tensor in bench.live.state_dict().items()}
    rewards = [Listed(1.0, 0.2, math.nan, 0.6, 0.0, math.nan), Listed(0.0, 0.3, math.nan, 0.1, 0.5, 0.9)]
    sources = [ConfiguredReward(RewardConfig(name=f"r{k}"), reward) for k, reward in enumerate(rewards)]
    table = score_groups(sources, groups, bench.reference)
    advantages = segment_advantages(table, groups, config.advantages)
    one_step(bench, config, groups, advantages)
    weights = bench.weights()
    bench.live.load_state_dict(start)
    return weights


STEPS: dict[str, dict[str, Any]] = {
    "clip, nft": {"text": {"kl_coef": 0.1, "entropy_coef": 0.1}, "flow": {"kl_coef": 0.1, "top_bottom_k": 3}},
    "gspo, grpo": {
        "text": {"kind": "gspo", "reduction": "trajectory", "kl_coef": 0.1},
        "flow": FLOW_GRPO | {"kl_coef": 0.1},
    },
    "dpo": {"text": {"kind": "dpo"}, "flow": {"kind": "dpo"}},
    "best of": {"text": {"kind": "best_of"}, "flow": {"kind": "best_of", "top_k": 5}},
    "per segment": {"advantages": {"stages": "per_segment"}, "text": {"kl_coef": 0.1}, "num_minibatches": 2},
}


@pytest.mark.parametrize("kind", ["gdpo", "grpo", "rloo", "trimmed", "win_rate"])
@pytest.mark.parametrize("name", list(STEPS))
def test_outputs_of_masked_members_are_ignored(name: str, kind: str, bench: Any, prompts: list[Prompt]) -> None:
    """Both scores of member 2 failed; of member 5 one did, which counts where each reward is normalised by itself."""
    tree = STEPS[name]
    tree = tree | {"advantages": tree.get("advantages", {}) | {"kind": kind}, "rollout": {"group_size": 6}}
    config = bench.config(**tree)
    sampler = "flow_sde" if isinstance(config.flow, RecordedStepsConfig) else "ode"
    spares = bench.sample(prompts, 6, sampler=sampler, temperature=3.0)
    bench.nudge()
    groups = bench.sample(prompts, 6, sampler=sampler)

    def with_other(members: tuple[int, ...]) -> list[Group]:
        return [
            replace(
                group,
                trajectories=tuple(
                    spare.trajectories[g] if g in members else trajectory
                    for g, trajectory in enumerate(group.trajectories)
                ),
            )
            for group, spare in zip(groups, spares, strict=True)
        ]

    weights = stepped(bench, groups, config)
    masked = (2,) if kind == "gdpo" else (2, 5)
    assert torch.equal(weights, stepped(bench, with_other(masked), config))
    assert not torch.equal(weights, stepped(bench, with_other((0, 1, 3, 4)), config))


# --- steps ---


def one_step(bench: Any, config: Any, groups: Any, A: Any, lr_scale: float = 1.0) -> Metrics:
    """One training step with optimizers of its own."""
    writes = bench.live.segment_kinds
    optimizers = [Optimizers(bench.live, config.optimizer, 100) for _ in config.phases(writes)]
    return train_step(bench.policies, objectives_of(config, writes), optimizers, groups, A, config, 0, lr_scale)


ALL = [[1.0, -0.5, 0.25, -0.75], [0.5, -1.0, 1.5, -1.0], [2.0, 0.5, -1.0, -1.5]] * 2


def both(A: Any) -> Any:
    return dict.fromkeys(KINDS, GroupAdvantages.all_valid(torch.tensor(A)))


def test_kinds_with_different_lr_scales_get_separate_steps(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts, sampler="ode")
    config = bench.config(text={"lr_scale": 0.5}, flow={"lr_scale": 2.0})
    assert config.phases(bench.live.segment_kinds) == [(("text",), 0.5), (("flow",), 2.0)]
    start = {name: p.detach().clone() for name, p in bench.live.named_parameters()}
    one_step(bench, config, groups, both(ALL))
    moved = {name: (p.detach() - start[name]).norm() for name, p in bench.live.named_parameters()}

    bench.live.load_state_dict({**bench.live.state_dict(), **start})
    alone = bench.config(flow={"weight": 0.0})
    one_step(bench, alone, groups, both(ALL), lr_scale=0.5)
    head = bench.live.encoders.lm_head.weight  # no image reaches it
    assert float((head.detach() - start["encoders.lm_head.weight"]).norm()) == pytest.approx(
        float(moved["encoders.lm_head.weight"]), rel=1e-5
    )


def test_the_gradient_audit_sums_over_phases(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts, sampler="ode")
    start = {name: tensor.clone() for name, tensor in bench.live.state_dict().items()}
    found, weights = [], []
    for tree in (
        {"text": {"lr_scale": 1e-6}, "flow": {"lr_scale": 1e-6}, "gradient_audit": {"every": 1}},
        {"text": {"lr_scale": 1e-6}, "flow": {"lr_scale": 2e-6}, "gradient_audit": {"every": 1}},
        {"text": {"lr_scale": 1e-6}, "flow": {"lr_scale": 2e-6}},
    ):
        config = bench.config(**tree)
        metrics = one_step(bench, config, groups, both(ALL)).means()
        found.append({name: value for name, value in metrics.items() if name.startswith("gradient/")})
        weights.append(bench.weights())
        bench.live.load_state_dict(start)
    together, in_turn, unaudited = found
    assert "gradient/cosine/understand+generate/all" in together  # a text against an image
    assert in_turn == pytest.approx(together, rel=1e-3, abs=1e-5)
    assert not unaudited
    assert torch.equal(weights[1], weights[2])


def test_one_rate_for_both_is_one_step(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts, sampler="ode")
    start = bench.weights()
    moves = []
    for tree, scale in (({"text": {"lr_scale": 0.5}, "flow": {"lr_scale": 0.5}}, 1.0), ({}, 0.5)):
        config = bench.config(**tree)
        assert len(config.phases(bench.live.segment_kinds)) == 1
        one_step(bench, config, groups, both(ALL), scale)
        moves.append(bench.weights() - start)
        bench.descend(moves[-1], float(moves[-1].norm()))
    assert apart(moves[0], moves[1]) < 1e-4


def test_mini_updates_deal_every_task_and_step_each_hand(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample([*prompts, *[replace(p, id=f"{p.id}'") for p in prompts]], sampler="ode")
    hands = list(minibatches(groups, both(ALL * 2), 2))
    ids = [[g.prompt.id for g in part] for part, _ in hands]
    assert sorted(ids[0] + ids[1]) == sorted(g.prompt.id for g in groups)
    assert all({g.prompt.task for g in part} == {"understand", "generate", "edit", "reason"} for part, _ in hands)
    for part, A in hands:
        for group, row in zip(part, A["text"].values, strict=True):
            place = next(i for i, g in enumerate(groups) if g is group)
            assert row.tolist() == (ALL * 2)[place]
    config = bench.config(num_minibatches=2)
    metrics = one_step(bench, config, groups, both(ALL * 2))
    assert metrics.fetch().counts["grad_norm/understand"] == 2
    assert metrics.means()["ratio/text"] != 1.0  # the second hand finds moved weights


def test_every_kind_has_a_class() -> None:
    for union, table in ((losses.TokenLoss, losses.TOKEN_LOSSES), (losses.FlowLoss, losses.FLOW_LOSSES)):
        sections = get_args(get_args(union)[0])
        assert {kind for s in sections for kind in get_args(s.model_fields["kind"].annotation)} == set(table)


# --- kinds by their names ---


def test_a_method_has_the_bounds_reduction_and_divergence_of_its_paper() -> None:
    def of(section: TokenLossConfig | FlowLossConfig, *names: str) -> list[Any]:
        return [getattr(section, name) for name in names]

    token = ("clip_low", "clip_high", "reduction", "kl_coef")
    assert of(DAPOConfig(), *token) == [0.2, 0.28, "token", 0.0]
    assert of(DrGRPOConfig(), *token) == [0.2, 0.2, "constant", 0.0]
    assert of(DrGRPOConfig(kl_coef=0.1, reduction="token"), *token) == [0.2, 0.2, "token", 0.1]
    flow = ("clip_low", "clip_high", "step_weighting", "kl", "kl_coef")
    assert of(FlowGRPOConfig(), *flow) == [1e-4, 1e-4, "equal", "gaussian", 0.004]
    assert of(MixGRPOConfig(), *flow) == [1e-4, 1e-4, "equal", "velocity", 0.0]
    assert of(MixGRPOConfig(kind="dance_grpo", clip_high=1e-3), *flow) == [1e-4, 1e-3, "equal", "velocity", 0.0]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("dapo", {"kind": "grpo", "clip_low": 0.2, "clip_high": 0.28, "reduction": "token"}),
        ("dr_grpo", {"kind": "grpo", "clip_low": 0.2, "clip_high": 0.2, "reduction": "constant"}),
    ],
)
def test_a_named_method_is_the_clipped_objective_with_its_settings(
    kind: str, settings: dict[str, Any], bench: Any, prompts: list[Prompt]
) -> None:
    groups = bench.sample(prompts[:2])
    bench.nudge()
    named, spelled = (bench.gradient(groups, A2, bench.config(text=text)) for text in ({"kind": kind}, settings))
    assert float(named.norm()) > 0
    assert torch.equal(named, spelled)
