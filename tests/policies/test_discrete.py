"""The replay law of segments drawn with tokens, on a policy that draws so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from discrete_policy import DiscretePolicy, N, decoded, encoded
from replays import difference, members

from lvrpo.policies.base import MaskedScoring, Policy, Sampling
from lvrpo.sampling import masked_counts
from lvrpo.training.preflight import rollout_checks
from lvrpo.types import Group, ImageTokenSegment, MaskedSegment, Prompt, RewardTable, TextSegment, Trajectory

IMAGE_TOKEN = decoded(torch.arange(N) % 6)
PROMPTS = (
    Prompt("u", "understand", (IMAGE_TOKEN, "say red"), ("text",)),
    Prompt("g", "generate", ("draw blue",), ("image",)),
    Prompt("e", "edit", (IMAGE_TOKEN, "draw green"), ("image",)),
    Prompt("r", "reason", ("think draw yes no",), ("text", "image")),
)
BASE = Sampling(group_size=3, max_new_tokens=4, num_steps=5)
MONTE_CARLO = MaskedScoring(likelihood="monte_carlo", draws=2)
WAYS = {
    "tokens": ("tokens", BASE),
    "tokens, warm": ("tokens", replace(BASE, temperature=0.7, image_temperature=1.5)),
    "tokens, guided": ("tokens", replace(BASE, guidance_scale=3.0)),
    "tokens, one branch": ("tokens", replace(BASE, guidance_scale=3.0, guided_logprobs="detach_uncond")),
    "path": ("masked", replace(BASE, image_temperature=0.8)),
    "path, one at a time": ("masked", replace(BASE, num_steps=N, choice_temperature=2.0)),
    "path, guided": ("masked", replace(BASE, guidance_scale=2.5, choice_temperature=1.0)),
    "monte carlo": ("masked", replace(BASE, masked=MONTE_CARLO)),
    "monte carlo, guided": ("masked", replace(BASE, guidance_scale=2.0, masked=MONTE_CARLO)),
    "monte carlo, unguided log-probs": (
        "masked",
        replace(BASE, guidance_scale=2.0, guided_logprobs="none", masked=replace(MONTE_CARLO, schedule="uniform")),
    ),
}


def rollout(policy: DiscretePolicy, sampling: Sampling, prompts: Sequence[Prompt] = PROMPTS) -> list[Group]:
    return policy.sample(prompts, sampling, [10 + i for i in range(len(prompts))])


@pytest.mark.parametrize("name", WAYS)
def test_replay_is_exact_in_the_own_batch_and_close_in_any_other(name: str) -> None:
    kind, sampling = WAYS[name]
    policy = DiscretePolicy((kind,))
    assert isinstance(policy, Policy)
    trajectories = members(rollout(policy, sampling))
    drawn = [t.segments[-1] for t in trajectories if "image" in t.prompt.output]
    assert all(segment.kind == kind and bool(segment.behavior_logprobs.any()) for segment in drawn)
    assert difference(policy, trajectories) == 0
    others = [difference(policy, trajectories[::-2]), *(difference(policy, [t]) for t in trajectories[::4])]
    print(f"{name}: at most {max(others):.2g} in other batches")
    assert max(others) <= 1e-6


@pytest.mark.parametrize("name", WAYS)
def test_the_step_0_contract_knows_the_segments(name: str) -> None:
    kind, sampling = WAYS[name]
    policy = DiscretePolicy((kind,))
    groups = rollout(policy, sampling)
    scores = torch.rand(len(groups), 3, 1, generator=torch.Generator().manual_seed(0))
    tasks = tuple(prompt.task for prompt in PROMPTS)
    table = RewardTable(("r",), torch.ones(1), scores, torch.ones_like(scores, dtype=torch.bool), {}, tasks)
    words = {"tokens": "image tokens", "masked": "masked image tokens"}[kind]
    checks = {check.check: check for check in rollout_checks(policy, groups, table, 0.01)}
    assert all(check.ok for check in checks.values())
    assert checks[f"replay, {words}, own batch: max |difference|"].value == 0

    other = [replace(group, trajectories=rollout(policy, replace(sampling, image_temperature=3.0))[p].trajectories[:1])
             for p, group in enumerate(groups)]  # fmt: skip
    torn = [replace(g, trajectories=(*g.trajectories[:2], *o.trajectories)) for g, o in zip(groups, other, strict=True)]
    found = {check.check: check for check in rollout_checks(policy, torn, table, 0.01)}
    assert found["groups whose members differ in settings"].value == 3  # all that draw

    def guided_otherwise(t: Trajectory) -> Trajectory:
        segments = [s if isinstance(s, TextSegment) else replace(s, guidance_scale=7.0) for s in t.segments]
        return replace(t, segments=tuple(segments))

    wrong = [replace(g, trajectories=tuple(map(guided_otherwise, g.trajectories))) for g in groups]
    found = {check.check: check for check in rollout_checks(policy, wrong, table, 0.01)}
    assert found[f"replay, {words}, own batch: max |difference|"].ok == ("unguided" in name)  # else it is noticed


def test_a_drawing_is_found_whatever_it_was_drawn_with() -> None:
    policy = DiscretePolicy(("tokens", "masked"))
    assert policy.segment_kinds == ("text", "tokens", "masked")
    prompt = Prompt("t", "reason", ("think draw",), ("text", "image", "image"))
    for trajectory in members(rollout(policy, BASE, [prompt])):
        text, tokens, masked = trajectory.segments
        assert isinstance(text, TextSegment)
        assert isinstance(tokens, ImageTokenSegment)
        assert isinstance(masked, MaskedSegment)
        assert trajectory.text == text.text
        assert trajectory.image is masked.image
        assert torch.equal(encoded(masked.image), masked.tokens)
        assert replace(trajectory, segments=(text, tokens)).image is tokens.image


def test_the_order_of_reveals_is_on_record() -> None:
    groups = rollout(DiscretePolicy(("masked",)), BASE, PROMPTS[1:2])
    for trajectory in members(groups):
        (segment,) = trajectory.segments
        assert isinstance(segment, MaskedSegment)
        left = [int((segment.reveal_steps > s).sum()) for s in range(5)]
        assert left == list(masked_counts(N, 5))
        assert segment.scored.shape == (1, N)
        assert segment.scored.all()


def test_guided_samples_have_the_log_probs_of_the_guided_distribution() -> None:
    """From the two branches of the policy itself, asked apart."""
    policy = DiscretePolicy()
    (trajectory,) = members(rollout(policy, replace(BASE, group_size=1, guidance_scale=3.0), PROMPTS[1:2]))
    (segment,) = trajectory.segments
    assert isinstance(segment, ImageTokenSegment)
    tokens = segment.tokens[None]
    with torch.no_grad():
        given = policy.image_logits([policy.context_ids(trajectory.prompt.parts)], tokens[:, :-1], False, 1.0, "joint")[
            0
        ]
        free = policy.image_logits([[0]], tokens[:, :-1], False, 1.0, "joint")[0]
    guided = torch.log_softmax(free + 3 * (given - free), dim=-1)[torch.arange(N), segment.tokens]
    assert torch.allclose(guided, segment.behavior_logprobs, atol=1e-5)
    plain = torch.log_softmax(given, dim=-1)[torch.arange(N), segment.tokens]
    assert float((guided - plain).abs().max()) > 1e-2


@pytest.mark.parametrize(
    ("mode", "moved"), [("joint", (True, True)), ("detach_uncond", (True, False)), ("none", (True, False))]
)
def test_which_branch_has_a_gradient(mode: str, moved: tuple[bool, bool]) -> None:
    """Words of the prompt are seen by the branch with it; the branch without starts from one token alone."""
    guided = replace(BASE, guidance_scale=3.0, guided_logprobs=mode, masked=MONTE_CARLO)  # type: ignore[arg-type]
    policy = DiscretePolicy(("masked",))
    trajectories = members(rollout(policy, guided, PROMPTS[1:2]))
    seen: list[torch.Tensor] = []
    policy.head.register_forward_hook(lambda module, args, out: (out.retain_grad(), seen.append(out))[1])
    torch.stack([row.logprobs for rows in policy.logprobs(trajectories) for row in rows]).sum().backward()
    size = len(trajectories)
    for out in seen:
        assert out.grad is not None
        branches = [out.grad[:size], out.grad[size:]]
        assert [bool(branch.any()) for branch in branches] == list(moved)


def test_the_drawing_side_judges() -> None:
    policy = DiscretePolicy()
    (trajectory,) = members(rollout(policy, replace(BASE, group_size=1), PROMPTS[1:2]))
    (segment,) = trajectory.segments
    assert isinstance(segment, ImageTokenSegment)
    (found,) = policy.image_logprob([trajectory.prompt.parts], [segment.image], 1, [0])
    assert float(found) == pytest.approx(float(segment.behavior_logprobs.sum()), rel=1e-5)
    masked = DiscretePolicy(("masked",))
    one, same, other = masked.image_logprob(
        [("draw red",)] * 3, [IMAGE_TOKEN, IMAGE_TOKEN, IMAGE_TOKEN.flip(1)], 3, [1, 1, 1]
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
