"""Samples a policy on prompts and scores the outputs: success, VQA scores of a judge, and reading back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch

from lvrpo.distributed import gather_with_tensors, rank, world_size
from lvrpo.metrics import ReadBack
from lvrpo.policies.base import Policy, Sampling, require_method
from lvrpo.rewards.base import judge_fingerprint
from lvrpo.rewards.self_vqa import Confidences, SelfVQA
from lvrpo.rewards.verifiable_image import fact_table
from lvrpo.sampling import derive_seed
from lvrpo.training.memory import return_freed_memory
from lvrpo.training.policies import Policies, SetName
from lvrpo.types import Group, Image, Parts, Prompt

CHUNK = 256
"""Outputs per sampling call."""


def sample_prompts(
    policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, seed: int, samples: int = 1
) -> list[Group]:
    """``samples`` outputs per prompt; the same seed gives every policy the same noise."""
    several = replace(sampling, group_size=samples)
    groups: list[Group] = []
    at_once = max(1, CHUNK // samples)
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
        groups += policy.sample(chunk, several, [derive_seed(seed, "evaluation", prompt.id) for prompt in chunk])
    return groups


CONFIRMED = 0.5
"""A reader confirms a fact where it gives the right answer more than this probability."""
BATCH_SIZE = 256
"""Images per call of the judge."""
DIGITS = 6
"""Decimals of a recorded score."""


def judge_scores(groups: Sequence[Group], judge: Policy) -> list[tuple[float | None, ...]]:
    """Per group and member the reward ``self_vqa`` of the judge: its mean confidence in the facts of the prompt.

    () for a prompt without image or without facts, None for an image that cannot be read.
    """
    reward = SelfVQA()
    found: list[tuple[float | None, ...]] = [()] * len(groups)
    for places in _batches(groups, reward):
        confidences = _confidences([groups[p] for p in places], judge, reward)
        for i, p in enumerate(places):
            cells = [confidences.get((i, g)) for g in range(len(groups[p]))]
            found[p] = tuple(None if cell is None else round(float(cell.mean()), DIGITS) for cell in cells)
    return found


def read_back(groups: Sequence[Group], reader: Policy) -> list[ReadBack | None]:
    """For the first image of each group: stated facts found by the reader, found by the verifier, and the number on
    which they agree; None without an image, facts that a verifier can check, or an image that can be read."""
    reward = SelfVQA()
    found: list[ReadBack | None] = [None] * len(groups)
    for places in _batches(groups, reward):
        first = [Group(groups[p].prompt, groups[p].trajectories[:1]) for p in places]
        confidences, held = _confidences(first, reader, reward), fact_table(first)
        for i, p in enumerate(places):
            cell = confidences.get((i, 0))
            if cell is None or not all(fact.check for fact in groups[p].prompt.facts):
                continue
            confirmed = (cell > CONFIRMED).tolist()
            agree = sum(one == other for one, other in zip(confirmed, held[i], strict=True))
            found[p] = ReadBack(len(confirmed), sum(confirmed), sum(held[i]), agree)
    return found


def _batches(groups: Sequence[Group], reward: SelfVQA) -> list[list[int]]:
    """Indices of the groups with images that the reward applies to, in batches of up to ``BATCH_SIZE`` images."""
    places = [p for p, group in enumerate(groups) if reward.applies(group.prompt)]
    chunks: list[list[int]] = []
    size = BATCH_SIZE
    for p in places:
        if size + len(groups[p]) > BATCH_SIZE:
            chunks.append([])
            size = 0
        chunks[-1].append(p)
        size += len(groups[p])
    return chunks


def _confidences(groups: Sequence[Group], reader: Policy, reward: SelfVQA) -> Confidences:
    found = reward.confidences(groups, reader, reader)[0]
    return_freed_memory()
    return found


# --- several ranks ---


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
