"""Evaluation of a run's policies on several ranks, which share sampling and judging."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from lvrpo.distributed import gather_with_tensors, rank, world_size
from lvrpo.policies.base import Policy, Sampling, require_method
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.training.policies import Policies, SetName
from lvrpo.types import Group, Image, Parts, Prompt


def evaluation_policy(policies: Policies, name: SetName) -> Policy:
    """One of a run's weight sets as a policy whose sampling and likelihoods are split between the ranks.

    Collective: all ranks must make the same calls. Its weights are swapped in for each call, so calls of several such
    policies may alternate.
    """
    return cast(Policy, EvaluatedPolicy(policies, name))


class EvaluatedPolicy:
    """See ``evaluation_policy``."""

    def __init__(self, policies: Policies, name: SetName) -> None:
        self._policies = policies
        self._name: SetName = name
        self._identity: str | None = None

    def __getattr__(self, name: str) -> Any:
        """Any: other attributes are the policy's; its methods run with these weights."""
        found = getattr(self._policies.policy, name)
        if not callable(found):
            return found

        def method(*args: Any, **named: Any) -> Any:
            with self._policies.use(self._name) as policy:
                return getattr(policy, name)(*args, **named)

        return method

    def judge_fingerprint(self) -> str:
        """``lvrpo.rewards.base.judge_fingerprint`` of the policy; cached for the reference."""
        if self._identity is not None:
            return self._identity
        with self._policies.use(self._name) as policy:
            found = judge_fingerprint(policy)
        if self._name == "reference":
            self._identity = found
        return found

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; a rank takes every ``world_size``-th prompt, so that all get some of every task."""
        own = range(rank(), len(prompts), world_size())
        groups: list[Group] = []
        with self._policies.use(self._name) as policy:
            if own:
                groups = policy.sample([prompts[i] for i in own], sampling, [seeds[i] for i in own])
        found: dict[int, Group] = {}
        for part in gather_with_tensors(dict(zip(own, groups, strict=True))):
            found |= part
        # gathering copies a prompt: groups must hold the object that was passed in
        return [
            Group(prompt, tuple(replace(trajectory, prompt=prompt) for trajectory in found[i].trajectories))
            for i, prompt in enumerate(prompts)
        ]

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """See ``Judge.text_logprob``."""
        require_method(self._policies.policy, "text_logprob")
        return self._by_rows(len(texts), lambda policy, own: policy.text_logprob(contexts[own], texts[own]))

    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        *times: tuple[float, float],
        **named: tuple[float, float],
    ) -> torch.Tensor:
        """See ``Judge.image_logprob``."""
        require_method(self._policies.policy, "image_logprob")
        given = (*times, *named.values())
        return self._by_rows(
            len(images),
            lambda policy, own: policy.image_logprob(contexts[own], images[own], draws, seeds[own], *given),
        )

    def _by_rows(self, rows: int, call: Callable[[Policy, slice], torch.Tensor]) -> torch.Tensor:
        """Splits rows into contiguous shards, as neighbors share contexts."""
        own = slice(rows * rank() // world_size(), rows * (rank() + 1) // world_size())
        answer: torch.Tensor | None = None
        with self._policies.use(self._name) as policy:
            if own.start < own.stop or rows == 0:
                answer = call(policy, own)
        parts = [part for part in gather_with_tensors(answer) if part is not None]
        return torch.cat([part.to(parts[0].device) for part in parts])
