"""The whole method in one readable loop: one policy, four tasks, one update.

    python examples/grpo_loop.py [STEPS]

Everything that `lvrpo train` does to the weights is on this page; what it adds around them (run directory, validation,
checkpoints, report) is not. With the same configuration and seed the numbers are the library's own, bit for bit, and a
test holds the two together.

Letters: P prompts, G members of a group, K rewards, N image tokens, C channels of one. Time t: 1 is noise, 0 is data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from lvrpo.algorithms import (
    best_worst_mask,
    centered_advantages,
    clipped_surrogate,
    gdpo_advantages,
    k3,
    nft_loss,
    old_policy_decay,
    reduce_tokens,
    reward_probability,
)
from lvrpo.data.scenes import ScenePrompts, fact_results, read
from lvrpo.policies.loading import load_policy
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.verifiable_text import answers_match
from lvrpo.sampling import derive_seed, normal_noise, shift_time, uniform_noise
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses.grpo import GRPOConfig
from lvrpo.training.losses.nft import NFTConfig
from lvrpo.training.optimizer import Optimizers, update_ema
from lvrpo.types import TASKS, FlowSegment, Group, Prompt, TextSegment, Trajectory


def train(policy: TinyPolicy, config: TrainConfig) -> Iterator[dict[str, float]]:
    """Yields the mean reward per task of every step; `policy` is trained in place."""
    text, flow = config.text, config.flow
    assert isinstance(text, GRPOConfig)
    assert isinstance(flow, NFTConfig)
    old, reference = policy.make_reference(), policy.make_reference()
    source = ScenePrompts(config.data.scenes, "train", config.seed)
    optimizers = Optimizers(policy, config.optimizer, config.steps)
    for step in range(config.steps):
        # data
        prompts = [
            source.prompt(task, step * count + i)
            for task, count in config.data.prompts_per_step.items()
            for i in range(count)
        ]
        # rollout: the live policy writes, the old policy (a short average of it) draws
        groups = rollout(policy, old, prompts, config, step)
        # rewards, masked where a reward does not apply
        scores, mask = score(groups)
        # advantages: each reward normalised in its group, the sum per task
        tasks = torch.tensor([TASKS.index(group.prompt.task) for group in groups])
        weights = torch.ones(scores.shape[2])
        advantages = gdpo_advantages(
            scores, mask, weights, tasks, std_floor=config.advantages.std_floor, clamp=config.advantages.clamp
        )
        # loss and step: one update for reading and drawing, all tasks
        for task in TASKS:
            rows = [p for p, group in enumerate(groups) if group.prompt.task == task]
            weight = config.task_weights.get(task, 1.0)
            chosen = [groups[p] for p in rows]
            text_loss(policy, reference, chosen, advantages[rows], text, weight)
            drawing_loss(policy, old, reference, chosen, advantages[rows], flow, weight, step)
        optimizers.step(step)
        decay = old_policy_decay(step, rate=flow.old_decay_rate, ceiling=flow.old_decay_ceiling)
        update_ema(old, policy, decay)
        yield mean_rewards(groups, scores, mask)


def rollout(live: TinyPolicy, old: TinyPolicy, prompts: list[Prompt], config: TrainConfig, step: int) -> list[Group]:
    """G outputs per prompt; randomness is a function of (seed, step, prompt, member)."""
    sampling = config.rollout.sampling(config.seed, step)
    groups: dict[str, Group] = {}
    for policy, draws in ((live, False), (old, True)):
        chosen = [prompt for prompt in prompts if ("image" in prompt.output) == draws]
        seeds = [derive_seed(config.seed, "rollout", step, prompt.id) for prompt in chosen]
        groups.update({group.prompt.id: group for group in policy.sample(chosen, sampling, seeds)})
    return [groups[prompt.id] for prompt in prompts]


def score(groups: list[Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """Three verifiable rewards (P, G, 3) and where they apply: right answer, gated share of facts, all facts."""
    scores = torch.zeros(len(groups), len(groups[0]), 3)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for p, group in enumerate(groups):
        prompt = group.prompt
        for g, trajectory in enumerate(group.trajectories):
            if prompt.answer is not None and "text" in prompt.output:
                scores[p, g, 0] = float(answers_match(trajectory.text or "", prompt.answer))
                mask[p, g, 0] = True
            if trajectory.image is not None:
                holds = fact_results(prompt.facts, read([trajectory.image])[0])
                counted = all(h for f, h in zip(prompt.facts, holds, strict=True) if f.kind in ("total", "count"))
                scores[p, g, 1] = sum(holds) / len(holds) / (1 if counted else 2)
                scores[p, g, 2] = float(all(holds))
                mask[p, g, 1:] = True
    return scores, mask


def text_loss(
    policy: TinyPolicy,
    reference: TinyPolicy,
    groups: list[Group],
    advantages: torch.Tensor,
    config: GRPOConfig,
    weight: float,
) -> None:
    """GRPO on the tokens of groups with signal: clipped surrogate plus the k3 divergence from the reference."""
    trained = [
        (trajectory, float(advantages[p, g]))
        for p, group in enumerate(groups)
        if "text" in group.prompt.output and bool((advantages[p] != 0).any())
        for g, trajectory in enumerate(group.trajectories)
    ]
    if not trained:
        return
    trajectories = [trajectory for trajectory, _ in trained]
    A = torch.tensor([a for _, a in trained])[:, None]
    logprobs = token_logprobs(policy, trajectories)
    with torch.no_grad():
        ref_logprobs = token_logprobs(reference, trajectories)
    behavior = [s.behavior_logprobs for t in trajectories for s in t.segments if isinstance(s, TextSegment)]
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones(len(row), dtype=torch.bool) for row in behavior], batch_first=True)
    surrogate = clipped_surrogate(
        logprobs,
        pad(behavior, batch_first=True),
        A,
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
    )
    loss = reduce_tokens(surrogate.loss_terms, mask, config.reduction)
    divergence = reduce_tokens(k3(logprobs, ref_logprobs), mask, config.reduction)
    (weight * config.weight * (loss + config.kl_coef * divergence)).backward()


def token_logprobs(policy: TinyPolicy, trajectories: list[Trajectory]) -> torch.Tensor:
    """Log-probs of the sampled tokens under the current weights, padded to (B, L)."""
    rows = [
        scored.logprobs
        for trajectory, replayed in zip(trajectories, policy.logprobs(trajectories), strict=True)
        for segment, scored in zip(trajectory.segments, replayed, strict=True)
        if isinstance(segment, TextSegment)
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def drawing_loss(
    policy: TinyPolicy,
    old: TinyPolicy,
    reference: TinyPolicy,
    groups: list[Group],
    advantages: torch.Tensor,
    config: NFTConfig,
    weight: float,
    step: int,
) -> None:
    """DiffusionNFT on the best and worst images of every group, at fresh noise levels."""
    keep = best_worst_mask(advantages, config.top_bottom_k)
    advantages = centered_advantages(advantages, keep)
    trained = [
        (group.trajectories[g], float(advantages[p, g]))
        for p, group in enumerate(groups)
        if "image" in group.prompt.output
        for g in keep[p].nonzero()[:, 0].tolist()
    ]
    if not trained:
        return
    draws = config.timesteps_per_sample
    trajectories = [trajectory for trajectory, _ in trained for _ in range(draws)]
    A = torch.tensor([a for _, a in trained]).repeat_interleave(draws)
    x_0 = torch.stack([drawn(trajectory).latent for trajectory in trajectories])  # (B, N, C)
    seeds = [derive_seed(trajectory.seed, "nft", step, k) for trajectory, _ in trained for k in range(draws)]
    noise = normal_noise(seeds, x_0.shape[1:])
    u = (torch.arange(draws).repeat(len(trained)) + uniform_noise(seeds, (1,))[:, 0]) / draws
    t = shift_time(u, policy.timestep_shift()).clamp(min=config.t_min)
    x_t = (1 - t[:, None, None]) * x_0 + t[:, None, None] * noise
    v = policy.velocity(trajectories, x_t, t)
    with torch.no_grad():
        v_old = old.velocity(trajectories, x_t, t)
        v_ref = reference.velocity(trajectories, x_t, t)
    q = reward_probability(A, config.advantage_max)
    loss = nft_loss(
        v, v_old, v_ref, x_t, t, x_0, q, beta=config.beta, kl_coef=config.kl_coef, advantage_max=config.advantage_max
    ).loss.mean()
    (weight * config.weight * loss).backward()


def drawn(trajectory: Trajectory) -> FlowSegment:
    """The drawn segment, always the last."""
    segment = trajectory.segments[-1]
    assert isinstance(segment, FlowSegment)
    return segment


def mean_rewards(groups: list[Group], scores: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Mean over the valid scores of each reward, per task."""
    out = {}
    for task in TASKS:
        rows = [p for p, group in enumerate(groups) if group.prompt.task == task]
        for k, name in enumerate(("exact_answer", "facts", "all_facts")):
            valid = scores[rows, :, k][mask[rows, :, k]]
            if len(valid):
                out[f"reward/{task}/{name}"] = float(valid.mean())
    return out


if __name__ == "__main__":
    torch.set_num_threads(1)
    tiny = load_policy("tiny")
    assert isinstance(tiny, TinyPolicy)
    settings = TrainConfig(steps=int(sys.argv[1]) if len(sys.argv) > 1 else 20)
    for number, rewards in enumerate(train(tiny, settings), start=1):
        means = (f"{name.removeprefix('reward/')} {value:.3f}" for name, value in rewards.items())
        print(number, "  ".join(means), flush=True)
