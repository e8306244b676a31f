"""The published knowledge reward: a model that answers questions about pictures is asked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch

from lvrpo.config import Config
from lvrpo.policies.base import Policy
from lvrpo.rewards.answers import text_problem
from lvrpo.rewards.base import Scores, Side, no_logprob, probabilities
from lvrpo.rewards.external import OWN, ExternalVLM, ReaderSource, folder_identity
from lvrpo.rewards.identity import judged_by
from lvrpo.rewards.own_vqa import Choices, Failures, OwnVQA, Reader
from lvrpo.rewards.questions import SplitConfig
from lvrpo.types import Group, Parts, Prompt


class Knowledge(Config):
    """Answers of a model of visual questions (LVRPO, arXiv:2603.27693, the term r_kn). Range [0, 1].

    Of a drawing: its mean confidence in the right answers to the prompt's questions, as ``own_vqa`` has it. Of a text
    about pictures: its confidence in that text as the answer, exp(mean log-prob per token).

    With the own source, the confidence in texts rewards what the policy says anyway: where answers are known,
    ``exact_answer`` is the better teacher. A text that is empty or was cut off is masked.
    """

    judges: ClassVar = ("image",)

    source: ReaderSource = OWN
    """Who reads: "own", the policy's frozen reading side; or a local folder of a model of ``transformers`` that reads
    pictures, as in the paper (``pip install 'lvrpo[external]'``)."""
    choices: Choices | None = None
    """As that of ``own_vqa``."""
    split: SplitConfig | None = None
    """As that of ``own_vqa``."""
    device: str = "auto"
    """Where the model of ``source`` runs."""
    _vqa: OwnVQA

    def model_post_init(self, context: Any) -> None:  # Any: pydantic's
        self._vqa = OwnVQA(choices=self.choices, split=self.split)

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("read",) if self.source == OWN else ()

    @cached_property
    def judged_by(self) -> str:
        return judged_by("" if self.source == OWN else folder_identity(Path(self.source)), self._vqa)

    @cached_property
    def _reader(self) -> Reader | None:
        """None: the judge reads. Loaded when it is first asked."""
        return None if self.source == OWN else ExternalVLM(self.source, self.device)

    def applies(self, prompt: Prompt) -> bool:
        if "image" in prompt.output:
            return self._vqa.applies(prompt)
        return any(not isinstance(part, str) for part in prompt.parts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        reader: Reader = self._reader or judge
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: Failures = {}
        drawn = [p for p, group in enumerate(groups) if "image" in group.prompt.output]
        if drawn:
            found, missing = self._vqa.confidences([groups[p] for p in drawn], judge, reader)
            for (i, g), confidences in found.items():
                values[drawn[i], g] = confidences.mean()
            failures |= {(drawn[i], g): reason for (i, g), reason in missing.items()}
        rows: list[tuple[int, int, Parts, str]] = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories if p not in drawn else ()):
                if problem := text_problem(trajectory):
                    failures[p, g] = problem
                else:
                    rows.append((p, g, group.prompt.parts, trajectory.text or ""))
        if rows:
            logprobs = reader.text_logprob([parts for _, _, parts, _ in rows], [text for *_, text in rows])
            found = zip(rows, logprobs.tolist(), probabilities(logprobs).cpu(), strict=True)
            for (p, g, _, _), logprob, probability in found:
                values[p, g] = probability
                if problem := no_logprob(logprob):
                    failures[p, g] = problem
        return Scores(values, failures)
