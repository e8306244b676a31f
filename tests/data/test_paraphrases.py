from __future__ import annotations

import re

import pytest

from lvrpo.data.scenes import ScenePrompts, facts
from lvrpo.data.scenes.facts import paraphrases
from lvrpo.data.scenes.grammar import NUMBER_WORDS, OPPOSITE, PLURAL, VOCABULARY, Mention, clear_relation
from lvrpo.data.scenes.verifier import read
from lvrpo.types import Fact

SINGULAR = {plural: single for single, plural in PLURAL.items()}


def truth(question: str, objects: list) -> str | None:
    """The answer by looking, independent of the facts; None for a question without one."""

    def like(words: str) -> list:
        *color, shape = [SINGULAR.get(w, w) for w in words.split()]
        shaped = [
            o for o in objects if shape == "object" or o.shape == shape or (shape == "digit" and o.shape.isdigit())
        ]
        return [o for o in shaped if not color or o.color == color[0]]

    def one(words: str, of: str) -> str | None:
        found = {getattr(o, of) for o in like(words)}
        return found.pop() if len(found) == 1 else None

    def relation(a: str, b: str) -> str | None:
        first, second = like(a), like(b)
        if len(first) != 1 or len(second) != 1:
            return None
        return clear_relation((first[0].row, first[0].col), (second[0].row, second[0].col))

    forms = {
        r"how many (.+) are there \?": lambda x: NUMBER_WORDS[len(like(x))],
        r"is there an? (.+) \?": lambda x: "yes" if like(x) else "no",
        r"what color (?:is|are) the (.+) \?": lambda x: one(x, "color"),
        r"what shape (?:is|are) the (.+) \?": lambda x: one(x, "shape"),
        r"what digit is there \?": lambda: one("digit", "shape"),
        r"where is the (.+) relative to the (.+) \?": relation,
        r"is the (.+?) (left of|right of|above|below) the (.+) \?": lambda a, r, b: (
            None if relation(a, b) is None else "yes" if relation(a, b) == r.split()[0] else "no"
        ),
    }
    for form, look in forms.items():
        if match := re.fullmatch(form, question):
            return look(*match.groups())
    raise AssertionError(f"no form of the grammar: {question}")


@pytest.mark.parametrize("task", ["generate", "edit"])
def test_every_wording_has_the_answer_that_looking_gives(task: str) -> None:
    source = ScenePrompts(split="test")
    asked = more = 0
    for i in range(210):
        example = source.example(task, i)  # type: ignore[arg-type]  # of the parametrization
        (reading,) = read([example.outputs[0]])  # type: ignore[list-item]
        for fact, wordings in zip(example.prompt.facts, paraphrases(example.prompt.facts), strict=True):
            assert wordings[0] == (fact.question, fact.answer)
            more += len(wordings) - 1
            for question, answer in wordings[1:]:
                assert set(question.split()) <= set(VOCABULARY)
                assert truth(question, list(reading.objects)) == answer, (example.prompt.parts[-1], question)
                asked += 1
    assert asked == more
    if task == "generate":
        assert more > 300


def test_relations_are_asked_from_both_sides() -> None:
    a, b = Mention("circle"), Mention("star")
    (wordings,) = paraphrases([facts.relation(a, b, "left")])
    assert wordings == (
        ("is the circle left of the star ?", "yes"),
        ("is the star right of the circle ?", "yes"),
        ("where is the circle relative to the star ?", "left"),
        ("is the circle right of the star ?", "no"),
    )
    assert OPPOSITE["left"] == "right"


def test_a_count_follows_only_where_the_total_leaves_no_room() -> None:
    there = facts.exists(Mention("circle"))
    assert paraphrases([there]) == [((there.question, "yes"),)]
    assert paraphrases([there, facts.total(2)])[0] == ((there.question, "yes"),)
    assert paraphrases([there, facts.total(1)])[0][1] == ("how many circles are there ?", "one")


def test_facts_of_another_world_keep_their_question() -> None:
    fact = Fact("mood", "is it sad?", "no")
    assert paraphrases([fact]) == [(("is it sad?", "no"),)]
