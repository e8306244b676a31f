"""Image tokens and masked image tokens are trained by sections of their own, and by the objectives of text."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from color_task import Says, ShareOfColor
from discrete_policy import DiscretePolicy, N
from gradients_only import differentiate

from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.rewards.table import score_groups
from lvrpo.training.advantages import segment_advantages
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import KINDS, Advantages, GroupAdvantages, Member, Microbatch, recorded_passes
from lvrpo.training.losses.tokens import recompute_behavior_logprobs
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.policies import Policies
from lvrpo.training.trainer import train_step
from lvrpo.types import (
    SEGMENT_KINDS,
    ImageTokenSegment,
    MaskedSegment,
    Prompt,
    Segment,
    SegmentKind,
    SegmentLogprobs,
    Trajectory,
)

ALL: tuple[SegmentKind, ...] = ("text", "tokens", "masked")
NO_IMAGE = torch.zeros(3, 8, 8)


def make_config(**tree: Any) -> TrainConfig:
    """Only the policy terms: the divergences have coefficient 0 unless given."""
    for section in ALL:
        given = tree.get(section, {})
        tree[section] = given if given.get("kind") in ("dpo", "best_of") else {"kl_coef": 0.0} | given
    tree["rollout"] = {"group_size": 4, "max_new_tokens": 4, "num_steps": 4} | tree.get("rollout", {})
    return TrainConfig.model_validate(tree)


MONTE_CARLO = {"masked_likelihood": {"kind": "monte_carlo"}}


# --- numbers worked by hand ---


@dataclass
class Scripted:
    """A policy whose log-probs are given, one tensor per trajectory."""

    rows: Sequence[torch.Tensor]
    writes: tuple[SegmentKind, ...] = ALL

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        return [[SegmentLogprobs(self.rows[t.member], torch.ones_like(self.rows[t.member]))] for t in trajectories]


def drawn_tokens(behavior: Sequence[float]) -> ImageTokenSegment:
    return ImageTokenSegment(torch.zeros(len(behavior), dtype=torch.int64), torch.tensor(behavior), 1, 1, NO_IMAGE)


def drawn_masked(
    behavior: Sequence[Sequence[float]], scored: Sequence[Sequence[int]], given: Sequence[int] = ()
) -> MaskedSegment:
    n = len(behavior[0])
    steps = torch.tensor([-1 if i in given else 0 for i in range(n)])
    likelihood = "path" if given else "monte_carlo"
    zeros = torch.zeros(n, dtype=torch.int64)
    mask = torch.tensor(scored, dtype=torch.bool)
    return MaskedSegment(zeros, steps, mask, torch.tensor(behavior), likelihood, 1, 1, NO_IMAGE)


def loss_of(
    segments: Sequence[Segment],
    now: Sequence[Any],
    A: Sequence[float],
    section: dict[str, Any],
    ref: Sequence[Any] | None = None,
) -> tuple[float, dict[str, float]]:
    """The loss of one batch, a trajectory per segment, and the metrics."""
    kind = segments[0].kind
    others = {other: {"weight": 0.0} for other in ALL if other != kind}
    config = make_config(**others, **{kind: section})
    (objective,) = objectives_of(config, ALL)
    live, reference = (Scripted([torch.tensor(row) for row in rows]) for rows in (now, ref or now))
    prompt = Prompt("p", "generate", ("draw",), ("image",))
    members = [Member(Trajectory(prompt, m, (s,), m), a) for m, (s, a) in enumerate(zip(segments, A, strict=True))]
    asked: Any = Microbatch("generate", kind, 0, members, 1.0)
    frozen = {name: objective.reference_outputs(name, reference, asked) for name in objective.frozen_policies}  # type: ignore[arg-type]  # log-probs are all that is asked
    output = objective.loss(live, replace(asked, frozen=frozen))  # type: ignore[arg-type]
    return float(output.loss), {name: float(value) for name, value in output.metrics.items()}


def test_the_clip_of_image_tokens_with_a_divergence_and_entropy() -> None:
    segments = [drawn_tokens([-1.0, -2.0]), drawn_tokens([-1.0, -2.0])]
    log = math.log
    now = [[-1 + log(1.1), -2 + log(1.5)], [-1 + log(0.9), -2 + log(0.5)]]
    section = {"clip_low": 0.2, "clip_high": 0.28}
    # A = 2: -1.1 * 2, -1.28 * 2;  A = -1: 0.9, 0.8 (the ratio .5 is clipped)
    loss, metrics = loss_of(segments, now, [2.0, -1.0], section)
    assert loss == pytest.approx((-2.2 - 2.56 + 0.9 + 0.8) / 4)
    assert metrics["clip_fraction/tokens"] == 0.5
    assert metrics["ratio/tokens"] == pytest.approx((1.1 + 1.5 + 0.9 + 0.5) / 4)
    # the reference is half as sure of one token: k3 = 1/2 + log 2 - 1, one of four; k2 = (log 2)^2 / 2
    ref = [[now[0][0] - log(2), now[0][1]], now[1]]
    for kl, value in (("k3", log(2) - 0.5), ("k2", log(2) ** 2 / 2)):
        more, metrics = loss_of(segments, now, [2.0, -1.0], section | {"kl_coef": 0.1, "kl": kl}, ref)
        assert more - loss == pytest.approx(0.1 * value / 4, rel=1e-4)
        assert metrics["kl/tokens/generate"] == pytest.approx(value / 4)
    more, _ = loss_of(segments, now, [2.0, -1.0], section | {"entropy_coef": 0.01})
    assert more - loss == pytest.approx(-0.01)  # an entropy of 1 everywhere


def test_dr_grpo_divides_by_the_tokens_of_a_drawing() -> None:
    segments = [drawn_tokens([-1.0, -2.0]), drawn_tokens([-1.0, -2.0])]
    now = [[-1 + math.log(1.1), -2 + math.log(1.5)], [-1 + math.log(0.9), -2 + math.log(0.5)]]
    # (-1.1 * 2 - 1.2 * 2) / 2 and (.9 + .8) / 2, of two images
    assert loss_of(segments, now, [2.0, -1.0], {"kind": "dr_grpo"})[0] == pytest.approx((-4.6 + 1.7) / 4)


def test_gspo_takes_every_draw_of_masks_for_a_sequence() -> None:
    segments = [drawn_masked([[-1.0, -1.0, 0.0], [0.0, 0.0, -1.0]], [[1, 1, 0], [0, 0, 1]])]
    now = [[[-1 + math.log(1.2), -1.0, 0.0], [0.0, 0.0, -1 + math.log(0.9)]]]
    first, second = math.sqrt(1.2), 0.9  # geometric means over the masked tokens of a draw
    by_reduction = {
        "token": -(2 * first + second) / 3,
        "trajectory": -(first + second) / 2,
        "constant": -(2 * first + second) / (2 * 3),
    }
    for reduction, value in by_reduction.items():
        section = {"kind": "gspo", "clip_low": 0.5, "clip_high": 0.5, "reduction": reduction}
        assert loss_of(segments, now, [1.0], section)[0] == pytest.approx(value)


def test_cispo_on_a_path_ignores_input_tokens() -> None:
    segments = [drawn_masked([[math.log(0.5), 0.0, math.log(0.25)]], [[1, 0, 1]], given=[1])]
    now = [[[math.log(0.55), 7.0, math.log(0.5)]]]
    # weights 1.1, and 2 cut to 1.28
    value = (-1.1 * math.log(0.55) - 1.28 * math.log(0.5)) / 2
    assert loss_of(segments, now, [1.0], {"kind": "cispo"})[0] == pytest.approx(value)


def test_dpo_of_masked_drawings_takes_the_estimates_of_whole_log_probs() -> None:
    winner, loser = drawn_masked([[-1.0, 0.0]], [[1, 0]]), drawn_masked([[-1.0, -1.0]], [[1, 1]])
    now, ref = [[[-1.0, 0.0]], [[-1.0, -2.0]]], [[[-1.5, 0.0]], [[-1.0, -1.0]]]
    # two tokens times the mean: -2 against -3, and -3 against -2; margin .5 (1 - -1)
    section = {"kind": "dpo", "dpo_beta": 0.5}
    loss, metrics = loss_of([winner, loser], now, [1.0, -1.0], section, ref)
    assert loss == pytest.approx(math.log1p(math.exp(-1)))
    assert metrics["preference/masked/generate"] == 1


def test_dpo_and_best_of_take_image_tokens_as_they_take_text() -> None:
    segments = [drawn_tokens([-1.0, -1.0]), drawn_tokens([-1.0, -1.0])]
    now, ref = [[-1.0, -1.5], [-1.0, -2.0]], [[-1.5, -2.0], [-1.0, -1.0]]
    loss, _ = loss_of(segments, now, [1.0, -1.0], {"kind": "dpo", "dpo_beta": 0.5}, ref)
    assert loss == pytest.approx(math.log1p(math.exp(-1)))  # 1 nat more, 1 nat less: margin .5 * 2
    loss, _ = loss_of(segments, now, [1.0, 1.0], {"kind": "best_of"})
    assert loss == pytest.approx((1 + 1.5 + 1 + 2) / 4)


def test_importance_weights_are_those_of_the_segment() -> None:
    segment = replace(drawn_tokens([-1.0, -2.0]), trainer_logprobs=torch.tensor([-1 + math.log(3), -2.0]))
    now = [[-1 + math.log(3), -2.0]]  # where the update starts: the ratio is 1, the weights are 3, cut to 2, and 1
    loss, metrics = loss_of([segment], now, [1.0], {"importance_cap": 2.0})
    assert loss == pytest.approx(-1.5)
    assert metrics["importance/tokens"] == pytest.approx(1.5)


def test_segments_of_one_kind_are_scored_anew_before_an_update() -> None:
    bench = Bench()
    bench.move()
    with torch.no_grad():
        replayed = bench.live.logprobs(list(bench.groups[0].trajectories))
    for trajectory, rows in zip(
        recompute_behavior_logprobs(bench.live, bench.groups, ["masked"])[0].trajectories, replayed, strict=True
    ):
        text, tokens, masked = trajectory.segments
        assert isinstance(masked, MaskedSegment)
        assert masked.trainer_logprobs is not None
        assert torch.allclose(masked.trainer_logprobs, rows[2].logprobs, atol=1e-5)
        assert not torch.allclose(masked.trainer_logprobs, masked.behavior_logprobs, atol=1e-2)
        assert [getattr(segment, "trainer_logprobs", "") for segment in (text, tokens)] == [None, None]


def test_what_a_replay_costs() -> None:
    prompt = Prompt("p", "generate", ("draw",), ("image",))

    def passes(segment: Segment) -> int:
        return recorded_passes(Trajectory(prompt, 0, (segment,), 0))

    tokens, masked = drawn_tokens([0.0] * 3), drawn_masked([[0.0] * 3] * 2, [[1, 1, 0], [0, 0, 1]])
    guided = {"guidance_scale": 2.0}
    assert [passes(tokens), passes(replace(tokens, **guided))] == [1, 2]
    assert passes(replace(tokens, guidance_scale=0.5)) == 2
    assert passes(replace(tokens, guided_logprobs="detach_uncond", **guided)) == 1
    path = replace(masked, likelihood="path", reveal_steps=torch.tensor([0, 3, 1]))
    assert [passes(masked), passes(replace(masked, **guided)), passes(path), passes(replace(path, **guided))] == [
        2,
        4,
        4,
        8,
    ]


# --- the sections, on a policy ---


class Bench:
    """Trajectories that write, draw with tokens and draw with masked ones, and a policy that has moved since."""

    def __init__(self) -> None:
        self.live = DiscretePolicy(("tokens", "masked"))
        self.start = self.live.make_reference()
        self.policies = Policies(self.live, ())
        prompts = [
            Prompt("r", "reason", ("think draw red",), ("text", "image", "image")),
            Prompt("s", "reason", ("think draw blue",), ("text", "image", "image")),
        ]
        config = make_config(rollout=MONTE_CARLO)
        self.groups = self.live.sample(prompts, config.sampling(0), [3, 4])
        self.A = torch.tensor([[1.0, -0.5, 0.25, -0.75], [0.5, -1.0, 1.5, -1.0]])

    def move(self) -> None:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.live.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))

    def gradient(self, advantages: Advantages | None = None, **tree: Any) -> torch.Tensor:
        tree["rollout"] = MONTE_CARLO | tree.get("rollout", {})
        A = dict.fromkeys(KINDS, GroupAdvantages.all_valid(self.A)) if advantages is None else advantages
        differentiate(self.policies, self.groups, A, make_config(**tree), 0)
        rows = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.live.parameters()]
        self.live.zero_grad(set_to_none=True)
        return torch.cat([row.flatten() for row in rows])


def alone(kind: SegmentKind, /, **section: Any) -> dict[str, dict[str, Any]]:
    return {other: {"weight": 0.0} for other in ALL if other != kind} | {kind: section}


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / one.norm())


SETTINGS: list[dict[str, Any]] = [
    {"clip_low": 1e-3},
    {"clip_high": 1e-3},
    {"kl_coef": 1.0},
    {"kl_coef": 1.0, "kl": "k2"},
    {"entropy_coef": 0.1},
    {"weight": 0.5},
    {"weight": 0.0},
    {"kind": "gspo", "clip_low": 1e-3, "clip_high": 1e-3},
    {"kind": "cispo", "clip_high": 0.01},
    {"kind": "dpo"},
    {"kind": "best_of"},
]


@pytest.mark.parametrize("kind", ALL)
def test_a_section_moves_the_gradient_of_its_own_segments_and_no_other(kind: SegmentKind) -> None:
    bench = Bench()
    bench.move()
    base = {other: bench.gradient(**alone(other)) for other in ALL}
    assert min(float(gradient.norm()) for gradient in base.values()) > 1e-3
    rest = torch.stack([gradient for other, gradient in base.items() if other != kind]).sum(dim=0)
    found = [base[kind]]
    more = [] if kind == "tokens" else [{"reduction": "trajectory"}]  # its images are of one size
    more += [{"reduction": "constant"}] if kind == "masked" else []
    for section in [*SETTINGS, *more]:
        whole = bench.gradient(**{kind: section})
        own = bench.gradient(**alone(kind, **section)) if section.get("weight") != 0 else torch.zeros_like(whole)
        assert apart(whole, rest + own) < 1e-5, section
        assert all(float((own - other).norm()) > 1e-3 * float(base[kind].norm()) for other in found), section
        found.append(own)


@pytest.mark.parametrize("change", [{"draws": 3}, {"schedule": "uniform"}, {"kind": "path"}])
def test_the_likelihood_of_masked_drawings_is_a_choice(change: dict[str, Any]) -> None:
    """It decides what is scored, at sampling and at replay; the images are the same."""
    policy = DiscretePolicy(("masked",))
    prompts = [Prompt("g", "generate", ("draw red",), ("image",))]
    drawn = []
    for tree in ({"kind": "monte_carlo"}, {"kind": "monte_carlo"} | change):
        sampling = make_config(rollout={"masked_likelihood": tree}).sampling(0)
        (group,) = policy.sample(prompts, sampling, [5])
        drawn.append([t.segments[0] for t in group.trajectories])
    for one, other in zip(*drawn, strict=True):
        assert isinstance(one, MaskedSegment)
        assert isinstance(other, MaskedSegment)
        assert torch.equal(one.tokens, other.tokens)
        assert one.scored.shape == (2, N)
        assert not torch.equal(one.scored, other.scored)


@pytest.mark.parametrize("kind", ["tokens", "masked"])
def test_which_part_of_the_guided_logits_is_trained(kind: SegmentKind) -> None:
    policy = DiscretePolicy((kind,))
    prompts = [Prompt("g", "generate", ("draw red",), ("image",))]
    A = dict.fromkeys(KINDS, GroupAdvantages.all_valid(torch.tensor([[1.0, -0.5, 0.25, -0.75]])))
    found, modes = [], ["joint", "detach_uncond", *(["none"] if kind == "masked" else [])]
    for mode in modes:
        rollout = {"guidance_scale": 3.0, "guided_logprobs": mode} | (MONTE_CARLO if kind == "masked" else {})
        config = make_config(rollout=rollout)
        groups = policy.sample(prompts, config.sampling(0), [5])
        policies = Policies(policy, ())
        metrics = differentiate(policies, groups, A, config, 0)
        assert metrics.means()[f"ratio/{kind}"] == 1  # what is replayed is what was recorded
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
        policy.zero_grad(set_to_none=True)
    assert all(apart(found[i], found[j]) > 1e-2 for i in range(len(modes)) for j in range(i))


# --- advantages and rates ---


@pytest.mark.parametrize("stages", ["shared", "per_segment"])
@pytest.mark.parametrize("kind", ["tokens", "masked"])
def test_a_thought_and_its_drawing_share_their_advantage_or_not(kind: SegmentKind, stages: str) -> None:
    bench = Bench()
    bench.live.segment_kinds = ("text", kind)
    prompts = [
        Prompt(f"r{i}", "reason", (f"think draw {color}",), ("text", "image"))
        for i, color in enumerate(("red", "blue"))
    ]
    bench.groups = bench.live.sample(prompts, make_config(rollout=MONTE_CARLO).sampling(0), [3, 4])
    rows = [RewardConfig(name="drawn"), RewardConfig(name="written")]
    sources = [ConfiguredReward(row, reward) for row, reward in zip(rows, (ShareOfColor(), Says()), strict=True)]
    table = score_groups(sources, bench.groups, bench.start)
    config = make_config(advantages={"kind": "grpo", "std": "none", "stages": stages}).advantages
    advantages = segment_advantages(table, bench.groups, config)
    centered = table.scores - table.scores.mean(dim=1, keepdim=True)
    both, drawn, written = centered.sum(dim=2), centered[..., 0], centered[..., 1]
    expected = {"text": both, "image": both} if stages == "shared" else {"text": written, "image": drawn}
    for output, values in expected.items():
        assert torch.allclose(advantages[output].values, values, atol=1e-6)
        assert values.any()
    by_hand = {output: GroupAdvantages.all_valid(values) for output, values in expected.items()}
    for trained in ("text", kind):
        swapped = {"text": by_hand["image"], "image": by_hand["text"]}
        own = bench.gradient(advantages, **alone(trained))
        assert apart(own, bench.gradient(by_hand, **alone(trained))) < 1e-5
        other = apart(own, bench.gradient(swapped, **alone(trained)))
        assert other < 1e-5 if stages == "shared" else other > 0.1


def test_every_kind_has_a_rate_of_its_own() -> None:
    bench = Bench()
    A = dict.fromkeys(KINDS, GroupAdvantages.all_valid(bench.A))
    start = {name: tensor.clone() for name, tensor in bench.live.state_dict().items()}

    def moved(**tree: Any) -> torch.Tensor:
        optimizer = {"kind": "adamw", "warmup_steps": 0}
        tree["rollout"] = MONTE_CARLO | tree.get("rollout", {})
        config = make_config(optimizer=optimizer, **tree)
        phases = config.phases(bench.live.segment_kinds)
        assert [phase for phase in phases if "masked" in phase[0]] == [(("text", "masked"), 1.0)]
        assert (("tokens",), tree["tokens"]["lr_scale"]) in phases
        optimizers = [Optimizers(bench.live, config.optimizer, 100) for _ in phases]
        train_step(
            bench.policies, objectives_of(config, bench.live.segment_kinds), optimizers, bench.groups, A, config, 0
        )
        found = torch.cat([(p.detach() - start[name]).flatten() for name, p in bench.live.named_parameters()])
        bench.live.load_state_dict(start)
        return found

    slow, frozen = moved(tokens={"lr_scale": 1e-6}), moved(tokens={"lr_scale": 0.5, "weight": 0.0})
    only = {"text": {"weight": 0.0}, "masked": {"weight": 0.0}}
    fast, half = moved(tokens={"lr_scale": 2.0}, **only), moved(tokens={"lr_scale": 0.5}, **only)
    assert apart(frozen, slow) < 1e-4
    assert apart(fast, 4 * half) < 1e-3  # AdamW's first step has the length of its rate


def test_microbatch_losses_add_up_to_the_batch_loss() -> None:
    bench = Bench()
    bench.move()
    for reduction in ("token", "trajectory", "constant"):
        tree = {"masked": {"reduction": reduction}} if reduction != "token" else {}
        whole = bench.gradient(**tree)
        assert apart(whole, bench.gradient(limits={"microbatch_size": 3}, **tree)) < 1e-5
        assert apart(whole, bench.gradient(limits={"backward_tokens": 150}, **tree)) < 1e-5
