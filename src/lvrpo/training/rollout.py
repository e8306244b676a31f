"""Prompts of a step and the groups sampled for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from lvrpo.config import Config
from lvrpo.data.sources import PromptSource
from lvrpo.policies.base import Sampling
from lvrpo.sampling import check_window, derive_seed, fast_window, full_window, sliding_window
from lvrpo.training.flow import FLOW_OBJECTIVES
from lvrpo.training.objective import Policies
from lvrpo.types import Group, Prompt

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig


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


def prompts_of_step(source: PromptSource, config: TrainConfig, step: int) -> list[Prompt]:
    """The prompts of a step: for each task the next ones of the source, so the cursor is the step itself."""
    prompts: list[Prompt] = []
    for task, count in config.data.prompts_per_step.items():
        prompts += [source.prompt(task, step * count + i) for i in range(count)]
    return prompts


def rollout(policies: Policies, prompts: Sequence[Prompt], config: TrainConfig, step: int) -> list[Group]:
    """Groups for all prompts: text from the live policy; drawings from the weights that their objective names."""
    sampling = config.rollout.sampling(config.seed, step)
    painter = policies.old if FLOW_OBJECTIVES[config.flow.kind].samples_with == "old" else policies.live
    groups: dict[int, Group] = {}
    for sampler, wanted in ((policies.live, False), (painter, True)):
        indices = [i for i, prompt in enumerate(prompts) if ("image" in prompt.output) == wanted]
        seeds = [derive_seed(config.seed, "rollout", step, prompts[i].id) for i in indices]
        if indices:
            groups.update(zip(indices, sampler.sample([prompts[i] for i in indices], sampling, seeds), strict=True))
    return [groups[i] for i in range(len(prompts))]
