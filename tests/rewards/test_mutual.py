from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.data.scenes.statements import Statement, statement
from lvrpo.errors import InputError
from lvrpo.policies.loading import load_policy
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.rewards.gate import Gate, Sensitivity, read_gate
from lvrpo.rewards.given import given_group
from lvrpo.rewards.identity import judge_identity
from lvrpo.rewards.mutual import BLANK, Mutual, estimate_noise
from lvrpo.rewards.table import RewardConfig, build_rewards, score_groups
from lvrpo.types import Fact, Group, Image, Parts, Prompt

BITS = 6
FACTS = tuple(Fact(f"kind{k % 2}", f"fact {k} ?", "yes") for k in range(BITS))
DRAW = Prompt("d", "generate", ("draw six facts",), ("image",), facts=FACTS)


def picture(bits: Sequence[float]) -> Image:
    """A picture that shows which facts hold, one column each."""
    return torch.tensor(bits, dtype=torch.float32).expand(3, 4, len(bits)).clone()


class World:
    """A judge whose likelihoods are known: each fact is seen right with probability .9, a blank one says nothing."""

    identity = "world"

    def __init__(self, chance: float = 0.0) -> None:
        self.chance = chance
        self.read = self.drawn = 0

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        self.read += len(texts)
        return torch.tensor([self.read_one(c, text) for c, text in zip(contexts, texts, strict=True)])

    def read_one(self, context: Parts, text: str) -> float:
        *images, question = context
        image = images[-1]
        assert isinstance(image, torch.Tensor)
        if str(question).startswith("fact"):
            bit = float(image[0, 0, int(str(question).split()[1])])
            return math.log(0.5 if bit == BLANK else 0.9 if bit > BLANK else 0.1)
        return math.log(0.8)  # fluent, whatever the picture

    def image_logprob(
        self, contexts: Sequence[Parts], images: Sequence[Image], draws: int, seeds: Sequence[int], **times: Any
    ) -> torch.Tensor:
        """Each of the words "one", "two" ... in a text is true (+ 2 nats) or false (- 2 nats) of the picture."""
        self.drawn += len(contexts)
        out = []
        for context, image, seed in zip(contexts, images, seeds, strict=True):
            words = str(context[0]).split() if context else []
            told = sum(2.0 if float(image[0, 0, k]) > BLANK else -2.0 for k in range(BITS) if f"f{k}" in words)
            common = torch.randn(draws, generator=torch.Generator().manual_seed(seed % 2**31))
            own = torch.randn(draws, generator=torch.Generator().manual_seed(len(words))) * self.chance
            out.append(told + 100 * common + own)
        return torch.stack(out)


def score(reward: Mutual, judge: World, *groups: Group) -> torch.Tensor:
    scores = reward.score(groups, judge)  # type: ignore[arg-type]  # a double: only the two judging methods
    assert not scores.failures
    return scores.values


def test_a_drawing_scores_the_mean_information_of_its_facts() -> None:
    all_right, half, none = [1.0] * 6, [1.0] * 3 + [0.0] * 3, [0.0] * 6
    judge = World()
    values = score(
        Mutual(about="facts"), judge, given_group(DRAW, [[picture(b)] for b in (all_right, half, none, [BLANK] * 6)])
    )
    right, wrong = math.log(0.9 / 0.5), math.log(0.1 / 0.5)
    assert values[0].tolist() == pytest.approx([right, (right + wrong) / 2, wrong, 0], abs=1e-6)
    assert judge.read == 4 * 6 + 6  # the blank picture is asked once for all members


@given(st.lists(st.booleans(), min_size=BITS, max_size=BITS), st.integers(0, BITS - 1))
def test_one_more_fact_never_scores_lower(held: list[bool], one: int) -> None:
    more = [*held]
    more[one] = True
    values = score(
        Mutual(about="facts"),
        World(),
        given_group(DRAW, [[picture([float(b) for b in bits])] for bits in (held, more)]),
    )
    assert values[0, 1] >= values[0, 0]
    assert (values[0, 1] > values[0, 0]) == (more != held)


class Perfect(World):
    """Finds a text in a picture by the very words that hold: log p = the sum of log .9 or .1, log .5 of a blank one."""

    def read_one(self, context: Parts, text: str) -> float:
        image = [part for part in context if isinstance(part, torch.Tensor)][-1]
        bits = [float(image[0, 0, k]) for k in range(BITS)]
        return sum(math.log(0.5 if bit == BLANK else 0.9 if bit > BLANK else 0.1) for bit in bits)


@given(st.lists(st.booleans(), min_size=BITS, max_size=BITS), st.integers(0, BITS - 1))
def test_one_more_fact_never_scores_lower_where_the_prompt_is_judged_whole(held: list[bool], one: int) -> None:
    """By hand: log .9 / .5 for what holds, log .1 / .5 for what does not; a blank picture scores 0."""
    more = [*held]
    more[one] = True
    drawn = [[picture([float(b) for b in bits])] for bits in (held, more)] + [[picture([BLANK] * BITS)]]
    values = score(Mutual(about="prompt", cap=math.inf), Perfect(), given_group(DRAW, drawn))[0]
    right, wrong = math.log(0.9 / 0.5), math.log(0.1 / 0.5)
    expected = [sum(right if b else wrong for b in bits) for bits in (held, more)]
    assert values.tolist() == pytest.approx([*expected, 0.0], abs=1e-5)
    assert values[1] >= values[0]


@pytest.mark.parametrize("said", [math.inf, -math.inf, math.nan, 3.0])
def test_the_cap_makes_no_number_of_a_judge_that_breaks(said: float) -> None:
    class Broken(Perfect):
        def read_one(self, context: Parts, text: str) -> float:
            bright = any(isinstance(part, torch.Tensor) and float(part.mean()) > 0.9 for part in context)
            return said if bright else super().read_one(context, text)

    groups = [given_group(DRAW, [[picture([1.0] * BITS)], [picture([1.0, 0.0] * 3)]])]
    table = score_groups(build_rewards([RewardConfig(name="mutual")]), groups, Broken())  # type: ignore[arg-type]
    assert table.mask[0, :, 0].tolist() == [False, True]
    assert table.reasons == {(0, 0, 0): f"failed: the judge gave {said:g} for a log-prob"}


def test_an_edit_that_changes_nothing_scores_0() -> None:
    source = picture([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    edit = Prompt("e", "edit", (source, "make every fact hold"), ("image",))
    values = score(Mutual(), Perfect(), given_group(edit, [[source.clone()], [picture([1.0] * BITS)]]))
    assert values[0, 0] == 0
    assert values[0, 1] > 0


def test_facts_are_asked_where_the_prompt_is_no_caption() -> None:
    """Auto: a description is to be found as a whole, an edit by its facts."""
    edit = Prompt("e", "edit", (picture([0.0] * 6), "x"), ("image",), facts=FACTS)
    for prompt, passes in ((DRAW, 2), (edit, 2 * BITS)):
        judge = World()
        score(Mutual(), judge, given_group(prompt, [[picture([1.0] * 6)]]))
        assert judge.read == passes


def test_a_fluent_prompt_that_the_picture_does_not_explain_gains_nothing() -> None:
    values = score(Mutual(about="prompt"), World(), given_group(DRAW, [[picture([1.0] * 6)], [picture([0.0] * 6)]]))
    assert values.tolist() == [[0, 0]]


def test_one_term_cannot_rule_the_mean() -> None:
    class Sure(World):
        def read_one(self, context: Parts, text: str) -> float:
            return super().read_one(context, text) * 100

    two = given_group(DRAW, [[picture([1.0] * 6)], [picture([0.0] + [1.0] * 5)]])
    capped = score(Mutual(about="facts", cap=1.5), Sure(), two)
    assert capped[0].tolist() == pytest.approx([1.5, (5 * 1.5 - 1.5) / 6])


@pytest.mark.parametrize(
    ("prompt", "outputs", "context", "blank", "text"),
    [
        (Prompt("g", "generate", ("draw a cat",), ("image",)), 1, ("drawn", "describe it"), ("blank",), "a cat"),
        (
            Prompt("e", "edit", ("source", "add a cat"), ("image",)),
            1,
            ("source", "drawn"),
            ("source",) * 2,
            "add a cat",
        ),
        (Prompt("r", "reason", ("three + 4",), ("text", "image")), 2, ("drawn", "three + 4"), ("blank",), "seven"),
    ],
)
def test_what_the_reading_side_is_asked(prompt: Prompt, outputs: int, context: Any, blank: Any, text: str) -> None:
    source, drawn = torch.full((3, 4, 4), 0.2), torch.full((3, 4, 4), 0.9)
    parts = tuple(source if part == "source" else part for part in prompt.parts)
    prompt = Prompt(prompt.id, prompt.task, parts, prompt.output)
    asked: list[tuple[Parts, str]] = []

    class Listener(World):
        def read_one(self, context: Parts, text: str) -> float:
            asked.append((context, text))
            return -1.0

    score(Mutual(instruction="describe it"), Listener(), given_group(prompt, [["seven", drawn][-outputs:]]))
    named = {"source": 0.2, "drawn": 0.9, "blank": BLANK}
    for (seen, said), expected in zip(asked, (context, blank), strict=True):
        assert said == text
        levels = [part if isinstance(part, str) else round(float(part.mean()), 3) for part in seen]
        assert levels[: len(expected)] == [named.get(e, e) for e in expected]


ASK = Prompt("q", "understand", (picture([1, 0, 1, 0, 1, 0]), "which ?"), ("text",), category="which")


def test_a_text_scores_what_it_adds_to_the_likelihood_of_the_picture() -> None:
    group = given_group(ASK, [["f0"], ["f0 f2"], ["f1"], ["f0 f1"], ["nothing"]])
    judge = World()
    assert score(Mutual(draws=3), judge, group)[0].tolist() == pytest.approx([2, 4, -2, 0, 0], abs=1e-4)
    assert judge.drawn == 6  # five claims, and the question alone


def test_a_denial_scores_minus_the_claim() -> None:
    asked = Prompt("q", "understand", (picture([1, 0, 0, 0, 0, 0]), "is there a f0 ?"), ("text",))
    other = Prompt("p", "understand", (picture([1, 0, 0, 0, 0, 0]), "is there a f1 ?"), ("text",))
    groups = [given_group(prompt, [["yes"], ["no"]]) for prompt in (asked, other)]
    assert score(Mutual(), World(), *groups).flatten().tolist() == pytest.approx([2, -2, -2, 2], abs=1e-4)


def test_noise_is_that_of_comparisons_inside_the_group() -> None:
    """The noise that the members share (100 nats here) is not in it; what is their own is."""
    group = given_group(ASK, [["f0"], ["f0 f2"]])
    for chance, expected in ((0.0, 0.0), (1.0, None)):
        scores = Mutual(draws=64).score([group], World(chance))  # type: ignore[arg-type]
        assert scores.noise is not None
        if expected is None:
            assert 0.1 / 64 < float(scores.noise[0, 0]) < 10 / 64
        else:
            assert float(scores.noise.abs().max()) == pytest.approx(expected, abs=1e-6)


def test_estimate_noise_by_hand() -> None:
    draws = torch.tensor([[1.0, 3.0, 5.0], [1.0, 1.0, 1.0]])  # minus the mean of members: [0, 1, 2] and [0, -1, -2]
    assert estimate_noise(draws).tolist() == pytest.approx([1 / 3, 1 / 3])
    assert estimate_noise(draws[:, :1]).isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_member_without_a_number_takes_the_noise_of_no_other(bad: float) -> None:
    draws = torch.tensor([[1.0, 3.0, 5.0], [1.0, bad, 1.0], [1.0, 1.0, 1.0]])
    assert estimate_noise(draws)[[0, 2]].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert estimate_noise(draws)[1].isnan()
    assert estimate_noise(draws[1:2]).isnan().all()


def test_an_empty_text_is_masked_with_its_reason() -> None:
    sources = build_rewards([RewardConfig(name="mutual")])
    thought = Prompt("r", "reason", ("three + 4",), ("text", "image"))
    groups = [
        given_group(ASK, [["f0"], [" "]]),
        given_group(thought, [["", picture([0] * 6)], ["f", picture([0] * 6)]]),
    ]
    table = score_groups(sources, groups, World())  # type: ignore[arg-type]
    assert table.mask[..., 0].tolist() == [[True, False], [False, True]]
    assert table.reasons == {
        (0, 1, 0): "failed: the answer is empty",
        (1, 0, 0): "failed: the text to be found in the picture is empty",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"about": "all"}, "options.about=all: must be 'auto', 'facts' or 'prompt'"),
        ({"draws": 0}, "options.draws=0: must be >= 1"),
        ({"times": [0.9, 0.5]}, r"mutual.times=\[0.9, 0.5\]: must be \[low, high\]"),
        ({"cap": 0}, "options.cap=0: must be > 0"),
        ({"gate": "nowhere.json"}, "gate='nowhere.json': no such file: make it with `lvrpo audit --judge"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_rewards([RewardConfig(name="mutual", options=options)])


def gate(**kinds: float) -> Gate:
    known = {kind: Sensitivity(low + 0.05, low, 100) for kind, low in kinds.items()}
    return Gate("World:world", 0.6, 8, {"read": known, "draw": known})


def test_the_gate_leaves_out_what_the_judge_cannot_tell(tmp_path: Path) -> None:
    (tmp_path / "judge.json").write_text(gate(kind0=0.9, kind1=0.58, which=0.7).text())
    reward = Mutual(gate=str(tmp_path / "judge.json"))
    judge = World()
    right_where_seen = picture([1, 0] * 3)
    values = score(reward, judge, given_group(DRAW, [[right_where_seen]]))
    assert values.tolist() == [[pytest.approx(math.log(0.9 / 0.5))]]
    unseen = Prompt("u", "generate", ("x",), ("image",), facts=FACTS[1::2])
    unmeasured = Prompt("m", "understand", (picture([0]), "where ?"), ("text",), category="where")
    bare = Prompt("b", "generate", ("a cat",), ("image",))
    assert [reward.applies(p) for p in (DRAW, ASK, unseen, unmeasured, bare)] == [True, True, False, False, False]


def test_the_gate_of_another_judge_is_refused(tmp_path: Path) -> None:
    (tmp_path / "judge.json").write_text(gate(kind0=0.9).text())
    other = World()
    other.identity = "another"  # type: ignore[misc]
    with pytest.raises(InputError, match="measured on judge World:world, but this run's is World:another"):
        Mutual(gate=str(tmp_path / "judge.json")).score([given_group(DRAW, [[picture([0] * 6)]])], other)  # type: ignore


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"judge": 1, "threshold": 0.6, "draws": 1, "measured": {}}'])
def test_a_broken_gate_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "judge.json").write_text(content)
    with pytest.raises(InputError, match=r"judge.json: is no gate: make it with"):
        read_gate(tmp_path / "judge.json")


def test_a_gate_is_read_as_written(tmp_path: Path) -> None:
    (tmp_path / "g.json").write_text(gate(kind0=0.9).text())
    assert read_gate(tmp_path / "g.json") == gate(kind0=0.9)
    assert json.loads((tmp_path / "g.json").read_text())["measured"]["draw"]["kind0"]["n"] == 100


def test_a_judge_is_named_by_its_weights() -> None:
    sizes = TinyConfig.model_validate({"image_size": 16, "transformer": {"width": 16, "depth": 1}})
    one, twin, other = (TinyPolicy.from_vocabulary(sizes, ["a"], seed) for seed in (1, 1, 2))
    assert judge_identity(one) == judge_identity(twin) == judge_identity(one.frozen())
    assert judge_identity(one).startswith("TinyPolicy:")
    assert judge_identity(other) != judge_identity(one)
    with torch.no_grad():
        twin.transformer.inv_freq.mul_(1)
        next(twin.parameters()).add_(1e-3)
    assert judge_identity(twin) != judge_identity(one)


def test_where_it_applies() -> None:
    text = Prompt("t", "reason", ("a text alone",), ("text",))
    assert [Mutual().applies(p) for p in (DRAW, ASK, text)] == [True, True, False]
    assert not Mutual(about="facts").applies(Prompt("b", "generate", ("a cat",), ("image",)))


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("what color is the circle ?", "orange", Statement("an orange circle", "a circle")),
        ("What color is the circle?", "red", Statement("a red circle", "a circle")),
        ("what color are the crosses ?", "red", Statement("red crosses", "crosses")),
        ("what shape is the red object ?", "cross", Statement("a red cross", "a red object")),
        ("what shape are the red objects ?", "cross", Statement("red crosses", "red objects")),
        ("how many red crosses are there ?", "three", Statement("three red crosses", "red crosses")),
        ("how many red crosses are there ?", "one", Statement("a red cross", "red crosses")),
        ("how many objects are there ?", "one", Statement("an object", "objects")),
        ("is there an orange star ?", "yes", Statement("an orange star")),
        ("is there an orange star ?", "no", Statement("an orange star", denied=True)),
        ("is there a star ?", "red", Statement("a star red")),
        ("is the star left of the 7 ?", "no", Statement("a star left of a 7", "a star and a 7", True)),
        ("where is the star relative to the 8 ?", "above", Statement("a star above an 8", "a star and an 8")),
        ("where is the star ?", "top left", Statement("a star at the top left", "a star")),
        ("is the star at the top edge ?", "yes", Statement("a star at the top edge", "a star")),
        ("what digit is there ?", "7", Statement("the digit 7")),
        ("describe the picture", "a red star", Statement("a red star")),
        ("what is the sum ?", "7", None),
        ("who painted it ?", "nobody", None),
    ],
)
def test_statements(question: str, answer: str, expected: Statement | None) -> None:
    assert statement(question, answer) == expected


def test_the_shipped_gate_is_that_of_the_shipped_base() -> None:
    """After another base was trained: lvrpo audit --judge tiny --gate src/lvrpo/assets/tiny-base/judge.json --force."""
    shipped = read_gate("tiny")
    shipped.require(judge_identity(load_policy("tiny")))
    assert shipped.admits("read", "prompt")
    assert shipped.admits("draw", "shape")
