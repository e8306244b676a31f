"""What a frozen reading side makes of drawings: a score to choose by, and the facts that it finds."""

from __future__ import annotations

from collections.abc import Sequence

from lvrpo.metrics import ReadBack
from lvrpo.policies.base import Policy
from lvrpo.rewards.self_vqa import Confidences, SelfVQA
from lvrpo.rewards.verifiable_image import fact_table
from lvrpo.training.memory import return_freed_memory
from lvrpo.types import Group

CONFIRMED = 0.5
"""A reader finds a fact where it gives the right answer more than this probability: no other can have as much."""
AT_ONCE = 256
"""Drawings read at once."""
DIGITS = 6
"""Decimals of a score that are kept."""


def judge_scores(groups: Sequence[Group], judge: Policy) -> list[tuple[float | None, ...]]:
    """Per group and member the reward ``self_vqa`` of the judge: its mean confidence in the facts of the prompt.

    () for a prompt without drawing or without facts, None for a drawing that cannot be read.
    """
    reward = SelfVQA()
    found: list[tuple[float | None, ...]] = [()] * len(groups)
    for places in _chunks(groups, reward):
        confidences = _confidences([groups[p] for p in places], judge, reward)
        for i, p in enumerate(places):
            cells = [confidences.get((i, g)) for g in range(len(groups[p]))]
            found[p] = tuple(None if cell is None else round(float(cell.mean()), DIGITS) for cell in cells)
    return found


def read_back(groups: Sequence[Group], reader: Policy) -> list[ReadBack | None]:
    """Of the first drawing of each group the stated facts that the reader finds, that the verifier finds, and on how
    many they agree; None without drawing, facts that a verifier can check, or a picture that can be read."""
    reward = SelfVQA()
    found: list[ReadBack | None] = [None] * len(groups)
    for places in _chunks(groups, reward):
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


def _chunks(groups: Sequence[Group], reward: SelfVQA) -> list[list[int]]:
    """The groups with drawings that can be asked about, so many that ``AT_ONCE`` drawings are read together."""
    places = [p for p, group in enumerate(groups) if reward.applies(group.prompt)]
    chunks: list[list[int]] = []
    size = AT_ONCE
    for p in places:
        if size + len(groups[p]) > AT_ONCE:
            chunks.append([])
            size = 0
        chunks[-1].append(p)
        size += len(groups[p])
    return chunks


def _confidences(groups: Sequence[Group], reader: Policy, reward: SelfVQA) -> Confidences:
    found = reward.confidences(groups, reader, reader)[0]
    return_freed_memory()
    return found


__all__ = ["judge_scores", "read_back"]
