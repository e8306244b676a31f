"""The judge of a run: frozen weights that score outputs, how they may be renewed, and how far the policy is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lvrpo.algorithms import group_correlation
from lvrpo.config import Config
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Side, judge_fingerprint, override_fingerprint
from lvrpo.rewards.questions import text_of
from lvrpo.rewards.row import RewardSource
from lvrpo.sampling import derive_seed
from lvrpo.training.data_parallel import score_local
from lvrpo.training.policies import Policies, SetName
from lvrpo.types import Example, Group, Image, Prompt, RewardTable


class JudgeConfig(Config):
    """Who scores outputs: never the policy that is trained."""

    kind: Literal["reference", "average"] = "reference"
    """reference: the weights that the run began with; average: a slow moving average of the trained weights."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the slow average, per step."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Every so many steps the judge is replaced by a candidate, if that is no worse on held-out rows at what rewards
    ask of it (``HeldOut``): by the evaluated average (kind reference) or by the slow average (kind average). None: a
    reference stays what it is, and a slow average judges while it moves, unguarded."""
    drift_every: int | None = Field(default=None, ge=0)
    """Every so many steps the policy scores the outputs of the step too, for the rewards that ask the judge, and
    what it says otherwise is logged. None: at every validation; 0: never."""

    @model_validator(mode="after")
    def _decay_is_used(self) -> Self:
        if self.kind == "reference" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError(f"decay={self.decay}: is of the slow average: set kind to average, or leave it out")
        return self

    def drift_due(self, step: int, validation_looks: bool) -> bool:
        """Whether drift is measured in a step (counted from 1)."""
        if self.drift_every is None:
            return validation_looks
        return self.drift_every > 0 and step % self.drift_every == 0

    @property
    def moves(self) -> bool:
        """Whether the judge can become another one than the reference."""
        return self.kind == "average" or self.refresh_every is not None


DRAWS = 4
"""Noises under which the drawing side is asked about each held-out picture."""


@dataclass(frozen=True)
class HeldOut:
    """What decides on a new judge: rows that nothing is trained on, for each side that a reward asks."""

    questions: Sequence[Prompt] = ()
    """With known answers, for the reading side."""
    pictures: Sequence[Example] = ()
    """Drawings with their descriptions, for the drawing side."""

    def measures(self) -> dict[str, Callable[[Policy], torch.Tensor]]:
        """By name, how well a policy does on the rows: the higher the better, each (B,) in [0, 1]."""
        found: dict[str, Callable[[Policy], torch.Tensor]] = {}
        if self.questions:
            found["held_out"] = lambda policy: known_answers(policy, self.questions)
        if self.pictures:
            found["held_out_drawing"] = lambda policy: told_pictures(policy, self.pictures)
        return found


NOTHING_HELD_OUT = HeldOut()


@dataclass
class Judge:
    """A judge that is renewed; a mutable part of the state of a run. Its weights are sets of the run's policies."""

    config: JudgeConfig
    version: int = 0
    """How often it was replaced or moved."""
    refused: int = 0
    """Candidates that were turned down."""

    @property
    def sets(self) -> tuple[SetName, ...]:
        """Its weights, and those of a slow average that waits to replace it; both begin as the policy's."""
        waits = self.config.kind == "average" and self.config.refresh_every is not None
        return ("judge", "judge_ema") if waits else ("judge",)

    def after_step(self, step: int, policies: Policies, held_out: HeldOut) -> dict[str, Any]:
        """Follows the policy and, when it is time, tries a candidate; what there is to log.

        ``step``: steps done. ``held_out``: what decides. Called by all ranks.
        """
        slow = self.sets[-1] if self.config.kind == "average" else None
        if slow is not None:
            policies.weights.lerp(slow, self.config.decay)
        row: dict[str, Any] = {}
        if self.config.refresh_every is None:
            self.version += 1
        elif step % self.config.refresh_every == 0:
            row = self._refresh(policies, slow or "ema", held_out)
        return {"judge/version": self.version, **row}

    def _refresh(self, policies: Policies, candidate: SetName, held_out: HeldOut) -> dict[str, Any]:
        row: dict[str, Any] = {}
        no_worse = []
        for name, measure in held_out.measures().items():
            found: list[float] = []
            for weights in ("judge", candidate):
                with policies.use(weights) as policy:
                    found.append(float(measure(policy).mean()))
            present, proposed = found
            row |= {f"judge/{name}": present, f"judge/candidate_{name}": proposed}
            no_worse.append(proposed >= present)  # False for a candidate without numbers
        if not no_worse or not all(no_worse):
            self.refused += 1
            return {**row, "judge/action": "refused", "judge/refused": self.refused}
        policies.weights.copy("judge", candidate)
        self.version += 1
        with policies.use("judge") as policy:
            identity = judge_fingerprint(policy)
        return {**row, "judge/action": f"refreshed: {identity}", "judge/refused": self.refused}

    def state(self) -> dict[str, Any]:
        """For a checkpoint, which has its weights among the others."""
        return {"version": self.version, "refused": self.refused}

    def load(self, tree: Mapping[str, Any]) -> None:
        """Puts back what ``state`` gave."""
        self.version, self.refused = tree["version"], tree["refused"]


def known_answers(policy: Policy, questions: Sequence[Prompt]) -> torch.Tensor:
    """How sure the reading side is of the right answers: exp of the mean log-prob per token, (B,) in [0, 1]."""
    answers = [str(prompt.answer) for prompt in questions]
    return policy.text_logprob([prompt.parts for prompt in questions], answers).exp().cpu()


def told_pictures(policy: Policy, pictures: Sequence[Example]) -> torch.Tensor:
    """How sure the drawing side is which of two descriptions a picture has: its own, or that of the next one, (B,).

        p_i = 1 / (1 + exp(-m_i)),  m_i = mean_k [ log p(x_i | c_i, noise_k) - log p(x_i | c_j, noise_k) ],

    the posterior probability of the right one of two equally likely texts, in [0, 1]: a number as ``known_answers`` has
    it, no picture of which can outweigh the others, as it could in a mean of nats, and that moves where the share of
    pictures told rightly does not. Both texts, and all policies compared, meet the same noise, so that their
    difference is one of weights. c_j: of the next picture of the same category with another description, the hardest
    that is at hand without making one.
    """
    own = [example.prompt.parts for example in pictures]
    contexts = own + [pictures[j].prompt.parts for j in _others(pictures)]
    images = [drawing_of(example) for example in pictures] * 2
    seeds = [derive_seed("told pictures", example.prompt.id) for example in pictures] * 2
    right, other = policy.image_logprob(contexts, images, DRAWS, seeds).mean(dim=1).cpu().chunk(2)
    return (right - other).sigmoid()


def _others(pictures: Sequence[Example]) -> list[int]:
    """For each picture the place of the next one with another description, of its own category if there is one."""
    said = [text_of(example.prompt) for example in pictures]
    category = [example.prompt.category for example in pictures]
    n, found = len(pictures), []
    for i in range(n):
        differ = [j % n for j in range(i + 1, i + n) if said[j % n] != said[i]]
        found.append(next((j for j in differ if category[j] == category[i]), differ[0]))
    return found


def drawing_of(example: Example) -> Image:
    """The drawing among its outputs."""
    return next(output for output in example.outputs if not isinstance(output, str))


def sides_asked(rewards: Sequence[RewardSource]) -> set[Side]:
    """The sides of the run's judge that its rewards ask."""
    return {side for source in rewards for side in source.sides}


def require_asked(config: JudgeConfig, rewards: Sequence[RewardSource]) -> None:
    """Raises InputError for settings of a judge that no reward asks."""
    if sides_asked(rewards):
        return
    for name, value in (("refresh_every", config.refresh_every), ("drift_every", config.drift_every)):
        if value:
            raise InputError(f"judge.{name}={value}: no reward asks the run's judge, so it has no effect: leave it out")


def held_out_rows(
    config: JudgeConfig,
    rewards: Sequence[RewardSource],
    prompts: Mapping[Any, Sequence[Prompt]],
    examples: Callable[[], Sequence[Example]],
) -> HeldOut:
    """What decides on a new judge, for the sides that the rewards ask; nothing where none is tried.

    ``prompts``: held-out prompts by task; ``examples``: gives held-out drawings with descriptions. Raises InputError
    where there are too few to decide.
    """
    if config.refresh_every is None:
        return HeldOut()
    sides = sides_asked(rewards)
    questions = refresh_questions(config, prompts) if "read" in sides else []
    pictures = list(examples()) if "draw" in sides else []
    if "draw" in sides and (len(pictures) < MIN_QUESTIONS or len({text_of(e.prompt) for e in pictures}) < 2):
        raise InputError(
            f"judge.refresh_every={config.refresh_every}: a reward asks the drawing side of the judge, and only "
            f"{len(pictures)} held-out drawings with descriptions decide on a new one: give validation rows of task "
            f"'generate' a target, at least {MIN_QUESTIONS} of two descriptions, or leave it out"
        )
    return HeldOut(questions, pictures)


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
            f"a new judge: give at least {MIN_QUESTIONS} in validation.prompts (and validation rows), or leave it out"
        )
    return found


MIN_QUESTIONS = 4
"""Fewer would decide by chance alone."""


def judge_drift(
    rewards: Sequence[RewardSource], groups: Sequence[Group], table: RewardTable, policies: Policies
) -> dict[str, float]:
    """What the policy would have scored otherwise than the judge on the very same outputs.

    Per task and reward: ``judge_drift/TASK/REWARD``, the mean of policy minus judge, ``judge_agreement/TASK/REWARD``,
    their correlation inside groups. Rewards that do not ask the judge are not scored again, and those that score alike
    under both are left out.
    """
    asking = [source for source in rewards if source.sides]
    if not asking:
        return {}
    with torch.no_grad(), override_fingerprint(table.judge), policies.use("policy") as policy:
        own = score_local(asking, groups, policy)
    out: dict[str, float] = {}
    for k, name in enumerate(own.names):
        known = table.names.index(name)
        both = table.mask[..., known] & own.mask[..., k]
        one, other = torch.where(both, table.scores[..., known], 0.0), torch.where(both, own.scores[..., k], 0.0)
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
