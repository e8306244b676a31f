"""Encoder-free reward: the model's own frozen reading side is asked the questions that the prompt implies."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.types import Group, Parts, Prompt


class OwnVQA:
    """Mean over the prompt's facts of the judge's confidence in the right answer, given the picture alone.

    r = mean_k exp( mean-per-token log p_judge(answer_k | picture, question_k) ). Range [0, 1].
    No encoder is added: the judge is a frozen copy of the policy. It never sees the prompt, only its questions.
    """

    judges = ("image",)

    def applies(self, prompt: Prompt) -> bool:
        return "image" in prompt.output and bool(prompt.facts)

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        contexts: list[Parts] = []
        answers: list[str] = []
        counts: list[int] = []
        for group in groups:
            for trajectory in group.trajectories:
                image = trajectory.image
                assert image is not None
                counts.append(len(group.prompt.facts))
                for fact in group.prompt.facts:
                    contexts.append((image, fact.question))
                    answers.append(fact.answer)
        confidence = judge.text_logprob(contexts, answers).exp().cpu()
        values = torch.stack([part.mean() for part in confidence.split(counts)])
        return Scores(values.view(len(groups), -1))
