"""Success of an output: right or wrong by the task's own rule or the prompt, else the score of the rewards."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lvrpo.errors import ContractError, LvrpoError, describe_error
from lvrpo.policies.base import Judge
from lvrpo.rewards.config import ConfiguredReward, checked_scores
from lvrpo.rewards.table import NOT_APPLICABLE, score_groups
from lvrpo.rewards.verifiable_image import fact_table
from lvrpo.rewards.verifiable_text import is_right_answer
from lvrpo.types import Group, Prompt


def has_success(prompt: Prompt) -> bool:
    """Whether success is defined: a text with an answer, an image with facts that a verifier can check."""
    if "image" in prompt.output and not (prompt.facts and all(fact.check for fact in prompt.facts)):
        return False
    return "image" in prompt.output or prompt.answer is not None


def successes(groups: Sequence[Group]) -> list[list[float]]:
    """Per group and member 1.0 or 0.0: the text is the answer, where there is one, and all facts hold of the image.

    A text that was cut off at the length limit is not the answer. Only for prompts that are ``has_success``. Raises
    ContractError where a world of the user fails.
    """
    drawn = [group for group in groups if "image" in group.prompt.output]
    facts = iter(_fact_table(drawn))
    out = []
    for group in groups:
        row = []
        for trajectory in group.trajectories:
            right = True
            if trajectory.prompt.answer is not None and "text" in trajectory.prompt.output:
                right = is_right_answer(trajectory)
            if "image" in group.prompt.output:
                right = all(next(facts)) and right
            row.append(float(right))
        out.append(row)
    return out


def _fact_table(groups: Sequence[Group]) -> list[list[bool]]:
    try:
        return fact_table(groups) if groups else []
    except LvrpoError:
        raise
    except (Exception, SystemExit) as error:  # code of the user may raise anything
        worlds = ", ".join(dict.fromkeys(group.prompt.world for group in groups))
        raise ContractError(f"world {worlds}: could not check an image: {describe_error(error)}: correct it") from error


Metric = Literal["success", "reward"]
"""success: 1 or 0; reward: the weighted mean of the run's trained rewards, in their own units."""


@dataclass(frozen=True)
class HeldOutScorer:
    """Scores outputs of held-out prompts, for validation and for every evaluation."""

    rewards: tuple[ConfiguredReward, ...] = ()
    """Rewards of the run; those of weight 0 and those that only compare members of a group are not used."""
    success: ConfiguredReward | None = None
    """The task's own metric of success; where it is None or does not apply, the prompt's answer and facts decide."""

    @property
    def rule(self) -> str:
        """The name and options of the task's own metric; "" where there is none."""
        config = None if self.success is None else self.success.config
        return "" if config is None else f"{config.name} {json.dumps(config.options, sort_keys=True, default=str)}"

    def metric(self, prompt: Prompt) -> Metric | None:
        """The metric of a prompt's outputs; None: nothing can score them."""
        if self._is_own(prompt) or has_success(prompt):
            return "success"
        return "reward" if any(r.scores(prompt) for r in self._counted) else None

    def scores(self, groups: Sequence[Group], judge: Judge | None = None) -> tuple[list[list[float]], dict[int, str]]:
        """Per group and member its score, nan where a rule or a reward failed, and by group why one failed.

        ``judge``: a frozen policy, for the rewards. How many may fail is for the caller to say, who has all outputs.

        A reward counts with its configured weight, w_k: sum_k w_k r_k / sum_k w_k over those that score the prompt.
        """
        found, reasons = self._successes(groups)
        rest = [p for p in range(len(groups)) if p not in found]
        if rest:
            values, failed = self._rewarded([groups[p] for p in rest], judge)
            found |= dict(zip(rest, values, strict=True))
            reasons |= {rest[p]: why for p, why in failed.items()}
        return [found[p] for p in range(len(groups))], reasons

    def successes(self, groups: Sequence[Group]) -> dict[int, list[float]]:
        """1.0 or 0.0 of every member by group, for the groups whose success is defined; nan where it failed.

        Raises ContractError for another value.
        """
        return self._successes(groups)[0]

    def _successes(self, groups: Sequence[Group]) -> tuple[dict[int, list[float]], dict[int, str]]:
        is_own = [self._is_own(group.prompt) for group in groups]
        own = [p for p, applies in enumerate(is_own) if applies]
        right = [p for p, group in enumerate(groups) if not is_own[p] and has_success(group.prompt)]
        found = dict(zip(right, successes([groups[p] for p in right]), strict=True))
        values, reasons = self._own([groups[p] for p in own])
        return found | dict(zip(own, values, strict=True)), {own[p]: why for p, why in reasons.items()}

    def _is_own(self, prompt: Prompt) -> bool:
        return self.success is not None and self.success.scores(prompt)

    def _own(self, groups: Sequence[Group]) -> tuple[list[list[float]], dict[int, str]]:
        if self.success is None or not groups:
            return [], {}
        no_judge: Any = None  # a rule calls none
        scores = checked_scores(self.success, groups, no_judge)
        values, failures = scores.values, scores.failures
        for cell in failures:
            values[cell] = math.nan
        named, known = f"success {self.success.config.title!r}", values[values.isfinite()].tolist()
        graded = next((value for value in known if value not in (0, 1)), None)
        if graded is not None:
            raise ContractError(f"{named} is {graded:g}: must be true or false, 1 or 0: a graded score is a reward")
        return values.tolist(), {p: f"{named}: {why}" for (p, _), why in failures.items()}

    @property
    def _counted(self) -> list[ConfiguredReward]:
        """The rewards that count."""
        return [r for r in self.rewards if r.config.weight and not r.relative]

    def _rewarded(self, groups: Sequence[Group], judge: Judge | None) -> tuple[list[list[float]], dict[int, str]]:
        sources = self._counted
        scored = [[r.scores(group.prompt) for r in sources] for group in groups]
        if judge is None or not all(map(any, scored)):
            raise ContractError("a held-out prompt without an answer: nothing scores its outputs")
        table = score_groups(sources, groups, judge)
        applies = torch.tensor(scored)[:, None]
        weights = torch.tensor([r.config.weight for r in sources]) * applies
        reasons = {p: why.removeprefix("failed: ") for (p, _, _), why in table.reasons.items() if why != NOT_APPLICABLE}
        scores = (table.scores * weights).sum(dim=-1) / weights.sum(dim=-1)
        return torch.where((table.mask | ~applies).all(dim=-1), scores, math.nan).tolist(), reasons


SUCCESS_ONLY = HeldOutScorer()
"""Scores right and wrong alone."""
