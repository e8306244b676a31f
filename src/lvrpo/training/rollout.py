"""Prompts of a step, their rollouts, and dynamic sampling, which replaces groups without signal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from lvrpo.algorithms import resample_plan, signal_mask
from lvrpo.config import Config, default_kind
from lvrpo.data.base import Task
from lvrpo.distributed import relay_errors
from lvrpo.policies.base import MaskedScoring, Sampling, listening
from lvrpo.rewards.config import ConfiguredReward
from lvrpo.rewards.table import discard_async_scores
from lvrpo.sampling import (
    check_window,
    decaying_window,
    derive_seed,
    fast_window,
    full_window,
    random_window,
    sliding_window,
)
from lvrpo.training.data_parallel import local_share, replace_rows, sample_local, score_local
from lvrpo.training.policies import Policies, SetName
from lvrpo.training.rollout_ahead import RolloutAhead, Rows
from lvrpo.training.rollout_engine import Engine, EngineSampler, PolicyEngineConfig, trainable_weights
from lvrpo.types import TASKS, Group, LogitGuidance, Prompt, RewardTable, Trajectory

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

RESAMPLE_OFFSET = 2**40
"""First prompt index of resampled groups, beyond those of regular steps."""


Side = Annotated[int, Field(ge=1, le=8192)]
"""Pixels."""


class WindowConfig(Config):
    """The sampling steps of an image that are stochastic and trained (sampler other than ode)."""

    steps_after: int | None = Field(default=None, ge=1)
    """Maximum number of steps from the window's end to t = 0 (MixGRPO-Flash); None: those of the grid."""


class FullWindowConfig(WindowConfig):
    """All but the last step."""

    kind: Literal["full"] = "full"

    def steps(self, num_steps: int, seed: int, step: int) -> tuple[int, ...]:
        """The window of a training step."""
        return full_window(num_steps)


class RandomWindowConfig(WindowConfig):
    """fast: a random start in the first half (Flow-GRPO-Fast); random: anywhere (MixGRPO, arXiv:2507.21802)."""

    kind: Literal["fast", "random"] = "fast"
    size: int = Field(default=2, ge=1)
    """Consecutive stochastic steps."""

    def steps(self, num_steps: int, seed: int, step: int) -> tuple[int, ...]:
        """The window of a training step."""
        return (fast_window if self.kind == "fast" else random_window)(num_steps, self.size, seed)


class SlidingWindowConfig(WindowConfig):
    """MixGRPO's window, which moves to later sampling steps during training."""

    kind: Literal["sliding"] = "sliding"
    size: int = Field(default=2, ge=1)
    """Consecutive stochastic steps."""
    iterations_per_stride: int = Field(default=10, ge=1)
    """Training steps between two moves."""

    def steps(self, num_steps: int, seed: int, step: int) -> tuple[int, ...]:
        """The window of a training step."""
        return sliding_window(num_steps, self.size, step, iterations_per_stride=self.iterations_per_stride)


class DecayingWindowConfig(WindowConfig):
    """A sliding window that moves faster and faster past the middle of the grid."""

    kind: Literal["decaying"] = "decaying"
    size: int = Field(default=2, ge=1)
    """Consecutive stochastic steps."""
    iterations_per_stride: int = Field(default=10, ge=1)
    """Training steps between the first two moves."""
    decay: float = Field(default=0.1, ge=0)
    """Relative decrease of the interval with every move."""

    def steps(self, num_steps: int, seed: int, step: int) -> tuple[int, ...]:
        """The window of a training step."""
        return decaying_window(
            num_steps,
            self.size,
            step,
            iterations_at_start=self.iterations_per_stride,
            decay=self.decay,
            threshold=num_steps // 2,
        )


class PathLikelihood(Config):
    """The exact log-probs of the sampled decoding path."""

    kind: Literal["path"] = "path"
    steps_per_pass: int = Field(default=1, ge=1, le=10_000)
    """Steps whose tokens are scored together, given those of earlier steps: fewer passes, but more than 1 scores other
    contexts than those sampled in (TraceRL, arXiv:2509.06949, with 8)."""

    @property
    def scoring(self) -> MaskedScoring:
        """The ``scoring`` argument of ``Policy.sample``."""
        return MaskedScoring(steps_per_pass=self.steps_per_pass)


class MonteCarloLikelihood(Config):
    """Log-probs of randomly masked tokens given the others, with the same masks for policy and reference (UniGRPO,
    arXiv:2505.15809; MaskGRPO, arXiv:2510.02880)."""

    kind: Literal["monte_carlo"] = "monte_carlo"
    draws: int = Field(default=2, ge=1, le=1000)
    """Masks per image or text; each counts as a sequence for ``masked.reduction`` and masked.kind=gspo."""
    schedule: Literal["cosine", "uniform"] = "cosine"
    """Distribution of mask ratios; cosine: those of the sampler; uniform: the estimate is then a bound on the
    log-prob."""

    @property
    def scoring(self) -> MaskedScoring:
        """The ``scoring`` argument of ``Policy.sample``."""
        return MaskedScoring("monte_carlo", self.draws, self.schedule)


class CoupledLikelihood(Config):
    """monte_carlo with every mask and its complement, so that each pair scores every token once (DiffuCoder,
    arXiv:2506.20639)."""

    kind: Literal["coupled"] = "coupled"
    draws: int = Field(default=1, ge=1, le=1000)
    """Pairs of masks per image or text."""
    schedule: Literal["cosine", "uniform"] = "uniform"
    """As of monte_carlo."""

    @property
    def scoring(self) -> MaskedScoring:
        """The ``scoring`` argument of ``Policy.sample``."""
        return MaskedScoring("coupled", self.draws, self.schedule)


Window = Annotated[
    FullWindowConfig | RandomWindowConfig | SlidingWindowConfig | DecayingWindowConfig,
    Field(discriminator="kind"),
    default_kind("fast"),
]
MaskedLikelihood = Annotated[
    PathLikelihood | MonteCarloLikelihood | CoupledLikelihood, Field(discriminator="kind"), default_kind("path")
]


class RolloutConfig(Config):
    """Sampling of the groups."""

    hints: ClassVar[Mapping[str, str]] = {
        "policy": "is called {section}.sample_from: policy or reference",
        "refill_budget": "is called {section}.max_resamples",
    }

    group_size: int = Field(default=8, ge=2, le=4096)
    """Samples per prompt."""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """Sampling temperature of text."""
    max_new_tokens: int = Field(default=8, ge=1, le=100_000)
    """Longest text, in tokens."""
    num_steps: int = Field(default=8, ge=2, le=1000)
    """Model evaluations per image; for masked tokens the reveal steps."""
    timestep_shift: float | None = Field(default=None, gt=0, le=1000)
    """None: that of the policy."""
    sampler: Literal["ode", "flow_sde", "dance_sde", "cps"] = "ode"
    """Stepping rule in the window: ode adds no noise; flow_sde (arXiv:2505.05470), dance_sde (arXiv:2505.07818) and cps
    (arXiv:2509.05952) do."""
    solver: Literal["adams_bashforth", "dpm_solver", "euler"] = "adams_bashforth"
    """ODE solver of the deterministic steps; the first two are of second order at the same cost."""
    noise_level: float = Field(default=0.7, gt=0, le=100)
    """Scale a of the noise of stochastic steps."""
    window: Window = RandomWindowConfig()
    guidance_scale: float = Field(default=1.0, ge=1, le=1000)
    """Classifier-free guidance of the text; 1: none."""
    image_guidance_scale: float = Field(default=1.0, ge=1, le=1000)
    """Classifier-free guidance of the source image in edits; 1: none."""
    guidance_renorm: Literal["none", "global", "channel", "channel_match", "text_channel"] = "none"
    """Shrinks the guided velocity to the norm of the conditional one, over all tokens and channels (global) or the
    channels of each token (channel, text_channel); channel_match (Qwen-Image): gives each token that norm, larger or
    smaller; text_channel (BAGEL's edits): of the text guidance alone."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Steps with low < t <= high are guided."""
    image_size: tuple[Side, Side] | None = None
    """Height and width of images without a source image; None: those of the policy."""
    logprob_reduction: Literal["mean", "sum"] = "mean"
    """Over latent dimensions of a stochastic step's log-prob."""
    shared_noise: bool = False
    """Whether the members of a group start from the same noise."""
    image_temperature: float = Field(default=1.0, gt=0, le=100)
    """Temperature of image tokens, masked ones included."""
    choice_temperature: float = Field(default=0.0, ge=0, le=1000)
    """Temperature of the choice of the masked tokens to decode in a step; 0: the most confident ones (MaskGIT,
    arXiv:2202.04200)."""
    guided_logprobs: LogitGuidance = "joint"
    """Gradient of the guided log-probs of images, of flows too: joint: through all branches; detach_uncond: through the
    conditional branch only, for less memory and time; none (monte_carlo, coupled): they are unguided."""
    masked_likelihood: MaskedLikelihood = PathLikelihood()
    """Likelihood of images of masked tokens, and of texts where the policy writes them so (MMaDA)."""
    block_length: int = Field(default=32, ge=1, le=100_000)
    """Places of a block where the policy writes masked texts (MMaDA); blocks are decoded from left to right."""
    tokens_per_step: int = Field(default=1, ge=1, le=100_000)
    """Places that a step decodes there, the most confident ones of the block."""
    max_resamples: int = Field(default=0, ge=0, le=10_000)
    """Dynamic sampling (DAPO, arXiv:2503.14476): groups without signal are replaced by groups of new prompts of the
    same task, at most this many groups per step."""
    sample_from: Literal["policy", "reference"] = "policy"
    """The policy that samples. reference: offline training, for off-policy objectives (dpo, best_of)."""
    engine: Engine = PolicyEngineConfig()
    """The sampling program; if it is not the policy itself, ``importance_cap`` of token losses defaults to 2, and
    contract.json holds the divergence of its log-probs from the trainer's."""
    steps_ahead: int = Field(default=0, ge=0, le=1)
    """1: while the policy trains on a step, the engine samples the next one, with the weights of before the update.
    Importance weights correct texts and image tokens for the step of delay; flows take images as they are."""
    pool: int = Field(default=0, ge=0, le=1_000_000)
    """Number of steps whose prompts are repeated in turn; 0: new prompts in every step. With sample_from=reference
    their outputs are sampled once and kept in memory."""

    def sampling(self, seed: int, step: int) -> Sampling:
        """The sampling parameters of a training step; the window is a function of (seed, step)."""
        window: tuple[int, ...] = ()
        if self.sampler != "ode":
            window = self.window.steps(self.num_steps, derive_seed(seed, "window", step), step)
        check_window(window, self.num_steps, self.sampler)
        after = self.window.steps_after
        if window and after is not None:
            after = min(after, self.num_steps - window[-1] - 1)
        shared = self.model_dump(
            exclude={"window", "max_resamples", "sample_from", "engine", "steps_ahead", "pool", "masked_likelihood"}
        )
        return Sampling(window=window, steps_after_window=after, masked=self.masked_likelihood.scoring, **shared)

    def held_out_sampling(self) -> Sampling:
        """One output per held-out prompt: greedy text, no noise and no guidance, else the settings of the rollout."""
        same = ("max_new_tokens", "num_steps", "timestep_shift", "solver", "image_size", "image_temperature")
        decoding = ("choice_temperature", "block_length", "tokens_per_step")
        return Sampling(group_size=1, temperature=0.0, **self.model_dump(include={*same, *decoding}))

    def data_step(self, step: int) -> int:
        """The step whose prompts are used."""
        return step % self.pool if self.pool else step


def prompts_of_step(source: Task, config: TrainConfig, step: int) -> list[Prompt]:
    """The prompts of a step: for each task the next ones of the source, a function of the step."""
    step = config.rollout.data_step(step)
    prompts: list[Prompt] = []
    for task, count in config.data.prompts_per_step.items():
        prompts += [source.prompt(task, step * count + i) for i in range(count)]
    return prompts


def prompt_seeds(prompts: Sequence[Prompt], *purpose: int | str, sampled: Mapping[str, int] | None = None) -> list[int]:
    """A seed per prompt, derived from its id; repetitions of a prompt within one step get different seeds.

    ``sampled``: how often each id was sampled before in the step; None: never.
    """
    counts = Counter(sampled)
    seeds: list[int] = []
    for prompt in prompts:
        repetition = counts[prompt.id]
        seeds.append(derive_seed(*purpose, prompt.id, *([repetition] if repetition else [])))
        counts[prompt.id] += 1
    return seeds


def rollout(
    policies: Policies,
    prompts: Sequence[Prompt],
    config: TrainConfig,
    step: int,
    engine: EngineSampler | None = None,
    rewards: Sequence[ConfiguredReward] = (),
    sampled: Mapping[str, int] | None = None,
) -> list[Group]:
    """A group per prompt: text sampled from the policy, images from the old policy; both from the reference offline.

    ``engine``: samples instead of the policy, with the same weights. ``rewards``: those that wait for other programs
    begin to score each group once it is sampled. ``sampled``: as for ``prompt_seeds``.
    """
    groups: dict[int, Group] = {}
    for part in _parts(prompts, config, step, sampled):
        args = part.prompts, part.sampling, part.seeds
        with _async_scores(rewards, *args) as submit:
            with policies.use(part.weights) as policy:
                if engine is not None:
                    engine.sync_weights(policy)
                found = [] if engine is not None else sample_local(policy, *args)
            if engine is not None:
                found = sample_local(engine, *args)
            submit(found)
        groups.update(zip(part.indices, found, strict=True))
    return [groups[i] for i in range(len(prompts))]


class _Part(NamedTuple):
    """The prompts of a step that one set of weights samples."""

    weights: SetName
    indices: list[int]
    """Of the prompts in the step."""
    prompts: list[Prompt]
    sampling: Sampling
    seeds: list[int]


def _parts(
    prompts: Sequence[Prompt], config: TrainConfig, step: int, sampled: Mapping[str, int] | None = None
) -> list[_Part]:
    names: tuple[SetName, SetName] = (
        ("policy", "old") if config.rollout.sample_from == "policy" else ("reference", "reference")
    )
    sampling = config.sampling(step)
    seeds = prompt_seeds(prompts, config.seed, "rollout", step, sampled=sampled)
    parts = []
    for name, has_image in zip(names, (False, True), strict=True):
        indices = [i for i, prompt in enumerate(prompts) if ("image" in prompt.output) == has_image]
        if indices:
            parts.append(_Part(name, indices, [prompts[i] for i in indices], sampling, [seeds[i] for i in indices]))
    return parts


@contextmanager
def _async_scores(
    rewards: Sequence[ConfiguredReward], prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]
) -> Iterator[Callable[[Sequence[Group]], None]]:
    """Inside, rewards that wait are given each group that a policy announces; ``submit`` gives them all others."""
    waiting = [source for source in rewards if source.waits]
    places = {derive_seed(seed, m): p for p, seed in enumerate(seeds) for m in range(sampling.group_size)}
    members: dict[int, list[Trajectory]] = {p: [] for p in range(len(prompts))}

    def announced(trajectories: Sequence[Trajectory]) -> None:
        for trajectory in trajectories:
            members[places[trajectory.seed]].append(trajectory)
        complete = {places[t.seed]: members[places[t.seed]] for t in trajectories}
        give(
            [
                Group(prompts[p], tuple(sorted(own, key=lambda t: t.member)))
                for p, own in complete.items()
                if len(own) == sampling.group_size
            ]
        )

    def submit(groups: Sequence[Group]) -> None:
        give([group for p, group in enumerate(groups) if group.trajectories and not members[p]])

    def give(groups: Sequence[Group]) -> None:
        for source in waiting if groups else ():
            source.submit(groups)

    try:
        with listening(announced) if waiting else nullcontext():
            yield submit
    except BaseException:
        discard_async_scores(waiting)
        raise


class Rollouts:
    """The rollouts of a run; those of the reference for a prompt pool are cached.

    ``rewards``: those that wait for other programs score groups while others are sampled. ``ahead``: holds those that
    the engine samples one step ahead; None: none.
    """

    def __init__(
        self,
        policies: Policies,
        config: TrainConfig,
        engine: EngineSampler | None = None,
        rewards: Sequence[ConfiguredReward] = (),
        ahead: RolloutAhead | None = None,
    ) -> None:
        self.policies, self.config, self.engine, self.rewards = policies, config, engine, rewards
        self.ahead = ahead
        self.cache: dict[int, list[Group]] = {}

    def groups(self, prompts: Sequence[Prompt], step: int) -> list[Group]:
        """``rollout`` with the cache, which is a function of (seed, step of the pool), so resuming rebuilds it."""
        config = self.config.rollout
        if self.ahead is not None and (rows := self.ahead.take(step, prompts)) is not None:
            return self._local_groups(prompts, step, rows)
        if config.sample_from == "policy" or not config.pool:
            return self.sample(prompts, step)
        step = config.data_step(step)
        if step not in self.cache:
            self.cache[step] = self.sample(prompts, step)
        return self.cache[step]

    def sample(self, prompts: Sequence[Prompt], step: int, sampled: Mapping[str, int] | None = None) -> list[Group]:
        """``rollout`` without the cache."""
        return rollout(self.policies, prompts, self.config, step, self.engine, self.rewards, sampled)

    def start(self, prompts: Sequence[Prompt], step: int) -> None:
        """Sends the current weights to the engine, which samples a coming step with them in the background."""
        if self.engine is None or self.ahead is None:
            return
        engine, jobs = self.engine, list[tuple[_Part, list[int], dict[str, torch.Tensor] | None]]()
        for i, part in enumerate(_parts(prompts, self.config, step)):
            weights = None
            with self.policies.use(part.weights) as policy:
                if i == 0:
                    engine.sync_weights(policy)
                else:  # the weights are other ones when the engine is free for them
                    weights = {name: tensor.to("cpu", copy=True) for name, tensor in trainable_weights(policy).items()}
            jobs.append((part, local_share(part.prompts, part.sampling), weights))

        def sample() -> Rows:
            rows: dict[int, Sequence[Trajectory]] = {}
            for part, local, weights in jobs:
                if weights is not None:
                    engine.load_weights(weights)
                if local:
                    args = [part.prompts[i] for i in local], part.sampling, [part.seeds[i] for i in local]
                    for i, group in zip(local, engine.sample(*args), strict=True):
                        rows[part.indices[i]] = group.trajectories
            return rows

        self.ahead.start(step, sample)

    def _local_groups(self, prompts: Sequence[Prompt], step: int, rows: Rows) -> list[Group]:
        """Groups of the step with this rank's trajectories: ``rows`` that another number of ranks saved hold more."""
        parts = _parts(prompts, self.config, step)
        local = {part.indices[i] for part in parts for i in local_share(part.prompts, part.sampling)}
        return [Group(prompt, tuple(rows[p]) if p in local else ()) for p, prompt in enumerate(prompts)]


def resample(
    rollouts: Rollouts,
    source: Task,
    rewards: Sequence[ConfiguredReward],
    groups: Sequence[Group],
    table: RewardTable,
    step: int,
) -> tuple[list[Group], RewardTable, dict[str, float]]:
    """Dynamic sampling: replaces groups without signal within the budget; also returns counts for the metrics.

    The new prompts are a function of the step and of the groups without signal, so a resumed run draws the same.
    """
    config = rollouts.config
    groups, budget = list(groups), config.rollout.max_resamples
    tasks = torch.tensor([TASKS.index(group.prompt.task) for group in groups])
    drawn: Counter[str] = Counter()
    sampled = Counter(group.prompt.id for group in groups)
    while True:
        trained = table.trained()
        signal = signal_mask(trained.scores, trained.mask, config.advantages.std_floor)
        plan = resample_plan(signal, tasks, budget)
        rows = plan.redraw.nonzero()[:, 0].tolist()
        if not rows:
            counts = {"refill/drawn": float(drawn.total()), "refill/given_up": float(plan.given_up.sum())}
            return groups, table, counts
        prompts = []
        with relay_errors():
            for p in rows:
                task = groups[p].prompt.task
                prompts.append(source.prompt(task, RESAMPLE_OFFSET + step * config.rollout.max_resamples + drawn[task]))
                drawn[task] += 1
        fresh = rollouts.sample(prompts, step, sampled)
        sampled.update(prompt.id for prompt in prompts)
        with rollouts.policies.use("judge") as judge:
            scores = score_local(rewards, fresh, judge, step)
        table = replace_rows(table, rows, scores)
        for p, group in zip(rows, fresh, strict=True):
            groups[p] = group
        budget = plan.budget_left
