"""The replay law: before an update, log-probs replayed equal log-probs sampled, in any company."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from replays import differences, members

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.policies.mot import flow_sampler, model_runner
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.sampling import PastStep, adams_bashforth_step, derive_seed, guide, normal_noise, timestep_grid
from lvrpo.types import FlowSegment, Prompt, TextSegment, Trajectory

BASE = Sampling(group_size=3, max_new_tokens=4, num_steps=4, timestep_shift=1.0)
DRAWINGS = {
    "flow_sde": replace(BASE, sampler="flow_sde", window=(0, 1, 2)),
    "flow_sde-first-step-sum": replace(BASE, sampler="flow_sde", window=(0,), logprob_reduction="sum"),
    "dance_sde": replace(BASE, sampler="dance_sde", window=(1, 3), noise_level=0.3, timestep_shift=3.0),
    "cps": replace(BASE, sampler="cps", window=(0, 2), noise_level=0.8),
    "ode": BASE,
    "guided": replace(BASE, sampler="flow_sde", window=(1, 2), guidance_scale=3.0),
    "guided-by-image-too": replace(
        BASE, sampler="cps", window=(0, 1), guidance_scale=2.0, image_guidance_scale=1.5, guidance_renorm="text_channel"
    ),
    "guided-one-gradient": replace(
        BASE,
        sampler="flow_sde",
        window=(0, 2),
        guidance_scale=2.0,
        image_guidance_scale=1.5,
        guided_logprobs="detach_uncond",
    ),
    "guided-global": replace(BASE, sampler="dance_sde", window=(2,), guidance_scale=4.0, guidance_renorm="global"),
    "warm-text": replace(BASE, temperature=0.7, sampler="flow_sde", window=(0, 1), shared_noise=True),
}


def rollout(policy: TinyPolicy, prompts: list[Prompt], sampling: Sampling) -> list[Trajectory]:
    groups = policy.sample(prompts, sampling, [100 + i for i in range(len(prompts))])
    return members(groups)


@pytest.mark.parametrize("sampling", DRAWINGS.values(), ids=DRAWINGS)
def test_replay_is_exact_in_the_own_batch_and_close_in_any_other(
    sampling: Sampling, policy: TinyPolicy, prompts: list[Prompt]
) -> None:
    trajectories = rollout(policy, prompts, sampling)
    assert max(differences(policy, trajectories, TextSegment)) == 0
    drawn = differences(policy, trajectories, FlowSegment)
    assert len(drawn) == (5 * 3 if sampling.window else 0)
    assert max(drawn, default=0) == 0
    generator = torch.Generator().manual_seed(0)
    shuffled = [trajectories[i] for i in torch.randperm(len(trajectories), generator=generator).tolist()]
    for other in (shuffled, trajectories[::-1], trajectories[1::2], trajectories[4:5], shuffled[:7]):
        assert max(differences(policy, other, TextSegment) + differences(policy, other, FlowSegment), default=0) <= 1e-6


def test_replay_of_prompts_that_say_the_same(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    twins = [prompts[3], replace(prompts[3], id="twin"), prompts[0], replace(prompts[0], id="other twin")]
    trajectories = rollout(policy, twins, DRAWINGS["guided"])
    assert max(differences(policy, trajectories, TextSegment) + differences(policy, trajectories, FlowSegment)) <= 1e-6
    assert not torch.equal(trajectories[0].segments[0].behavior_logprobs, trajectories[3].segments[0].behavior_logprobs)


def test_replay_across_batches(policy: TinyPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch) -> None:
    trajectories = rollout(policy, prompts, DRAWINGS["flow_sde"])
    monkeypatch.setattr(model_runner, "MAX_ROWS", 4)
    assert max(differences(policy, trajectories, TextSegment) + differences(policy, trajectories, FlowSegment)) <= 1e-6


def test_texts_are_replayed_without_the_drawings_that_follow(
    policy: TinyPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectories = rollout(policy, prompts, DRAWINGS["flow_sde"])
    thoughtful = [t for t in trajectories if len(t.segments) == 2]
    assert 0 < len(thoughtful) < len(trajectories)
    whole, through_drawings = policy.logprobs(trajectories), policy.logprobs(trajectories, ["flow"])
    assert [len(row) for row in through_drawings] == [len(t.segments) * (t.image is not None) for t in trajectories]

    def never(*_: object) -> Any:
        raise AssertionError("an image was replayed")

    monkeypatch.setattr("lvrpo.policies.mot.policy.replay_flows", never)
    texts = policy.logprobs(trajectories, ["text"])
    for trajectory, row, full in zip(trajectories, texts, whole, strict=True):
        assert len(row) == (trajectory.text is not None)
        assert all(torch.equal(own.logprobs, other.logprobs) for own, other in zip(row, full, strict=False))

    def gradients(rows: list[list[Any]]) -> list[torch.Tensor]:
        loss = torch.stack([row[0].logprobs.sum() for t, row in zip(trajectories, rows, strict=True) if t.text]).sum()
        return [g for g in torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True) if g is not None]

    pairs = list(zip(gradients(texts), gradients(whole), strict=True))
    assert pairs
    assert all(torch.equal(own, other) for own, other in pairs)


@pytest.mark.parametrize("sampler", ["flow_sde", "guided-by-image-too"])
def test_steps_that_are_computed_again_have_the_same_gradient(
    sampler: str, policy: TinyPolicy, prompts: list[Prompt]
) -> None:
    trajectories = [t for t in rollout(policy, prompts, DRAWINGS[sampler]) if t.image is not None]

    def gradients() -> list[torch.Tensor]:
        loss = torch.stack([row[-1].logprobs.sum() for row in policy.logprobs(trajectories)]).sum()
        return [g for g in torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True) if g is not None]

    remembered = gradients()
    policy.checkpoint_gradients(True)
    again = gradients()
    assert remembered
    assert all(torch.equal(one, other) for one, other in zip(remembered, again, strict=True))


def test_unguided_branches_have_no_gradient_where_they_are_detached(
    policy: TinyPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = DRAWINGS["guided-one-gradient"]

    def gradients(sampling: Sampling) -> list[torch.Tensor]:
        trajectories = [t for t in rollout(policy, prompts, sampling) if t.image is not None]
        loss = torch.stack([row[-1].logprobs.sum() for row in policy.logprobs(trajectories)]).sum()
        return [g for g in torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True) if g is not None]

    detached, joint = gradients(sampling), gradients(replace(sampling, guided_logprobs="joint"))

    def guide_detached(
        v: torch.Tensor, no_text: torch.Tensor, no_image: torch.Tensor | None, **settings: Any
    ) -> torch.Tensor:
        return guide(v, no_text.detach(), None if no_image is None else no_image.detach(), **settings)

    monkeypatch.setattr(flow_sampler, "guide", guide_detached)
    by_hand = gradients(replace(sampling, guided_logprobs="joint"))
    own, expected, through_all = (torch.cat([g.flatten() for g in found]) for found in (detached, by_hand, joint))
    assert (own - expected).norm() <= 1e-5 * expected.norm()
    assert (own - through_all).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize(("group_size", "max_rows"), [(3, 7), (4, 4), (2, 5), (5, 3), (6, 512)])
def test_replay_cuts_batches_where_sampling_did(
    group_size: int, max_rows: int, policy: TinyPolicy, prompts: list[Prompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "MAX_ROWS", max_rows)
    sampled: list[int] = []
    replayed: list[int] = []
    sample, replay = TinyPolicy._sample_batch, TinyPolicy._replay_batch

    def spy_sample(self: TinyPolicy, asked: list[Any], *rest: Any) -> Any:
        sampled.append(len(asked))
        return sample(self, asked, *rest)

    def spy_replay(self: TinyPolicy, trajectories: list[Trajectory], *rest: Any) -> Any:
        replayed.append(len(trajectories))
        return replay(self, trajectories, *rest)

    monkeypatch.setattr(TinyPolicy, "_sample_batch", spy_sample)
    monkeypatch.setattr(TinyPolicy, "_replay_batch", spy_replay)
    sampling = replace(DRAWINGS["flow_sde"], group_size=group_size, num_steps=2, window=(0,))
    trajectories = rollout(policy, prompts, sampling)
    with torch.no_grad():
        policy.logprobs(trajectories)
    assert sampled == replayed
    assert sum(sampled) == len(prompts) * group_size
    assert max(sampled) <= max_rows


def test_trajectories_of_different_settings_are_replayed_together(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    drawings = [prompts[3], prompts[5]]
    names = ("flow_sde", "cps", "guided", "dance_sde")
    settings = [
        *(DRAWINGS[name] for name in names),
        replace(DRAWINGS["flow_sde"], timestep_shift=2.0),
        replace(DRAWINGS["flow_sde"], noise_level=0.4),
    ]
    mixed = [trajectory for sampling in settings for trajectory in rollout(policy, drawings, sampling)]
    assert max(differences(policy, mixed[::2] + mixed[1::2], FlowSegment)) <= 1e-6


def test_texts_cut_off_at_the_limit_are_replayed_and_continued(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    sampling = replace(DRAWINGS["flow_sde"], max_new_tokens=1, group_size=8)
    trajectories = rollout(policy, [prompts[0], prompts[6]], sampling)
    texts = [t.segments[0] for t in trajectories]
    eos = policy.tokenizer.eos_id
    for segment in texts:
        assert isinstance(segment, TextSegment)
        assert len(segment.tokens) == 1
        assert segment.ended == (int(segment.tokens[-1]) == eos)
    assert not all(segment.ended for segment in texts if isinstance(segment, TextSegment))
    assert max(differences(policy, trajectories, TextSegment)) == 0
    assert max(differences(policy, trajectories, FlowSegment)) == 0


def test_replay_sees_another_policy(new_policy: Callable[..., TinyPolicy], prompts: list[Prompt]) -> None:
    trajectories = rollout(new_policy(0), prompts, DRAWINGS["flow_sde"])
    other = new_policy(1)
    assert min(differences(other, trajectories, TextSegment) + differences(other, trajectories, FlowSegment)) > 1e-4


def test_entropy_and_logprobs_of_text(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    trajectories = rollout(policy, prompts[:2], BASE)
    allowed = int((~policy.tokenizer.suppressed_tokens()).sum())
    for row in policy.logprobs(trajectories):
        assert row[0].entropy is not None
        assert (row[0].logprobs < 0).all()
        assert (row[0].entropy > 0).all()
        assert (row[0].entropy <= torch.tensor(float(allowed)).log() + 1e-5).all()
        assert row[0].logprobs.requires_grad


def test_logprob_of_a_flow_step_is_that_of_a_normal(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    sampling = DRAWINGS["flow_sde"]
    trajectories = rollout(policy, prompts[3:6], sampling)
    grid = timestep_grid(sampling.num_steps)
    for w, i in enumerate(sampling.window):
        t, t_next = float(grid[i]), float(grid[i + 1])
        segments = [s for trajectory in trajectories for s in trajectory.segments if isinstance(s, FlowSegment)]
        x_t = torch.stack([s.states[w] for s in segments])
        x_next = torch.stack([s.next_states[w] for s in segments])
        with torch.no_grad():
            v = policy.velocity(trajectories, x_t, torch.full((len(segments),), t))
        s = sampling.noise_level * (t / (1 - (t_next if t == 1 else t))) ** 0.5
        dt = t_next - t
        mean = x_t * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
        std = s * (-dt) ** 0.5
        expected = torch.distributions.Normal(mean, std).log_prob(x_next).mean(dim=(1, 2))
        behavior = torch.stack([segment.behavior_logprobs[w] for segment in segments])
        torch.testing.assert_close(behavior, expected, rtol=1e-5, atol=1e-5)
        drawn = normal_noise([derive_seed(t.seed, "steps") for t in trajectories], (3, *x_t.shape[1:]))[:, w]
        torch.testing.assert_close((x_next - mean) / std, drawn, rtol=1e-4, atol=1e-4)


def test_a_drawing_is_recorded_whole(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    sampling = DRAWINGS["flow_sde"]
    for trajectory in rollout(policy, prompts[3:8], sampling):
        segment = trajectory.segments[-1]
        assert isinstance(segment, FlowSegment)
        assert segment.trained_steps == (0, 1, 2)
        assert torch.equal(segment.states[0], normal_noise([derive_seed(trajectory.seed, "noise")], (4, 192))[0])
        assert torch.equal(segment.states[1:], segment.next_states[:-1])
        last = segment.next_states[2][None]
        with torch.no_grad():
            v = policy.velocity([trajectory], last, torch.tensor([0.25]))
        torch.testing.assert_close(segment.latent, (last - 0.25 * v)[0], rtol=1e-4, atol=1e-4)
        assert torch.equal(segment.image, policy.encoders.decode_latents(segment.latent[None])[0])
        assert 0 <= segment.image.min() <= segment.image.max() <= 1
        assert trajectory.image is segment.image


def test_a_multistep_solver_forgets_what_came_before_a_stochastic_step(
    policy: TinyPolicy, prompts: list[Prompt]
) -> None:
    """Its noise is no part of the velocity that the solver would extrapolate: the next step is Euler's."""
    sampling = replace(BASE, solver="adams_bashforth", sampler="flow_sde", window=(1,))
    (trajectory, *_) = rollout(policy, prompts[3:4], sampling)
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    t, x_2 = segment.timesteps, segment.next_states
    with torch.no_grad():
        v_2 = policy.velocity([trajectory], x_2, t[2:3])
        x_3 = x_2 + (t[3] - t[2]) * v_2
        v_3 = policy.velocity([trajectory], x_3, t[3:4])
    x_4, _ = adams_bashforth_step(x_3, v_3, t[3], t[4], PastStep(t[2], x_2, v_2))
    torch.testing.assert_close(segment.latent, x_4[0], rtol=1e-4, atol=1e-4)


def test_the_grid_is_the_policys_own_unless_told_otherwise(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    own, told = (rollout(policy, prompts[3:4], replace(BASE, timestep_shift=shift))[0] for shift in (None, 2.0))
    assert isinstance(own.segments[0], FlowSegment)
    assert isinstance(told.segments[0], FlowSegment)
    assert torch.equal(own.segments[0].timesteps, timestep_grid(4, policy.config.timestep_shift))
    assert torch.equal(told.segments[0].timesteps, timestep_grid(4, 2.0))


def test_velocity_is_conditioned_on_the_thought(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    trajectory = rollout(policy, [prompts[6]], BASE)[0]
    x_t, t = torch.randn(1, 4, 192), torch.tensor([0.5])
    thought = trajectory.segments[0]
    assert isinstance(thought, TextSegment)
    ids = torch.tensor([*policy.tokenizer.encode("two two"), policy.tokenizer.eos_id])
    other = replace(trajectory, segments=(replace(thought, tokens=ids, ended=True), trajectory.segments[1]))
    unthought = replace(trajectory, prompt=replace(prompts[6], output=("image",)), segments=trajectory.segments[1:])
    v, v_other, v_unthought = (policy.velocity([item], x_t, t) for item in (trajectory, other, unthought))
    assert (v - v_other).abs().max() > 1e-3
    assert (v - v_unthought).abs().max() > 1e-3


@pytest.mark.parametrize("window", [(2, 1), (0, 4), (-1,), (1, 1)])
def test_windows_that_cannot_be_recorded_are_refused(
    window: tuple[int, ...], policy: TinyPolicy, prompts: list[Prompt]
) -> None:
    with pytest.raises(InputError, match="window"):
        policy.sample(prompts[3:4], replace(BASE, sampler="flow_sde", window=window), [0])


def test_unguided_log_probs_of_a_guided_flow_are_refused(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    with pytest.raises(InputError, match=r"guided_logprobs=none: .* use joint or detach_uncond"):
        policy.sample(prompts[3:4], replace(BASE, guidance_scale=2.0, guided_logprobs="none"), [0])
    policy.sample(prompts[3:4], replace(BASE, guidance_scale=1.0, guided_logprobs="none"), [0])  # has no effect


def test_nothing_to_replay(policy: TinyPolicy, prompts: list[Prompt]) -> None:
    assert policy.logprobs([]) == []
    assert policy.sample([], BASE, []) == []
    replayed: Any = policy.logprobs(rollout(policy, prompts[3:4], BASE))
    assert [row[0].logprobs.shape for row in replayed] == [(0,)] * 3
