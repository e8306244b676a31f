from __future__ import annotations

import pytest

from lvrpo.rewards.endpoint import NoAnswer
from lvrpo.rewards.vlm_endpoint import rating, same_answer, yes_or_no

LONG = "The image shows a wide and empty landscape under heavy clouds"


@pytest.mark.parametrize(
    ("answer", "wanted", "value"),
    [
        ("red", "red", 1),
        ("**Red.**", "red", 1),
        ("The cube is red.", "red", 1),
        ("Answer: red", "red", 1),
        ("blue", "red", 0),
        ("It is blue.", "red", 0),
        ("grey", "gray", 1),
        ("black and white", "white and black", 1),
        ("3", "3", 1),
        ("Three.", "3", 1),
        ("There are 3 birds.", "3", 1),
        ("I can see three birds in the left half of the image.", "3", 1),
        ("four", "3", 0),
        ("There are no birds.", "3", 0),
        ("none", "0", 1),
        ("left", "left", 1),
        ("It is on the left side.", "left", 1),
        ("under the table", "below", 1),
        ("right", "left", 0),
        ("top right", "top left", 0),
        ("dog", "dog", 1),
        ("It is a dog.", "a dog", 1),
        ("cat", "dog", 0),
        ("two brown dogs", "cat", 0),
        ("don't walk", "Don\u2019t walk", 1),
        ("3 red cubes", "3 red cubes", 1),
        ("There are 3 red cubes", "3 red cubes", 1),
        ("unknown", "unknown", 1),
        ("A", "A", 1),
    ],
)
def test_answers_that_can_be_read(answer: str, wanted: str, value: float) -> None:
    assert same_answer(answer, wanted) == value


@pytest.mark.parametrize(
    ("answer", "wanted", "reason"),
    [
        ("As an AI I cannot see the image", "red", "a refusal"),
        ("I\u2019m sorry, red", "red", "a refusal"),
        ("I can't tell", "3", "a refusal"),
        ("I do not have access to any image", "dog", "a refusal"),
        ("unclear", "dog", "a refusal"),
        ("asdf", "red", "no color"),
        ("asdf", "3", "no number"),
        ("asdf", "dog", "no answer to compare"),
        ("xkcd", "dog", "no answer to compare"),
        ("aaaa", "dog", "no answer to compare"),
        ("?!", "dog", "no answer to compare"),
        ("yes", "dog", "no answer to compare"),
        ("It is the letter A.", "A", "no answer to compare"),
        ("?", "?", "no answer to compare"),
        (LONG, "dog", "too many words"),
        (LONG, "red", "no color"),
        (LONG + " with 4 birds", "3", "too many words"),
        (f"{LONG}, {LONG}, {LONG}: a dog", "dog", "too many words"),
        ("not red", "red", "a denial"),
        ("no red", "red", "a denial"),
        ("The cube isn't red", "red", "a denial"),
        ("It is not a cat", "dog", "a denial"),
        ("red or blue", "red", "more than one color"),
        ("blue or green", "red", "more than one color"),
        ("2, or 3", "3", "more than one number"),
        ("left, above the cube", "left", "more than one place"),
        ("a dog or a cat", "dog", "more than one answer"),
        ("3 red cubes and 2 blue ones", "3 red cubes", "more than one number"),
        ("many", "3", "no number"),
    ],
)
def test_answers_that_cannot(answer: str, wanted: str, reason: str) -> None:
    found = same_answer(answer, wanted)
    assert isinstance(found, NoAnswer)
    assert found.reason.startswith(reason)
    assert len(found.reason) < 100


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes.", "yes"),
        ("**Yes**, there is.", "yes"),
        ("NO", "no"),
        ("No, I cannot see a cube in the image.", "no"),
        ("There is no cube.", "no"),
        ("Based on what is shown here, yes, there is a cube.", "yes"),
        ("The image shows a red cube on a table, so yes", "yes"),
    ],
)
def test_yes_and_no(answer: str, said: str) -> None:
    assert yes_or_no(answer, said) == 1
    assert yes_or_no(answer, "no" if said == "yes" else "yes") == 0


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("yes and no", "both yes and no"),
        ("Yes, there is no doubt", "both yes and no"),
        ("maybe", "neither yes nor no"),
        ("I see a table with no plates and a cup on it", "neither yes nor no"),
        ("I would not say yes", "a denial"),
        ("No, sorry, I am unable to help", "a refusal"),
        ("There is no image", "a refusal"),
        ("I cannot see the image, so no", "a refusal"),
    ],
)
def test_neither_yes_nor_no(answer: str, reason: str) -> None:
    found = yes_or_no(answer, "yes")
    assert isinstance(found, NoAnswer)
    assert found.reason.startswith(reason)


def test_a_refusal_with_a_number_is_no_rating() -> None:
    assert rating("7") == 0.7
    assert isinstance(rating("As an AI I cannot rate image 1"), NoAnswer)
