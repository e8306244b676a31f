from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.rewards.base import Scores
from lvrpo.rewards.conservative_ensemble import ConservativeEnsemble
from lvrpo.rewards.row import RewardConfig
from lvrpo.rewards.table import build_rewards
from lvrpo.types import Group, Prompt

DRAW = Prompt("d", "generate", ("a red circle",), ("image",))
ASK = Prompt("a", "understand", ("x",), ("text",))
BLANK = torch.zeros(3, 8, 8)


class Says:
    """Scores by member, with what is nan failing."""

    judges = ("image",)

    def __init__(self, *scores: float, noise: Sequence[float] | None = None) -> None:
        self.scores, self.noise = scores, noise

    def applies(self, prompt: Prompt) -> bool:
        return prompt.task == "generate"

    def score(self, groups: Sequence[Group], judge: Any) -> Scores:
        noise = None if self.noise is None else torch.tensor([self.noise for _ in groups])
        return Scores(torch.tensor([self.scores for _ in groups]), noise=noise)


def bound(*scores: Sequence[float], **options: Any) -> ConservativeEnsemble:
    made = ConservativeEnsemble(
        members=[{"name": "exact_answer", "label": str(i)} for i in range(len(scores))], **options
    )
    for source, values in zip(made.sources, scores, strict=True):
        object.__setattr__(source, "reward", Says(*values))
    return made


@pytest.fixture
def drawn(group: Callable[..., Group]) -> list[Group]:
    return [group(DRAW, [[BLANK], [BLANK + 1], [BLANK]])]


def test_disagreement_costs_by_hand(drawn: list[Group]) -> None:
    """Raw: members at (1, 3), (2, 2), (0, 4): means 2, deviations 1, 0, 2."""
    made = bound((1, 2, 0), (3, 2, 4), k=0.5, scale="raw")
    assert made.score(drawn, None).values.tolist() == [[1.5, 2.0, 1.0]]  # type: ignore[arg-type]
    assert bound((1, 2, 0), (3, 2, 4), k=0, scale="raw").score(drawn, None).values.tolist() == [[2.0, 2.0, 2.0]]  # type: ignore[arg-type]


def test_who_judges_its_members_is_who_judges_it(server: Any) -> None:
    rows = [{"name": "vlm_endpoint", "options": {"endpoint": server.options()}}, {"name": "caption_back"}]
    assert ConservativeEnsemble(members=rows).judged_by == (
        f"0 vlm_endpoint: judge-1 at {server.url}, temperature 0.0, 256 tokens"
    )
    assert bound((1, 2, 0), (3, 2, 4)).judged_by == ""


def test_members_of_different_units_count_alike(drawn: list[Group]) -> None:
    scaled = bound((0, 1, 2), (0, 100, 200)).score(drawn, None).values  # type: ignore[arg-type]
    assert scaled[0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5], abs=1e-3)


def test_an_output_that_fools_one_judge_gains_less(drawn: list[Group]) -> None:
    """One judge likes the first far more; of the second both think a little better."""
    values = bound((2, 1, 0), (0, 1, 0.5), scale="raw").score(drawn, None).values[0]  # type: ignore[arg-type]
    assert values[1] > values[0]


def test_one_failed_member_masks_the_output(drawn: list[Group]) -> None:
    scores = bound((1, 2, 0), (3, math.nan, 4), scale="raw").score(drawn, None)  # type: ignore[arg-type]
    assert set(scores.failures) == {(0, 1)}
    assert "1: the score is nan" in scores.failures[0, 1]


def with_noise(made: ConservativeEnsemble, member: int, *noise: float) -> ConservativeEnsemble:
    made.sources[member].reward.noise = noise  # type: ignore[attr-defined]  # Says
    return made


def test_noise_by_hand(drawn: list[Group]) -> None:
    """k = .5, members at (1, 3), (2, 2), (0, 4): slopes of the second (1 - .5) / 2, 1 / 2 and (1 - .5) / 2."""
    made = bound((1, 2, 0), (3, 2, 4), k=0.5, scale="raw")
    assert made.score(drawn, None).noise is None  # type: ignore[arg-type]
    noise = with_noise(made, 1, 0.16, 0.16, math.nan).score(drawn, None).noise  # type: ignore[arg-type]
    assert noise is not None
    assert noise[0, :2].tolist() == pytest.approx([0.01, 0.04])
    assert noise[0, 2].isnan()
    both = with_noise(made, 0, 0.16, 0.16, 0.16).score(drawn, None).noise  # type: ignore[arg-type]
    assert both is not None
    assert both[0, :2].tolist() == pytest.approx([0.01 + 0.09, 0.08])  # the first: (1 + .5) / 2


def test_noise_follows_the_scale_of_the_group(drawn: list[Group]) -> None:
    """Both members at -1.22, 0, 1.22: slopes of 1 / 2; the second was divided by its deviation, 81.6."""
    made = with_noise(bound((0, 1, 2), (0, 100, 200)), 1, 100.0, 200.0, 400.0)
    noise = made.score(drawn, None).noise  # type: ignore[arg-type]
    assert noise is not None
    assert noise[0, 1].item() == pytest.approx(200 / 4 / (20000 / 3), rel=1e-3)
    same = with_noise(bound((0, 1, 2), (5, 5, 5), k=0), 1, 1.0, 1.0, 1.0).score(drawn, None).noise  # type: ignore[arg-type]
    assert same is not None
    assert same.tolist() == [[0, 0, 0]]  # a member that is the same for all has no say


def test_it_applies_where_a_member_does_and_judges_what_they_do() -> None:
    made = ConservativeEnsemble(members=[{"name": "self_vqa"}, {"name": "caption_back"}])
    assert made.applies(DRAW)
    assert not made.applies(ASK)
    assert made.judges == ("image",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"members": [{"name": "self_vqa"}]}, "must have at least 2 entries"),
        (
            {"members": [{"name": "self_vqa"}, {"name": "self_vqa", "weight": 2}]},
            r"1.weight: not here",
        ),
        (
            {"members": [{"name": "self_vqa"}, {"nmae": "self_vqa"}]},
            r"1.nmae: unknown key: did you mean .*name",
        ),
        ({"members": [{"name": "self_vqa"}, {"name": "self_vqe"}]}, "self_vqa"),
        ({"members": [{"name": "self_vqa"}] * 2, "k": -1}, "options.k=-1: must be >= 0"),
        ({"members": [{"name": "self_vqa"}] * 2, "scale": "rank"}, "options.scale=rank: must be 'group' or 'raw'"),
    ],
)
def test_wrong_members_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name="conservative_ensemble", options=options)])
