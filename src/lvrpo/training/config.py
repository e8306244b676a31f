"""The configuration of an alignment run: sections composed, and checked where they meet."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.data.jsonl import JsonlConfig
from lvrpo.data.scenes import ScenesConfig
from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.rewards.table import RewardConfig
from lvrpo.sampling import check_window, derive_seed, fast_window, full_window, sliding_window
from lvrpo.training.optimizer import OptimizerConfig
from lvrpo.types import Task


class DataConfig(Config):
    """Where prompts come from and how many of each task make a step."""

    source: str = "scenes"
    """An entry of DATASETS."""
    scenes: ScenesConfig = ScenesConfig()
    jsonl: JsonlConfig = JsonlConfig()
    """The files of the source "jsonl"."""
    prompts_per_step: dict[Task, int] = Field(
        default={"generate": 28, "understand": 64, "edit": 12, "reason": 24}, min_length=1
    )


class WindowConfig(Config):
    """Which steps of a drawing are stochastic and trained (sampler other than ode)."""

    kind: Literal["full", "fast", "sliding"] = "fast"
    size: int = Field(default=2, ge=1)
    iterations_per_stride: int = Field(default=10, ge=1)


class RolloutConfig(Config):
    """How groups are sampled."""

    group_size: int = Field(default=8, ge=2)
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: int = Field(default=8, ge=1)
    num_steps: int = Field(default=8, ge=2)
    timestep_shift: float | None = Field(default=None, gt=0)
    """None: the policy's own."""
    sampler: Literal["ode", "flow_sde", "dance_sde", "cps"] = "ode"
    solver: Literal["adams_bashforth", "euler"] = "adams_bashforth"
    """Of the steps without noise; adams_bashforth is of second order at the same cost."""
    noise_level: float = Field(default=0.7, gt=0)
    window: WindowConfig = WindowConfig()
    guidance_scale: float = Field(default=1.0, ge=1)
    image_guidance_scale: float = Field(default=1.0, ge=1)
    guidance_renorm: Literal["none", "global", "channel", "text_channel"] = "none"
    logprob_reduction: Literal["mean", "sum"] = "mean"
    shared_noise: bool = False

    def sampling(self, seed: int, step: int) -> Sampling:
        """The sampling of one step; its window is a function of (seed, step), so it needs no saving."""
        window: tuple[int, ...] = ()
        if self.sampler != "ode":
            if self.window.kind == "full":
                window = full_window(self.num_steps)
            elif self.window.kind == "fast":
                window = fast_window(self.num_steps, self.window.size, derive_seed(seed, "window", step))
            else:
                window = sliding_window(
                    self.num_steps, self.window.size, step, iterations_per_stride=self.window.iterations_per_stride
                )
            check_window(window, self.num_steps, self.sampler)
        shared = self.model_dump(exclude={"window"})
        return Sampling(window=window, **shared)


class AdvantageConfig(Config):
    """How a table of rewards becomes one advantage per trajectory."""

    kind: Literal["gdpo", "group_relative"] = "gdpo"
    """gdpo: each reward normalised in its group, then summed; group_relative: summed, then normalised."""
    std_floor: float = Field(default=0.01, ge=0)
    """Groups whose reward spreads less than this carry no signal."""
    clamp: float = Field(default=5.0, gt=0)


class TextConfig(Config):
    """The clipped objective of text segments."""

    weight: float = Field(default=1.0, ge=0)
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.28, gt=0)
    kl_coef: float = Field(default=0.05, ge=0)
    """Of the k3 estimate of the divergence from the reference."""
    entropy_coef: float = Field(default=0.0, ge=0)
    reduction: Literal["token", "trajectory"] = "token"


class FlowConfig(Config):
    """The objective of drawn segments."""

    kind: Literal["nft", "grpo"] = "nft"
    """nft: DiffusionNFT on fresh noise (arXiv:2509.16117); grpo: the clipped objective on recorded stochastic steps."""
    weight: float = Field(default=1.0, ge=0)
    kl_coef: float = Field(default=2.0, ge=0)
    """Of mean |v - v_ref|^2. Without it nothing holds DiffusionNFT: the contrast of good and bad drawings moves the
    prediction from pure noise without end, until every cell holds an object (docs/log.md)."""
    keep: int = Field(default=2, ge=1)
    """The best and the worst ``keep`` members of each group are trained."""
    beta: float = Field(default=0.5, gt=0)
    advantage_max: float = Field(default=2.5, gt=0)
    """nft: larger advantages count as this; clipping unbalances a group, so it is rarely reached."""
    noise_draws: int = Field(default=2, ge=1)
    """nft: times per picture, one in each equal part of the sampler's grid."""
    min_time: float = Field(default=0.1, gt=0, lt=1)
    old_decay_rate: float = Field(default=0.05, ge=0)
    old_decay_ceiling: float = Field(default=0.9, ge=0, lt=1)
    clip_low: float = Field(default=1e-3, gt=0)
    clip_high: float = Field(default=1e-3, gt=0)
    """grpo: bounds of the ratio of one step, in the units of ``rollout.logprob_reduction``."""
    step_weighting: Literal["level", "equal"] = "level"
    """grpo: level gives every step a gradient of one scale; with equal, the last drowns the first."""


class GuardConfig(Config):
    """The held-out watch: keeps the best weights and acts when a task falls."""

    every: int = Field(default=20, ge=1)
    prompts: dict[Task, int] = Field(
        default={"generate": 84, "understand": 240, "edit": 60, "reason": 60}, min_length=1
    )
    action: Literal["rollback", "stop", "warn"] = "rollback"
    max_rollbacks: int = Field(default=3, ge=0)
    rollback_lr: float = Field(default=0.5, gt=0, le=1)
    """Every rollback multiplies the learning rates by this."""


class TrainConfig(Config):
    """An alignment run."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = Field(default=0, ge=0)
    policy: str = "tiny"
    """A folder, a run, or a built-in name."""
    device: str = "auto"
    threads: int = Field(default=1, ge=1)
    steps: int = Field(default=140, ge=1)
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardConfig, ...] = Field(
        default=(
            RewardConfig(name="exact_answer"),
            RewardConfig(name="scene_facts", label="facts", options={"mode": "gated"}),
            RewardConfig(name="scene_facts", label="all_facts", options={"mode": "all"}),
        ),
        min_length=1,
    )
    advantages: AdvantageConfig = AdvantageConfig()
    text: TextConfig = TextConfig()
    flow: FlowConfig = FlowConfig()
    task_weights: dict[Task, float] = Field(default_factory=dict)
    """Weight of a task in the loss; 1 where absent."""
    optimizer: OptimizerConfig = OptimizerConfig()
    average_decay: float = Field(default=0.95, ge=0, lt=1)
    """The weights that are evaluated and saved are a moving average with this decay."""
    guard: GuardConfig = GuardConfig()
    control_every: int = Field(default=10, ge=1)
    """Every so many steps the reference answers the same prompts, to be drawn beside the curve."""
    control_group_size: int = Field(default=2, ge=1)
    checkpoint_every: int = Field(default=20, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    samples_every: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        try:
            self.rollout.sampling(self.seed, 0)
        except InputError as error:
            raise ValueError(str(error).replace("sampling.", "rollout.")) from None
        if self.flow.kind == "grpo" and self.rollout.sampler == "ode":
            raise ValueError("flow.kind=grpo needs stochastic steps: set rollout.sampler to flow_sde, dance_sde or cps")
        if self.flow.kind == "nft" and self.rollout.sampler != "ode":
            raise ValueError("flow.kind=nft trains on fresh noise: set rollout.sampler to ode")
        if self.flow.kind == "nft" and self.rollout.guidance_scale > 1:
            raise ValueError("flow.kind=nft trains the unguided velocity: set rollout.guidance_scale to 1")
        if 2 * self.flow.keep > self.rollout.group_size:
            raise ValueError(
                f"flow.keep={self.flow.keep}: best and worst must fit into rollout.group_size={self.rollout.group_size}"
            )
        if not any(self.data.prompts_per_step.values()) or min(self.data.prompts_per_step.values()) < 0:
            raise ValueError("data.prompts_per_step: give at least one task a positive number, and none a negative one")
        if any(weight < 0 for weight in self.task_weights.values()):
            raise ValueError("task_weights: weights must be 0 or more")
        if self.data.source == "jsonl" and self.data.jsonl.train is None:
            raise ValueError("data.source=jsonl: set data.jsonl.train to a file of rows")
        return self
