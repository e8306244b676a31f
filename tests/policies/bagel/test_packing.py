"""Packed replay: shared prompts are held once, company changes nothing, gradients add up, memory is bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replays import members

from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Sampling
from lvrpo.policies.mot import attention
from lvrpo.policies.mot.attention import Span, forget_packings, pack
from lvrpo.policies.mot.model_runner import run_ids, split_by_tokens
from lvrpo.types import FlowSegment, Image, Prompt, SegmentLogprobs, Trajectory

GUIDED = Sampling(
    group_size=3,
    max_new_tokens=5,
    num_steps=4,
    solver="euler",
    sampler="flow_sde",
    window=(0, 2),
    guidance_scale=4.0,
    image_guidance_scale=2.0,
    guidance_renorm="text_channel",
)
PLAIN = replace(GUIDED, guidance_scale=1.0, image_guidance_scale=1.0, guidance_renorm="none")
FLOAT32, BFLOAT16 = 2e-6, 5e-3
"""Largest distance of replayed to sampled log-probs in other company, relative to log-probs above 1."""


def image(seed: int, height: int = 16, width: int = 16) -> Image:
    pixels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return pixels.float() / 255


def prompts() -> list[Prompt]:
    """Every task; images of three sizes, as source and as output."""
    return [
        Prompt("u", "understand", (image(2, 9, 16), "is it blue"), ("text",)),
        Prompt("g", "generate", ("two blue squares",), ("image",)),
        Prompt("e", "edit", (image(3), "make it red"), ("image",)),
        Prompt("f", "edit", (image(4, 8, 16), "make it blue"), ("image",)),
        Prompt("r", "reason", ("draw one",), ("text", "image")),
    ]


def rollout(policy: BagelPolicy, sampling: Sampling) -> list[Trajectory]:
    asked = prompts()
    groups = policy.sample(asked, sampling, [ord(p.id) for p in asked])
    return members(groups)


def distance(trajectories: Sequence[Trajectory], replayed: Sequence[Sequence[SegmentLogprobs]]) -> float:
    worst = 0.0
    for trajectory, row in zip(trajectories, replayed, strict=True):
        for segment, scored in zip(trajectory.segments, row, strict=True):
            scale = segment.behavior_logprobs.abs().clamp(min=1)
            worst = max(worst, float(((scored.logprobs.detach() - segment.behavior_logprobs).abs() / scale).max()))
    return worst


def loss(replayed: Sequence[Sequence[SegmentLogprobs]], first: int = 0) -> torch.Tensor:
    """Every trajectory with a weight of its own."""
    terms = [(first + b + 1) * scored.logprobs.sum() for b, row in enumerate(replayed) for scored in row]
    return torch.stack(terms).sum()


def gradients(policy: BagelPolicy) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Over parameters, the largest difference relative to the largest gradient of any."""
    assert one.keys() == other.keys()
    scale = max(float(gradient.abs().max()) for gradient in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / scale


@pytest.fixture
def own(saved: Path) -> BagelPolicy:
    """A policy of the test's own."""
    return BagelPolicy.load(saved)


@pytest.mark.parametrize("sampling", [PLAIN, GUIDED], ids=["plain", "guided"])
def test_gradients_of_a_pack_are_the_sum_of_single_ones(sampling: Sampling, own: BagelPolicy) -> None:
    trajectories = rollout(own, sampling)
    replayed = own.logprobs(trajectories)
    loss(replayed).backward()
    packed = gradients(own)
    worst = 0.0
    for b, trajectory in enumerate(trajectories):
        alone = own.logprobs([trajectory])
        for one, other in zip(alone[0], replayed[b], strict=True):
            scale = other.logprobs.detach().abs().clamp(min=1)
            worst = max(worst, float(((one.logprobs - other.logprobs).detach().abs() / scale).max()))
        loss(alone, b).backward()
    single = gradients(own)
    print(f"log-probs {worst:.1e}, gradients {furthest(packed, single):.1e}")
    assert worst <= FLOAT32
    assert furthest(packed, single) < 1e-5


def test_a_pass_without_a_mask_equals_one_with_it(own: BagelPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, contexts of different lengths and thoughts of different lengths included."""
    trajectories = rollout(own, GUIDED)
    loss(own.logprobs(trajectories)).backward()
    masked = gradients(own)
    forget_packings()
    monkeypatch.setattr(attention, "MASK_CELLS", 0)
    replayed = own.logprobs(trajectories)
    assert distance(trajectories, replayed) <= FLOAT32
    loss(replayed).backward()
    assert furthest(masked, gradients(own)) < 1e-5
    trajectories = rollout(own, GUIDED)
    assert distance(trajectories, own.logprobs(trajectories)) == 0
    forget_packings()


@pytest.mark.parametrize("section", ["text", "understanding", "velocities", "training"])
def test_parity_without_masks(section: str, parity: Any, report: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_packings()
    monkeypatch.setattr(attention, "MASK_CELLS", 0)
    report(f"{section}, without masks", parity.training(1) if section == "training" else getattr(parity, section)())
    forget_packings()


def test_checkpointed_gradients_are_the_same(own: BagelPolicy) -> None:
    trajectories = rollout(own, GUIDED)
    loss(own.logprobs(trajectories)).backward()
    remembered = gradients(own)
    own.checkpoint_gradients(True)
    loss(own.logprobs(trajectories)).backward()
    again = gradients(own)
    assert all(torch.equal(again[name], gradient) for name, gradient in remembered.items())


def remembered_bytes(policy: BagelPolicy, trajectories: Sequence[Trajectory]) -> int:
    """What autograd keeps of a replay, each storage once."""
    own = {p.untyped_storage().data_ptr() for p in policy.state_dict().values()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kept = loss(policy.logprobs(trajectories))
    assert kept.requires_grad
    return sum(seen.values())


def test_checkpointing_remembers_less(own: BagelPolicy) -> None:
    trajectories = rollout(own, PLAIN)
    plain = remembered_bytes(own, trajectories)
    own.checkpoint_gradients(True)
    assert remembered_bytes(own, trajectories) < 0.4 * plain


def test_members_share_the_prompt(own: BagelPolicy) -> None:
    runner = own.runner
    row = own._row(prompts()[2])
    cache, owner = runner.prefill_shared([row] * 8)
    assert owner == [0] * 8
    shared = cache.select(owner)
    assert shared.nbytes == cache.nbytes
    assert len(shared.rope) == 8
    assert shared.parts[-1].keys[0].data_ptr() == cache.parts[-1].keys[0].data_ptr()
    extended = runner.run([(runner.text([7, 8]),)] * 8, shared).cache
    config = own.config.transformer
    token = 2 * config.depth * config.key_heads * config.width // config.heads * 4
    assert extended.nbytes == cache.nbytes + 8 * 4 * token
    assert extended.lengths == [cache.lengths[0] + 4] * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_law_per_dtype(dtype: torch.dtype, saved: Path) -> None:
    policy = BagelPolicy.load(saved, dtype=dtype)
    trajectories = rollout(policy, GUIDED)
    with torch.no_grad():
        assert distance(trajectories, policy.logprobs(trajectories)) == 0
        other = distance(trajectories[::-1], policy.logprobs(trajectories[::-1]))
        policy.max_tokens = 100
        other = max(other, distance(trajectories, policy.logprobs(trajectories)))
    print(f"{dtype}: {other:.1e} in other company")
    assert other <= (FLOAT32 if dtype == torch.float32 else BFLOAT16)
    drawn = [s for t in trajectories for s in t.segments if isinstance(s, FlowSegment)]
    assert all(s.latent.dtype == s.states.dtype == s.behavior_logprobs.dtype == torch.float32 for s in drawn)


def test_tokens_that_go_through_at_once_are_bounded(own: BagelPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one group alone is too large: 3 members of 18 tokens after a context of 60."""
    trajectories = rollout(own, PLAIN)
    seen: list[int] = []
    own.transformer.register_forward_pre_hook(
        lambda module, given: seen.append(len(given[0]) + len(given[1]))  # rows of the two blocks
    )
    monkeypatch.setattr("lvrpo.policies.bagel.policy.TEXT_TOKENS", 8)
    own.max_tokens = 100
    together = own.sample(prompts(), PLAIN, [ord(p.id) for p in prompts()])
    with torch.no_grad():
        own.logprobs(trajectories)
        own.velocity(trajectories[3:6] * 4, torch.zeros(12, 16, own.encoders.channels), torch.full((12,), 0.5))
        own.image_logprob([("a",)] * 20, [image(1)] * 20, draws=1, seeds=[0] * 20)
        own.text_logprob([(image(1), "a")] * 20, ["b c"] * 20)
    assert len(seen) > 20
    longest = max(sum(piece.span.length for piece in own._row(p)) for p in prompts())  # the thinking prompt alone
    assert max(seen) <= max(100, longest)
    for group, other in zip(together, zip(*[iter(trajectories)] * 3, strict=True), strict=True):
        for one, two in zip(group.trajectories, other, strict=True):
            torch.testing.assert_close(
                one.segments[-1].behavior_logprobs, two.segments[-1].behavior_logprobs, rtol=1e-5, atol=1e-5
            )


def test_packings_are_kept_up_to_a_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_packings()
    monkeypatch.setattr(attention, "PACKING_CACHE_BYTES", 60_000)
    device = torch.device("cpu")
    one = pack([(Span("text", 50),)], device)
    assert pack([(Span("text", 50),)], device) is one
    for n in range(51, 80):
        pack([(Span("text", n),)], device)
        assert sum(p.bytes for p in attention._packings.packings.values()) == attention._packings.bytes <= 60_000
    assert pack([(Span("text", 50),)], device) is not one
    assert 1 < len(attention._packings.packings) < 20
    large = [(Span("text", 400),)]
    assert pack(large, device) is not pack(large, device)
    monkeypatch.setattr(attention, "MASK_CELLS", 400**2 - 1)
    assert pack(large, device).visible is None
    forget_packings()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6), st.integers(1, 5)), max_size=6), st.integers(1, 60))
def test_cuts_cost_at_most_the_limit(groups: list[tuple[int, int, int]], limit: int) -> None:
    keys = [g for g, (_, members, _) in enumerate(groups) for _ in range(members)]
    contexts = [context for context, members, _ in groups for _ in range(members)]
    new = [own for _, members, own in groups for _ in range(members)]
    parts = split_by_tokens(keys, contexts, new, limit)
    assert [i for part in parts for i in part] == list(range(len(keys)))
    for part in parts:
        held = [contexts[i] for k, i in enumerate(part) if k == 0 or keys[i] != keys[part[k - 1]]]
        assert max(held) * len(held) + sum(new[i] for i in part) <= limit or len(part) == 1
    for key in dict.fromkeys(keys):
        own = [i for i in range(len(keys)) if keys[i] == key]
        touched = [part for part in parts if set(part) & set(own)]
        if contexts[own[0]] + sum(new[i] for i in own) <= limit:
            assert len(touched) == 1


def test_runs() -> None:
    assert run_ids(["a", "a", "b", "a"]) == [0, 0, 1, 2]
    assert split_by_tokens(["a", "a", "b"], [0, 0, 0], [1, 1, 1], 3) == [[0, 1, 2]]
    assert split_by_tokens(["a", "a", "b"], [4, 4, 2], [1, 1, 1], 6) == [[0, 1], [2]]
    assert split_by_tokens(["a", "a", "b"], [4, 4, 2], [1, 1, 1], 5) == [[0], [1], [2]]
    assert split_by_tokens([], [], [], 5) == []
