from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats
import torch
from families import FAMILIES
from small_vlm import without_videos

from lvrpo.errors import ContractError
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.policies.mot import model_runner
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.sampling import SOLVERS, PastStep, derive_seed, normal_noise
from lvrpo.types import FlowSegment, Group, Prompt, TextSegment, Trajectory

SAMPLING = Sampling(group_size=4, max_new_tokens=5, num_steps=3, sampler="flow_sde", window=(0, 1))


def test_the_tiny_policy_keeps_the_contract(policy: TinyPolicy) -> None:
    assert isinstance(policy, Policy)
    assert policy.image_size == 16


def same(one: Trajectory, other: Trajectory) -> None:
    assert (one.prompt, one.member, one.seed) == (other.prompt, other.member, other.seed)
    for a, b in zip(one.segments, other.segments, strict=True):
        torch.testing.assert_close(a.behavior_logprobs, b.behavior_logprobs, rtol=1e-6, atol=1e-6)
        if isinstance(a, TextSegment) and isinstance(b, TextSegment):
            assert torch.equal(a.tokens, b.tokens)
        if isinstance(a, FlowSegment) and isinstance(b, FlowSegment):
            torch.testing.assert_close(a.latent, b.latent, rtol=1e-4, atol=1e-4)


def test_groups_do_not_depend_on_the_batch(
    policy: TinyPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = [7 * i for i in range(len(prompts))]
    whole = policy.sample(prompts, SAMPLING, seeds)
    assert [group.prompt for group in whole] == prompts
    order = [7, 2, 4, 0]
    part = policy.sample([prompts[i] for i in order], SAMPLING, [seeds[i] for i in order])
    smaller = policy.sample(prompts, replace(SAMPLING, group_size=2), seeds)
    monkeypatch.setattr(model_runner, "MAX_ROWS", 1)
    split = policy.sample(prompts, SAMPLING, seeds)
    for i, group in enumerate(whole):
        for g, trajectory in enumerate(group.trajectories):
            same(trajectory, split[i].trajectories[g])
            assert trajectory.seed == derive_seed(seeds[i], g)
        for g in range(2):
            same(group.trajectories[g], smaller[i].trajectories[g])
    for place, i in enumerate(order):
        for one, other in zip(part[place].trajectories, whole[i].trajectories, strict=True):
            same(one, other)


def test_the_same_seeds_give_the_same_groups_bit_for_bit(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    first, second = (policy.sample(prompts, SAMPLING, [5] * len(prompts)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            for s, r in zip(a.segments, b.segments, strict=True):
                assert torch.equal(s.behavior_logprobs, r.behavior_logprobs)
    assert torch.get_rng_state().equal(torch.manual_seed(0).get_state())


def starts(group: Group) -> list[torch.Tensor]:
    return [s.states[0] for t in group.trajectories for s in t.segments if isinstance(s, FlowSegment)]


def test_shared_noise_is_shared_inside_a_group_only(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    own = policy.sample(prompts[3:5], SAMPLING, [1, 2])
    shared = policy.sample(prompts[3:5], replace(SAMPLING, shared_noise=True), [1, 2])
    for p, group in enumerate(shared):
        expected = normal_noise([derive_seed(p + 1, "noise")], (4, 192))[0]
        assert all(torch.equal(start, expected) for start in starts(group))
        ends = [s.latent for t in group.trajectories for s in t.segments if isinstance(s, FlowSegment)]
        assert (ends[0] - ends[1]).abs().max() > 1e-2
    for group in own:
        assert all((a - b).abs().max() > 0.1 for a, b in zip(starts(group), starts(group)[1:], strict=False))
    assert not torch.equal(starts(shared[0])[0], starts(shared[1])[0])


def next_token_probabilities(policy: TinyPolicy, prompt: Prompt, temperature: float) -> torch.Tensor:
    """Of the first token, by scoring each word as if it had been sampled."""
    size = len(policy.tokenizer)
    base = policy.sample([prompt], Sampling(group_size=1, max_new_tokens=1, temperature=temperature), [0])[0]
    segment = base.trajectories[0].segments[0]
    assert isinstance(segment, TextSegment)
    scored = policy.logprobs(
        [
            replace(base.trajectories[0], segments=(replace(segment, tokens=torch.tensor([i]), ended=i == 2),))
            for i in range(size)
        ]
    )
    return torch.stack([row[0].logprobs[0] for row in scored]).detach().double().exp()


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_as_frequent_as_probable(
    temperature: float, policy: TinyPolicy, prompts: list[Prompt]
) -> None:
    members = 4000
    sampling = Sampling(group_size=members, max_new_tokens=1, temperature=temperature)
    (group,) = policy.sample([prompts[0]], sampling, [11])
    tokens = [int(t.segments[0].tokens[0]) for t in group.trajectories if isinstance(t.segments[0], TextSegment)]
    probabilities = next_token_probabilities(policy, prompts[0], temperature)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert (probabilities[policy.tokenizer.suppressed_tokens()] == 0).all()
    counts = Counter(tokens)
    assert not any(policy.tokenizer.suppressed_tokens()[token] for token in counts)
    likely = [i for i in range(len(probabilities)) if probabilities[i] * members >= 5]
    observed = [counts[i] for i in likely]
    expected = [float(probabilities[i]) * members for i in likely]
    observed.append(members - sum(observed))
    expected.append(members - sum(expected))
    kept = [k for k, e in enumerate(expected) if e > 1]
    scale = sum(observed[k] for k in kept) / sum(expected[k] for k in kept)
    result = scipy.stats.chisquare([observed[k] for k in kept], [expected[k] * scale for k in kept])
    assert len(kept) > 3
    assert result.pvalue > 1e-3


def test_forbidden_tokens_are_never_written_however_likely(
    new_policy: Callable[..., TinyPolicy], prompts: list[Prompt]
) -> None:
    policy = new_policy()
    forbidden = policy.tokenizer.suppressed_tokens().nonzero()[:, 0].tolist()
    assert forbidden == [0, 1, 3, 4, 5]
    with torch.no_grad():
        policy.encoders.lm_head.weight[forbidden] *= 100
    for temperature in (0.0, 1.0, 3.0):
        sampling = Sampling(group_size=32, max_new_tokens=6, temperature=temperature)
        for group in policy.sample(prompts[:3], sampling, [1, 2, 3]):
            for trajectory in group.trajectories:
                segment = trajectory.segments[0]
                assert isinstance(segment, TextSegment)
                assert not set(segment.tokens.tolist()) & set(forbidden)
                assert segment.behavior_logprobs.isfinite().all()


def test_temperature_0_is_greedy_and_scored_at_temperature_1(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    sampling = Sampling(group_size=2, max_new_tokens=3, temperature=0.0)
    (group,) = policy.sample([prompts[1]], sampling, [3])
    first, second = (t.segments[0] for t in group.trajectories)
    assert isinstance(first, TextSegment)
    assert isinstance(second, TextSegment)
    assert torch.equal(first.tokens, second.tokens)
    probabilities = next_token_probabilities(policy, prompts[1], 1.0)
    assert int(first.tokens[0]) == int(probabilities.argmax())
    assert float(first.behavior_logprobs[0].exp()) == pytest.approx(float(probabilities.max()), rel=1e-5)


def test_text_ends_with_the_end_token_or_at_the_limit(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    sampling = Sampling(group_size=64, max_new_tokens=4, temperature=1.5)
    (group,) = policy.sample([prompts[2]], sampling, [0])
    ended = []
    for trajectory in group.trajectories:
        segment = trajectory.segments[0]
        assert isinstance(segment, TextSegment)
        tokens = segment.tokens.tolist()
        ended.append(segment.ended)
        assert policy.tokenizer.eos_id not in tokens[:-1]
        assert (tokens[-1] == policy.tokenizer.eos_id) == segment.ended
        assert len(tokens) <= 4
        assert segment.ended or len(tokens) == 4
        assert segment.text == policy.tokenizer.decode(tokens) == trajectory.text
    assert any(ended)
    assert not all(ended)


@pytest.mark.parametrize("solver", ["adams_bashforth", "dpm_solver"])
@torch.no_grad()
def test_a_stochastic_step_begins_the_multistep_solver_anew(
    solver: str, policy: TinyPolicy, prompts: list[Prompt]
) -> None:
    """The velocity before the step belongs to another path: the next step is one of first order."""
    sampling = replace(SAMPLING, num_steps=5, window=(1,), solver=solver)  # type: ignore[arg-type]  # parametrized
    drawn = next(i for i, prompt in enumerate(prompts) if prompt.output == ("image",))
    (group,) = policy.sample(prompts[drawn : drawn + 1], sampling, [3])
    trajectory = group.trajectories[0]
    segment = trajectory.segments[0]
    assert isinstance(segment, FlowSegment)

    def steps(start: torch.Tensor, first: int, last: int, past: PastStep | None) -> torch.Tensor:
        x_t = start
        for i in range(first, last):
            t = segment.timesteps[i]
            v = policy.velocity([trajectory], x_t, t[None])
            x_t, past = SOLVERS[solver](x_t, v, t, segment.timesteps[i + 1], past)
        return x_t

    torch.testing.assert_close(steps(segment.next_states[:1], 2, 5, None)[0], segment.latent, rtol=1e-5, atol=1e-5)
    before = segment.timesteps[1]
    kept = SOLVERS[solver](
        segment.states[:1],
        policy.velocity([trajectory], segment.states[:1], before[None]),
        before,
        segment.timesteps[2],
        None,
    )[1]
    other = steps(segment.next_states[:1], 2, 5, kept)[0]
    assert float((other - segment.latent).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_another_number_of_seeds_than_prompts_is_refused_in_one_line(
    name: str, policy: TinyPolicy, family_folder: Callable[[str], Path]
) -> None:
    with without_videos():
        model = policy if name == "tiny" else load_policy(family_folder(name))
    task = "generate" if "generate" in model.tasks else "edit" if "edit" in model.tasks else "reason"
    source = (torch.zeros(3, 32, 32),) if task == "edit" else ()
    prompt = Prompt("p", task, (*source, "a red circle"), ("text",) if task == "reason" else ("image",))
    for seeds in ([], [1], [1, 2, 3]):
        with pytest.raises(ContractError, match=f"^seeds: {len(seeds)} for 2 prompts: give one for each$"):
            model.sample([prompt, prompt], replace(SAMPLING, sampler="ode", window=(), group_size=1), seeds)
