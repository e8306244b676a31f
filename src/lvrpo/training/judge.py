"""The judge of a run: frozen weights that score outputs, its refresh, and the drift of the policy from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from lvrpo.algorithms import group_correlation
from lvrpo.config import Config
from lvrpo.distributed import gather
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy, require_method
from lvrpo.rewards.base import Side, judge_fingerprint, override_fingerprint
from lvrpo.rewards.config import ConfiguredReward
from lvrpo.sampling import derive_seed
from lvrpo.training.data_parallel import score_local
from lvrpo.training.policies import Policies, SetName
from lvrpo.types import Example, Group, Image, Prompt, RewardTable


class JudgeConfig(Config):
    """The weights of the judge, which are never those of the trained policy."""

    kind: Literal["reference", "average"] = "reference"
    """reference: the initial weights; average: a slow EMA of the trained weights."""
    decay: float = Field(default=0.99, ge=0, lt=1)
    """Decay of the slow EMA per step."""
    refresh_every: int | None = Field(default=None, ge=1)
    """Steps between two refreshes, which replace the judge by a candidate unless that is worse on held-out rows
    (``JudgeRows``); the candidate is the evaluated EMA (kind reference) or the slow EMA (kind average). None: the
    reference is fixed, and the slow EMA is the judge without this check."""
    drift_every: int | None = Field(default=None, ge=0)
    """Steps between two measurements of judge drift: the policy scores the same outputs, and the difference is logged.
    None: at every validation; 0: never."""

    @model_validator(mode="after")
    def _decay_is_used(self) -> Self:
        if self.kind == "reference" and self.decay != type(self).model_fields["decay"].default:
            raise ValueError(f"decay={self.decay}: applies to the slow average: set kind to average, or leave it out")
        return self

    def drift_due(self, step: int, validates: bool) -> bool:
        """Whether drift is measured in a step (counted from 1)."""
        if self.drift_every is None:
            return validates
        return self.drift_every > 0 and step % self.drift_every == 0

    @property
    def is_refreshed(self) -> bool:
        """Whether the judge can differ from the reference."""
        return self.kind == "average" or self.refresh_every is not None


NUM_DRAWS = 4
"""Noise samples per held-out image."""


@dataclass(frozen=True)
class JudgeRows:
    """Held-out rows on which candidates for the judge are evaluated, for each side that rewards use."""

    questions: Sequence[Prompt] = ()
    """Questions with answers, for the understanding side."""
    images: Sequence[Example] = ()
    """Images with descriptions, for the generation side."""

    def measures(self) -> dict[str, Callable[[Policy], torch.Tensor]]:
        """Evaluation functions by name; each returns scores (B,) in [0, 1], higher is better."""
        found: dict[str, Callable[[Policy], torch.Tensor]] = {}
        if self.questions:
            found["held_out"] = lambda policy: answer_probability(policy, self.questions)
        if self.images:
            found["held_out_generation"] = lambda policy: description_posterior(policy, self.images)
        return found


NO_JUDGE_ROWS = JudgeRows()


@dataclass
class JudgeRefresh:
    """A judge that is refreshed; a mutable part of the state of a run. Its weights are sets of ``Policies``."""

    config: JudgeConfig
    version: int = 0
    """Number of replacements, or of EMA updates without refresh."""
    refused: int = 0
    """Number of refused candidates."""

    @property
    def sets(self) -> tuple[SetName, ...]:
        """Its weight set, and that of the slow EMA if it is a candidate."""
        has_candidate = self.config.kind == "average" and self.config.refresh_every is not None
        return ("judge", "judge_ema") if has_candidate else ("judge",)

    def update(self, step: int, policies: Policies, held_out: JudgeRows) -> dict[str, Any]:
        """Updates the slow EMA and refreshes the judge if due; returns metrics. Collective. ``step``: steps done."""
        slow = self.sets[-1] if self.config.kind == "average" else None
        if slow is not None:
            policies.weights.lerp(slow, self.config.decay)
        row: dict[str, Any] = {}
        if self.config.refresh_every is None:
            self.version += 1
        elif step % self.config.refresh_every == 0:
            row = self._refresh(policies, slow or "ema", held_out)
        return {"judge/version": self.version, **row}

    def _refresh(self, policies: Policies, candidate: SetName, held_out: JudgeRows) -> dict[str, Any]:
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
        accepted = gather(bool(no_worse) and all(no_worse))[0]  # ranks may round differently
        if not accepted:
            self.refused += 1
            return {**row, "judge/action": "refused", "judge/refused": self.refused}
        policies.weights.copy("judge", candidate)
        self.version += 1
        with policies.use("judge") as policy:
            identity = judge_fingerprint(policy)
        return {**row, "judge/action": f"refreshed: {identity}", "judge/refused": self.refused}

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, which stores its weights with the others."""
        return {"version": self.version, "refused": self.refused}

    def load(self, tree: Mapping[str, Any]) -> None:
        """Restores ``state``."""
        self.version, self.refused = tree["version"], tree["refused"]


def answer_probability(policy: Policy, questions: Sequence[Prompt]) -> torch.Tensor:
    """Probability of the right answers: exp of the mean log-prob per token, (B,) in [0, 1]."""
    answers = [str(prompt.answer) for prompt in questions]
    return (
        require_method(policy, "text_logprob").text_logprob([prompt.parts for prompt in questions], answers).exp().cpu()
    )


def description_posterior(policy: Policy, examples: Sequence[Example]) -> torch.Tensor:
    """Posterior probability of an image's own description against that of another image, (B,) in [0, 1].

        p_i = 1 / (1 + exp(-m_i)),  m_i = mean_k [ log p(x_i | c_i, noise_k) - log p(x_i | c_j, noise_k) ],

    for two equally likely descriptions. It is bounded, so no image dominates the mean, and finer than an accuracy. Both
    descriptions, and all compared policies, share the noise. c_j: a hard negative, the next image of the same category
    with another description.
    """
    positives = [example.prompt.parts for example in examples]
    contexts = positives + [examples[j].prompt.parts for j in _hard_negatives(examples)]
    images = [target_image(example) for example in examples] * 2
    seeds = [derive_seed("told pictures", example.prompt.id) for example in examples] * 2
    judged = require_method(policy, "image_logprob").image_logprob(contexts, images, NUM_DRAWS, seeds)
    right, other = judged.mean(dim=1).cpu().chunk(2)
    return (right - other).sigmoid()


def _hard_negatives(examples: Sequence[Example]) -> list[int]:
    """For each image, the index of the next one with another description, of the same category if there is one."""
    texts = [example.prompt.text for example in examples]
    category = [example.prompt.category for example in examples]
    n, found = len(examples), []
    for i in range(n):
        differ = [j % n for j in range(i + 1, i + n) if texts[j % n] != texts[i]]
        found.append(next((j for j in differ if category[j] == category[i]), differ[0]))
    return found


def target_image(example: Example) -> Image:
    """The image among the target outputs."""
    return next(output for output in example.outputs if not isinstance(output, str))


def used_sides(rewards: Sequence[ConfiguredReward]) -> set[Side]:
    """The sides (read, draw) of the judge that rewards use."""
    return {side for source in rewards for side in source.sides}


def require_judge_used(config: JudgeConfig, rewards: Sequence[ConfiguredReward]) -> None:
    """Raises InputError for settings of a judge that no reward uses."""
    if used_sides(rewards):
        return
    for name, value in (("refresh_every", config.refresh_every), ("drift_every", config.drift_every)):
        if value:
            raise InputError(f"judge.{name}={value}: no reward asks the run's judge, so it has no effect: leave it out")


def build_judge_rows(
    config: JudgeConfig,
    rewards: Sequence[ConfiguredReward],
    prompts: Mapping[Any, Sequence[Prompt]],
    examples: Callable[[], Sequence[Example]],
) -> JudgeRows:
    """The rows on which candidates are evaluated, for the sides that rewards use; empty without refresh.

    ``prompts``: held-out prompts by task; ``examples``: returns held-out images with descriptions. Raises InputError
    if there are too few.
    """
    if config.refresh_every is None:
        return JudgeRows()
    sides = used_sides(rewards)
    questions = judge_questions(config, prompts) if "read" in sides else []
    images = list(examples()) if "draw" in sides else []
    if "draw" in sides and (len(images) < MIN_QUESTIONS or len({e.prompt.text for e in images}) < 2):
        raise InputError(
            f"judge.refresh_every={config.refresh_every}: a reward asks the generation side of the judge, and only "
            f"{len(images)} held-out images with descriptions decide on a new one: give validation rows of task "
            f"'generate' a target, at least {MIN_QUESTIONS} of two descriptions, or leave it out"
        )
    return JudgeRows(questions, images)


def judge_questions(config: JudgeConfig, prompts: Mapping[Any, Sequence[Prompt]]) -> list[Prompt]:
    """The held-out prompts with answers and text output; raises InputError if there are too few for a refresh."""
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
"""Minimum number of held-out questions, or images, for a refresh."""


def judge_drift(
    rewards: Sequence[ConfiguredReward], groups: Sequence[Group], table: RewardTable, policies: Policies
) -> dict[str, float]:
    """Difference of the scores of the policy from those of the judge on the same outputs.

    Per task and reward: ``judge_drift/TASK/REWARD``, the mean of policy minus judge, ``judge_agreement/TASK/REWARD``,
    their correlation inside groups. Rewards that do not use the judge, or have equal scores, are left out.
    """
    judged = [source for source in rewards if source.sides]
    if not judged:
        return {}
    with torch.no_grad(), override_fingerprint(table.judge), policies.use("policy") as policy:
        by_policy = score_local(judged, groups, policy)
    out: dict[str, float] = {}
    for k, name in enumerate(by_policy.names):
        column = table.names.index(name)
        both = table.mask[..., column] & by_policy.mask[..., k]
        one, other = torch.where(both, table.scores[..., column], 0.0), torch.where(both, by_policy.scores[..., k], 0.0)
        if torch.equal(one, other):
            continue
        for task in dict.fromkeys(table.tasks):
            rows = [p for p, found in enumerate(table.tasks) if found == task]
            if not both[rows].any():
                continue
            out[f"judge_drift/{task}/{name}"] = float((other - one)[rows][both[rows]].mean())
            agreement, num_groups = group_correlation(one[rows], other[rows], both[rows])
            if num_groups:
                out[f"judge_agreement/{task}/{name}"] = agreement
    return out
