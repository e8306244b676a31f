"""Evaluations on several ranks: all run the same one, and what is sampled or judged in it is split between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from lvrpo.distributed import gather_with_tensors, rank, relay_errors, world_size
from lvrpo.policies.base import Policy, Sampling, StandIn, in_place
from lvrpo.types import Group, Image, Parts, Prompt


def data_parallel(policy: Policy) -> Policy:
    """The policy, of whose prompts and texts every rank takes a share; the policy itself where there is one rank."""
    return policy if world_size() == 1 else cast(Policy, DataParallelPolicy(policy))


class DataParallelPolicy(StandIn):
    """A policy that all ranks ask together."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.constant = getattr(policy, "constant", False)  # of one that stands in for another itself

    def policy(self) -> Policy:
        """That of this rank."""
        return self._policy

    def __getattr__(self, name: str) -> Any:
        """Any: what is not split is the policy's own."""
        return getattr(self._policy, name)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """As ``Policy.sample``; every ``world_size``-th prompt, so that every rank gets some of every task."""
        own = range(rank(), len(prompts), world_size())
        inside = cast(Policy, in_place(self._policy))
        groups: list[Group] = []
        with relay_errors():
            if own:
                groups = inside.sample([prompts[i] for i in own], sampling, [seeds[i] for i in own])
        found: dict[int, Group] = {}
        for part in gather_with_tensors(dict(zip(own, groups, strict=True))):
            found |= part
        # a prompt comes back as a copy: groups keep the very object that was asked
        return [_of(prompt, found[i]) for i, prompt in enumerate(prompts)]

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """As ``Policy.text_logprob``."""
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
        """As ``Policy.image_logprob``."""
        given = (*times, *named.values())
        return self._by_rows(
            len(images),
            lambda policy, own: policy.image_logprob(contexts[own], images[own], draws, seeds[own], *given),
        )

    def _by_rows(self, rows: int, ask: Callable[[Policy, slice], torch.Tensor]) -> torch.Tensor:
        """Rows that follow each other stay together, for they share contexts."""
        inside = cast(Policy, in_place(self._policy))
        own = slice(rows * rank() // world_size(), rows * (rank() + 1) // world_size())
        if rows == 0:
            return ask(inside, own)
        answer: torch.Tensor | None = None
        with relay_errors():
            if own.start < own.stop:
                answer = ask(inside, own)
        parts = [part for part in gather_with_tensors(answer) if part is not None]
        return torch.cat([part.to(parts[0].device) for part in parts])


def _of(prompt: Prompt, group: Group) -> Group:
    return Group(prompt, tuple(replace(trajectory, prompt=prompt) for trajectory in group.trajectories))
