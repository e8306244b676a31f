"""Phases of a step, traced on fake weights: the policy's own methods and the losses are called."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import nn

from lvrpo.policies.base import Sampling, TokenCounts
from lvrpo.policies.decoding import last_step_alone
from lvrpo.sampling.tokens import parts_as_on
from lvrpo.training.config import TrainConfig
from lvrpo.training.live_bytes import FakeWeightLiveBytes, fake_weights
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import Microbatch, Objective
from lvrpo.training.step_memory import NAMES, StepMemory, name_of, questions_about, tensor_bytes
from lvrpo.training.validation import Validator
from lvrpo.types import FlowSegment, Group, MaskedSegment, Prompt, Segment, TextSegment, Trajectory

T = TypeVar("T")


class TracedStepMemory(StepMemory):
    """For every policy with ``EstimablePolicy.from_config``.

    Prompts are the real ones; texts have their full length, of which one step is computed. Of every kind of output as
    many members are sampled as fill a batch, those with the longest prompts.
    """

    def __init__(self, policy: nn.Module, config: TrainConfig, whole: int, device: str) -> None:
        super().__init__(policy, config, whole, device)
        fake_weights([policy, *self.frozen_parts])
        self.prepare()
        self.live = FakeWeightLiveBytes(self.held(), device)
        self.peaks: dict[str, int] = {}
        self.groups: list[Group] = []

    def phases(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> dict[str, int]:
        with self.live, torch.no_grad(), last_step_alone(), parts_as_on(self.device):
            self._measure_phases(prompts, validation)
        return self.peaks

    def _measure_phases(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> None:
        for same in _alike(prompts):
            self.groups += self._sample("rollout", same, self.sampling)
        for same in _alike(validation):
            self._sample("validation", same, Validator({}, self.config).sampling)
        drawn = [t for group in self.groups for t in group.trajectories if t.image is not None]
        if drawn and self.asks_judge():
            self._measure("judge", lambda: self._judge(drawn))
        for objective in objectives_of(self.config, self.policy.segment_kinds):
            for task in dict.fromkeys(prompt.task for prompt in prompts):
                self._replay(objective, [group for group in self.groups if group.prompt.task == task])

    def outputs(self, prompts: Sequence[Prompt]) -> tuple[int, int]:
        """Latents of flows stay on the device, all else is in host memory."""
        device = host = 0
        for segment in (s for group in self.groups for t in group.trajectories for s in t.segments):
            whole = tensor_bytes(_tensors(segment))
            latent = segment.latent.nbytes if isinstance(segment, FlowSegment) else 0
            device, host = device + latent, host + whole - latent
        return device, host

    def _measure(self, name: str, run: Callable[[], T], gradient: bool = False) -> T:
        """Runs a phase and records its peak."""
        self.live.restart()
        with torch.set_grad_enabled(gradient):
            found = run()
        if self.in_rounds:
            self.module.zero_grad(set_to_none=True)
        self.peaks[name] = max(self.peaks.get(name, 0), self.live.peak)
        return found

    # --- rollout ---

    def _sample(self, name: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Groups of prompts of one task and output: of the longest ones sampled, of the others like the first."""
        name = f"{name} of {name_of(prompts[0].output)}"

        def sample(some: Sequence[Prompt]) -> list[Group]:
            return self._measure(name, lambda: self.policy.sample(some, sampling, list(range(len(some)))))

        first = sample(prompts[:1])[0]
        longest = sorted(prompts, key=lambda prompt: -self._tokens(replace(first.trajectories[0], prompt=prompt)))
        each = self._tokens(replace(first.trajectories[0], prompt=longest[0])) * len(first.trajectories)
        at_once = -(-self.module.max_tokens // each)  # type: ignore[operator]  # of EstimablePolicy
        groups = [first] if at_once == 1 or len(longest) == 1 else sample(longest[:at_once])
        steps = sampling.num_steps
        groups = [replace(g, trajectories=tuple(_with_values(t, steps) for t in g.trajectories)) for g in groups]
        for prompt in longest[len(groups) :]:
            groups.append(Group(prompt, tuple(replace(t, prompt=prompt) for t in groups[0].trajectories)))
        return groups

    def _tokens(self, trajectory: Trajectory) -> int:
        """Tokens of a row of a forward pass."""
        counts: TokenCounts = self.policy.count_tokens(trajectory)
        return counts.context + counts.text + counts.image

    # --- replay and judge ---

    def _replay(self, objective: Objective, groups: Sequence[Group]) -> None:
        members, count = self.largest_microbatch(groups, objective)
        if not members:
            return
        name, policy = f"replay of {NAMES[objective.output]}", self.policy
        batch = Microbatch(groups[0].prompt.task, objective.kind, 0, members, 1.0)
        kept = 0

        def run() -> None:
            nonlocal kept
            with torch.no_grad():
                frozen = {n: objective.reference_outputs(n, policy, batch) for n in objective.frozen_policies}
            kept = tensor_bytes(frozen.values())
            output = objective.loss(policy, replace(batch, frozen=frozen))
            output.loss.backward()  # while the metrics, which keep their own parts of the graph, are alive

        before = self.peaks.pop(name, 0)
        self._measure(name, run, gradient=True)
        # outputs of frozen policies are computed for all microbatches first
        self.peaks[name] = max(before, self.peaks[name] + kept * (count - 1))

    def _judge(self, drawn: Sequence[Trajectory]) -> None:
        """A batch of questions at least, one for every fact of every image."""
        enough = -(-self.module.max_tokens // max(1, self._tokens(drawn[0])))  # type: ignore[operator]
        asked = questions_about(drawn)[:enough]
        self.policy.text_logprob([context for context, _ in asked], [answer for _, answer in asked])


def _alike(prompts: Iterable[Prompt]) -> list[list[Prompt]]:
    """Prompts by task and output."""
    classes: dict[object, list[Prompt]] = {}
    for prompt in prompts:
        classes.setdefault((prompt.task, prompt.output), []).append(prompt)
    return list(classes.values())


def _with_values(trajectory: Trajectory, num_steps: int) -> Trajectory:
    """Values that others look at: pixels of zeros for a judge, and steps of which each reveals some tokens."""
    segments: list[Segment] = []
    for segment in trajectory.segments:
        if not isinstance(segment, TextSegment):
            segment = replace(segment, image=torch.zeros(segment.image.shape))
        if isinstance(segment, MaskedSegment):
            count = len(segment.tokens)
            segment = replace(segment, reveal_steps=torch.arange(count) * min(num_steps, count) // count)
        segments.append(segment)
    return replace(trajectory, segments=tuple(segments))


def _tensors(segment: Segment) -> list[torch.Tensor]:
    values: list[Any] = [getattr(segment, field.name) for field in fields(segment)]  # Any: fields of every type
    return [value for value in values if isinstance(value, torch.Tensor)]
