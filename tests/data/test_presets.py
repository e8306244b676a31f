"""Records of usual data sets, as published, become the rows that they mean."""

from __future__ import annotations

from typing import Any

import pytest

from lvrpo.data.geneval import Metadata, facts_of
from lvrpo.data.presets import PRESETS
from lvrpo.data.rows import parse_row
from lvrpo.rewards.verifiable_text import answers_match

IMAGE = {"bytes": b"...", "path": None}
TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A bus."}]
CHAT = [
    {"role": "system", "content": "Think first."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A bus."}]},
]

CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("prompts", {"caption": " a bus "}, {"task": "generate", "prompt": "a bus"}),
    ("captions", {"jpg": IMAGE, "txt": "a bus"}, {"task": "generate", "prompt": "a bus", "target": [IMAGE]}),
    (
        "labels",
        {"image": IMAGE, "label": "bus"},
        {"task": "understand", "images": [IMAGE], "prompt": "what is in the picture ?", "answer": "bus"},
    ),
    (
        "pickapic",
        {"caption": "a bus", "jpg_0": b"first", "jpg_1": b"second", "label_0": 0.0, "label_1": 1.0},
        {"task": "generate", "prompt": "a bus", "target": [b"second"]},
    ),
    (
        "pickapic",
        {"caption": "a bus", "jpg_0": b"first", "jpg_1": b"second", "label_0": 0.5, "label_1": 0.5},
        {"task": "generate", "prompt": "a bus"},
    ),
    (
        "gedit",
        {"task_type": "color_alter", "instruction": "Make it red", "input_image_raw": IMAGE, "key": "k"},
        {"task": "edit", "images": [IMAGE], "prompt": "Make it red", "category": "color_alter"},
    ),
    (
        "scienceqa",
        {
            "image": IMAGE,
            "question": "Which?",
            "choices": ["x", "y"],
            "answer": 1,
            "hint": "Look.",
            "subject": "natural science",
            "task": "closed choice",
        },
        {
            "task": "understand",
            "images": [IMAGE],
            "prompt": "Look.\nWhich?\nA. x\nB. y\nAnswer with the letter of the choice.",
            "answer": "B",
            "category": "natural science",
        },
    ),
    (
        "llava",
        {"id": "1", "image": "a.jpg", "conversations": [*TURNS, *TURNS]},
        {"task": "understand", "images": ["a.jpg"], "prompt": "What is it?", "target": ["A bus."]},
    ),
    (
        "sharegpt",
        {"conversations": TURNS},
        {"task": "reason", "images": [], "prompt": "What is it?", "target": ["A bus."]},
    ),
    (
        "trl",
        {"messages": CHAT, "images": [IMAGE]},
        {
            "task": "understand",
            "images": [IMAGE],
            "prompt": "Think first.\n\nWhat is it?",
            "target": ["A bus."],
        },
    ),
    (
        "trl",
        {"prompt": CHAT[:2], "completion": CHAT[2:], "solution": 7},
        {"task": "reason", "images": [], "prompt": "Think first.\n\nWhat is it?", "target": ["A bus."], "answer": "7"},
    ),
    (
        "trl",
        {
            "prompt": "3 + 4",
            "solution": "7",
            "answer": None,
            "level": 2,
            "from": {"book": "a"},
            "raw": b"",
            "page": None,
        },
        {
            "task": "reason",
            "images": [],
            "prompt": "3 + 4",
            "answer": "7",
            "metadata": {"level": 2, "from": {"book": "a"}},
        },
    ),
    ("trl", {"prompt": "3 + 4"}, {"task": "reason", "images": [], "prompt": "3 + 4"}),
]


@pytest.mark.parametrize(("name", "record", "expected"), CASES)
def test_a_record_becomes_its_row(name: str, record: dict[str, Any], expected: dict[str, Any]) -> None:
    fields = PRESETS[name](record)
    assert fields == expected
    named = {key: ["a.png"] if key == "images" and value else value for key, value in fields.items()}
    parse_row({**named, "target": "a.png"} if expected["task"] == "generate" and "target" in named else named)


def test_every_preset_has_a_case_and_says_which_columns_it_needs() -> None:
    assert {name for name, _, _ in CASES} | {"geneval"} == set(PRESETS)
    for name in PRESETS:
        with pytest.raises(ValueError, match=r"needs one of these columns|must be"):
            PRESETS[name]({"nothing": 1})


def test_questions_of_geneval_say_what_the_drawing_must_show() -> None:
    """Those of the benchmark; a table fills in what clauses leave out."""
    record: dict[str, Any] = {
        "tag": "position",
        "include": [
            {"class": "clock", "count": 3},
            {"class": "bench", "count": 1, "color": "red", "position": ["left of", 0]},
        ],
        "exclude": [{"class": "clock", "count": 4}, {"class": "dog", "count": 1}],
        "prompt": "a red bench left of three clocks",
    }
    fields = PRESETS["geneval"](record)
    metadata = Metadata.model_validate(record)
    row = parse_row(fields)
    assert [(f.kind, f.question, f.answer, tuple(f.choices)) for f in row.facts] == [
        (f.kind, f.question, f.answer, f.choices) for f in facts_of(metadata)
    ]
    assert len(row.facts) == 4
    filled = {**record, "include": [{"color": None, "position": None, **each} for each in record["include"]]}
    assert PRESETS["geneval"](filled) == fields
    with pytest.raises(ValueError, match=r"include\.0\.count: must be of GenEval's metadata"):
        PRESETS["geneval"]({**record, "include": [{"class": "dog", "count": 0}]})
    assert parse_row(fields).category == "position"


def test_the_letter_of_a_choice_is_an_exact_answer() -> None:
    assert answers_match("B.", PRESETS["scienceqa"]({"question": "?", "choices": ["x", "y"], "answer": 1})["answer"])


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("llava", {"conversations": TURNS[1:]}, "must begin with user, then assistant"),
        ("llava", {"conversations": [{"from": "robot", "value": "x"}]}, "a turn is of 'robot'"),
        ("llava", {"conversations": "x"}, "must be a list of turns"),
        ("trl", {"prompt": [*CHAT, CHAT[1]]}, "a prompt of 3 turns"),
        ("scienceqa", {"question": "?", "choices": ["x"], "answer": 1}, "must be the index of one of 1 choices"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(name: str, record: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PRESETS[name](record)
