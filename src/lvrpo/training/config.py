"""The configuration of an alignment run: sections composed, and checked where they meet."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from lvrpo.config import Config
from lvrpo.data.jsonl import JsonlConfig
from lvrpo.data.scenes import ScenesConfig
from lvrpo.errors import InputError
from lvrpo.rewards.table import RewardConfig
from lvrpo.training.advantages import AdvantageConfig
from lvrpo.training.flow import FlowConfig
from lvrpo.training.optimizer import OptimizerConfig
from lvrpo.training.rollout import RolloutConfig
from lvrpo.training.text import TextConfig
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
