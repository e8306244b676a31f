"""Groups of outputs made by hand, and a judge whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from lvrpo.types import FlowSegment, Group, Image, Parts, Prompt, Segment, TextSegment, Trajectory


def text_segment(text: str) -> TextSegment:
    return TextSegment(torch.zeros(1, dtype=torch.int64), torch.zeros(1), 1.0, text, True)


def flow_segment(image: Image) -> FlowSegment:
    none = torch.zeros(0, 1, 1)
    return FlowSegment(
        torch.zeros(1, 1), torch.zeros(2), (), none, none, torch.zeros(0), "ode", 0.0, 1.0, 1.0, "none", "mean", image
    )


def make_group(prompt: Prompt, outputs: Sequence[Sequence[str | Image]]) -> Group:
    """One member per entry of ``outputs``."""
    trajectories = []
    for member, parts in enumerate(outputs):
        segments: list[Segment] = [text_segment(p) if isinstance(p, str) else flow_segment(p) for p in parts]
        trajectories.append(Trajectory(prompt, member, tuple(segments), seed=member))
    return Group(prompt, tuple(trajectories))


class FakeJudge:
    """Answers from a table (mean of the picture, question, answer) -> probability, and notes what it was asked."""

    def __init__(self, table: dict[tuple[float, str, str], float]) -> None:
        self.table = table
        self.asked: list[tuple[Parts, str]] = []

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.asked += zip(contexts, texts, strict=True)
        out = []
        for (image, question), answer in zip(contexts, texts, strict=True):
            assert isinstance(image, torch.Tensor)
            out.append(self.table[round(float(image.mean()), 3), str(question), answer])
        return torch.tensor(out).log()


@pytest.fixture
def group() -> Callable[[Prompt, Sequence[Sequence[str | Image]]], Group]:
    return make_group


@pytest.fixture
def judge() -> Callable[[dict[tuple[float, str, str], float]], FakeJudge]:
    return FakeJudge
