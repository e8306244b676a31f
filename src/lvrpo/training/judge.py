"""The judge of a run: frozen weights that score outputs, how they may be renewed, and how far the live ones are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from lvrpo.algorithms import group_correlation
from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.identity import judge_identity, standing_in
from lvrpo.rewards.table import RewardSource, score_groups
from lvrpo.training.optimizer import average_into, load_trained, trained_weights
from lvrpo.types import Group, Prompt, RewardTable


class JudgeConfig(Config):
    """Who scores outputs: never the live policy."""

    kind: Literal["reference", "average"] = "reference"
    """reference: the weights that the run began with; average: a slow moving average of the live weights."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the slow average, per step."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Every so many steps the judge is replaced by a candidate, if that answers held-out questions no worse: by the
    evaluated average (kind reference) or by the slow average (kind average). None: a reference stays what it is, and
    a slow average judges while it moves, unguarded."""
    drift_every: int = Field(default=0, ge=0)
    """Every so many steps the live policy scores the outputs of the step too, and what it says otherwise is logged."""

    @model_validator(mode="after")
    def _decay_is_used(self) -> Self:
        if self.kind == "reference" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError(f"decay={self.decay}: is of the slow average: set kind to average, or leave it out")
        return self

    @property
    def moves(self) -> bool:
        """Whether the judge can become another one than the reference."""
        return self.kind == "average" or self.refresh_every is not None


@dataclass
class Judge:
    """The judge in service; a mutable part of the state of a run."""

    config: JudgeConfig
    policy: Policy
    """In service."""
    slow: Policy | None = None
    """The slow average, where there is one; it is in service itself if nothing guards it."""
    version: int = 0
    """How often it was replaced or moved."""
    refused: int = 0
    """Candidates that were turned down."""

    @classmethod
    def start(cls, live: Policy, config: JudgeConfig) -> Self:
        """Of the weights that the run begins with; a judge that moves has copies of its own."""
        if not config.moves:
            return cls(config, live.frozen())
        policy = live.twin()
        if config.kind == "reference":
            return cls(config, policy)
        return cls(config, policy, policy if config.refresh_every is None else live.twin())

    def after_step(self, step: int, live: Policy, average: Policy, questions: Sequence[Prompt]) -> dict[str, Any]:
        """Follows the live weights and, when it is time, tries a candidate; what there is to log.

        ``step``: steps done. ``questions``: held-out prompts with known answers, which decide.
        """
        if not self.config.moves:
            return {}
        if self.slow is not None:
            average_into(_module(self.slow), _module(live), self.config.decay)
        row: dict[str, Any] = {}
        if self.config.refresh_every is None:
            self.version += 1
        elif step % self.config.refresh_every == 0:
            row = self._refresh(self.slow if self.slow is not None else average, questions)
        return {"judge/version": self.version, **row}

    def _refresh(self, candidate: Policy, questions: Sequence[Prompt]) -> dict[str, Any]:
        present, proposed = (known_answers(policy, questions) for policy in (self.policy, candidate))
        row = {"judge/held_out": float(present.mean()), "judge/candidate_held_out": float(proposed.mean())}
        if not proposed.mean() >= present.mean():
            self.refused += 1
            return {**row, "judge/action": "refused", "judge/refused": self.refused}
        load_trained(_module(self.policy), trained_weights(_module(candidate)))
        self.version += 1
        return {**row, "judge/action": f"refreshed: {judge_identity(self.policy)}", "judge/refused": self.refused}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; empty where the judge is the reference, which the run keeps anyway."""
        if not self.config.moves:
            return {}
        tree: dict[str, Any] = {"version": self.version, "refused": self.refused}
        tree["policy"] = trained_weights(_module(self.policy))
        if self.slow is not None and self.slow is not self.policy:
            tree["slow"] = trained_weights(_module(self.slow))
        return tree

    def load(self, tree: Mapping[str, Any]) -> None:
        """Puts back what ``state`` gave, bit for bit."""
        if not tree:
            return
        self.version, self.refused = tree["version"], tree["refused"]
        load_trained(_module(self.policy), tree["policy"])
        if "slow" in tree and self.slow is not None:
            load_trained(_module(self.slow), tree["slow"])


def known_answers(policy: Policy, questions: Sequence[Prompt]) -> torch.Tensor:
    """How sure the reading side is of the right answers: exp of the mean log-prob per token, (B,) in [0, 1]."""
    answers = [str(prompt.answer) for prompt in questions]
    return policy.text_logprob([prompt.parts for prompt in questions], answers).exp().cpu()


def refresh_questions(config: JudgeConfig, prompts: Mapping[Any, Sequence[Prompt]]) -> list[Prompt]:
    """The held-out prompts that decide on a new judge; raises InputError where there are too few to decide."""
    found = [
        prompt
        for rows in prompts.values()
        for prompt in rows
        if prompt.answer is not None and prompt.output == ("text",)
    ]
    if config.refresh_every is not None and len(found) < MIN_QUESTIONS:
        raise InputError(
            f"judge.refresh_every={config.refresh_every}: only {len(found)} held-out questions with answers decide on "
            f"a new judge: give at least {MIN_QUESTIONS} in guard.prompts (and validation rows), or leave it out"
        )
    return found


MIN_QUESTIONS = 4
"""Fewer would decide by chance alone."""


def judge_drift(
    rewards: Sequence[RewardSource], groups: Sequence[Group], table: RewardTable, judge: Policy, live: Policy
) -> dict[str, float]:
    """What the live policy would have scored otherwise than the judge on the very same outputs.

    Per task and reward: ``judge_drift/TASK/REWARD``, the mean of live minus judge, and ``judge_agreement/TASK/REWARD``,
    their correlation inside groups. Rewards that score alike under both have no judge and are left out.
    """
    with torch.no_grad(), standing_in(judge_identity(judge)):
        own = score_groups(rewards, groups, live)
    out: dict[str, float] = {}
    for k, name in enumerate(table.names):
        both = table.mask[..., k] & own.mask[..., k]
        one, other = (torch.where(both, t.scores[..., k], 0.0) for t in (table, own))
        if torch.equal(one, other):
            continue
        for task in dict.fromkeys(table.tasks):
            rows = [p for p, found in enumerate(table.tasks) if found == task]
            if not both[rows].any():
                continue
            out[f"judge_drift/{task}/{name}"] = float((other - one)[rows][both[rows]].mean())
            agreement, groups_behind = group_correlation(one[rows], other[rows], both[rows])
            if groups_behind:
                out[f"judge_agreement/{task}/{name}"] = agreement
    return out


def _module(policy: Policy) -> nn.Module:
    assert isinstance(policy, nn.Module)
    return policy
