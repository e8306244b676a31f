"""Texts that met the length limit, for every reward that reads texts: no score, or that of a wrong answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from lvrpo.errors import InputError
from lvrpo.policies.base import Sampling
from lvrpo.rewards.agreement import Agreement
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.caption_back import CaptionBack
from lvrpo.rewards.config import RewardConfig
from lvrpo.rewards.success import successes
from lvrpo.rewards.table import build_rewards, score_groups
from lvrpo.rewards.verifiable_text import ExactAnswer
from lvrpo.rewards.vlm_endpoint import VLMEndpoint
from lvrpo.types import Group, Parts, Prompt, RewardTable, TextSegment

ASK = Prompt("q", "understand", (torch.full((3, 8, 8), 0.25), "what is it ?"), ("text",), answer="cube")
THINK = Prompt("r", "reason", ("1 + 2",), ("text", "image"), answer="3")
TRUNCATED = "the text was cut off at the length limit"
BLANK = torch.zeros(3, 8, 8)


class Judge:
    """Finds longer texts likelier."""

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        return torch.tensor([-1 / (1 + len(text) + len(str(c[-2]))) for c, text in zip(contexts, texts, strict=True)])


def cut(group: Group, *members: int) -> Group:
    """The group, with the texts of these members cut off."""

    def shorten(segment: Any) -> Any:
        return replace(segment, ended=False) if isinstance(segment, TextSegment) else segment

    return Group(
        group.prompt,
        tuple(
            replace(t, segments=tuple(map(shorten, t.segments))) if t.member in members else t
            for t in group.trajectories
        ),
    )


def scored(name: str, group: Group, **options: Any) -> RewardTable:
    sources = build_rewards([RewardConfig(name=name, options=options)])
    return score_groups(sources, [group], Judge())  # type: ignore[arg-type]  # a double


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("agreement", {}),
        ("knowledge", {}),
        ("exact_answer", {"cut_off": "mask"}),
    ],
)
def test_a_text_that_was_cut_off_is_masked_alone(name: str, options: dict[str, Any]) -> None:
    """The others score as if it had not been there."""
    outputs = [["cube"], ["a big red cube"], ["cube"], ["a big red cube"], ["a big red cube"]]
    table = scored(name, cut(offline_group(ASK, outputs), 1, 3), **options)
    alone = scored(name, offline_group(ASK, [outputs[g] for g in (0, 2, 4)]), **options)
    assert table.reasons == {(0, g, 0): f"failed: {TRUNCATED}" for g in (1, 3)}
    assert alone.mask.all()
    torch.testing.assert_close(table.scores[0, [0, 2, 4], 0], alone.scores[0, :, 0])


def test_texts_judged_by_an_endpoint(server: Any) -> None:
    reward = VLMEndpoint(endpoint=server.options(), ask="rating", template="{prompt} {answer}?")
    server.replies = ["9"]
    scores = reward.score([cut(offline_group(ASK, [["cube"], ["cube and"]]), 1)], None)  # type: ignore[arg-type]
    assert scores.values[0, 0] == pytest.approx(0.9)
    assert scores.failures == {(0, 1): TRUNCATED}
    assert len(server.bodies) == 1


def test_an_answer_that_never_ends_is_wrong() -> None:
    """Also where its words are right: masked it would cost nothing."""
    group = cut(offline_group(ASK, [["cube"], ["cube"], ["ball"]]), 1)
    scores = ExactAnswer().score([group], None)  # type: ignore[arg-type]
    assert scores.values.tolist() == [[1, 0, 0]]
    assert not scores.failures
    assert successes([group]) == [[1, 0, 0]]
    with pytest.raises(InputError, match=r"options\.cut_off=drop: must be 'mask' or 'score'"):
        build_rewards([RewardConfig(name="exact_answer", options={"cut_off": "drop"})])


def test_agreement_of_texts_that_never_end_is_none() -> None:
    group = cut(offline_group(ASK, [["a b"], ["a b"], ["a b"]]), 0, 1, 2)
    assert set(Agreement().score([group], None).failures.values()) == {TRUNCATED}  # type: ignore[arg-type]


def test_a_description_that_was_cut_off_does_not_count(group: Callable[..., Group]) -> None:
    draw = Prompt("d", "generate", ("draw a red cat",), ("image",))

    class Describer:
        def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
            assert sampling.group_size == 1
            return [cut(offline_group(prompt, [["red cat"]]), *self.cut) for prompt in prompts]

        def __init__(self, *cut: int) -> None:
            self.cut = cut

    drawn = [group(draw, [[BLANK]])]
    whole = CaptionBack().score(drawn, Describer())  # type: ignore[arg-type]
    assert whole.values.tolist() == [[pytest.approx(1.0)]]
    none = CaptionBack(max_new_tokens=5).score(drawn, Describer(0))  # type: ignore[arg-type]
    assert none.failures == {(0, 0): "the judge's description was cut off at 5 tokens"}
