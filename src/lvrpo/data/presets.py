"""Mappings from the columns of usual data sets to the fields of a row, by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from lvrpo.data.geneval import Metadata, facts_of

Record = Mapping[str, Any]
"""A row of a data set. Any: what its columns hold."""
Fields = dict[str, Any]
"""Fields of ``lvrpo.data.rows.Row``; an image is a path, or what the column holds. Any: values of a row."""

IMAGES = ("image", "images", "jpg", "jpeg", "png", "webp", "picture")
TEXTS = ("prompt", "caption", "text", "txt", "description")


def pick(record: Record, names: Sequence[str], required: bool = True) -> Any:
    """The first of these columns that has a value; raises ValueError where one is required. Any: its value."""
    for name in names:
        if record.get(name) not in (None, "", []):
            return record[name]
    if required:
        raise ValueError(f"no value in {' or '.join(names)}: this preset needs one of these columns")
    return None


def images(record: Record) -> list[Any]:
    """The images of a record, whether its column holds one or a list. Any: a path, or what the column holds."""
    found = pick(record, IMAGES, required=False)
    return [] if found is None else list(found) if isinstance(found, list) else [found]


def without_nulls(value: Any) -> Any:
    """Without the empty fields that a table fills in, in whatever is nested. Any: JSON."""
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    if isinstance(value, Mapping):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return value


# --- texts to draw ---


def prompts(record: Record) -> Fields:
    """A list of texts to draw: ``prompt``, ``caption`` or ``text``."""
    return {"task": "generate", "prompt": str(pick(record, TEXTS)).strip()}


def captions(record: Record) -> Fields:
    """Images with a caption: the caption is drawn, the image is the target to imitate."""
    return prompts(record) | {"target": [pick(record, IMAGES)]}


def pickapic(record: Record) -> Fields:
    """Pick-a-Pic (arXiv:2305.01569): ``caption`` is drawn; the target is the image that was preferred.

    The other image of the pair is not used, nor is a target where neither was preferred.
    """
    first, second = record.get("label_0"), record.get("label_1")
    chosen = None
    if first is not None and second is not None and first != second:
        chosen = record.get("jpg_0" if first > second else "jpg_1")
    return prompts(record) | ({} if chosen is None else {"target": [chosen]})


def geneval(record: Record) -> Fields:
    """Metadata of GenEval (arXiv:2310.11513): ``prompt`` with the questions that its objects imply."""
    try:
        metadata = Metadata.model_validate(without_nulls({name: record.get(name) for name in Metadata.model_fields}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: must be of GenEval's metadata ({first['msg'].lower()})") from None
    facts = [{"kind": f.kind, "question": f.question, "answer": f.answer} for f in facts_of(metadata)]
    chosen = [{"choices": list(f.choices)} if f.choices else {} for f in facts_of(metadata)]
    return {
        "task": "generate",
        "prompt": metadata.prompt,
        "category": metadata.tag,
        "facts": [fact | choices for fact, choices in zip(facts, chosen, strict=True)],
    }


def gedit(record: Record) -> Fields:
    """GEdit-Bench (arXiv:2504.17761) and sets like it: a source image and an ``instruction``."""
    source = pick(record, ("input_image_raw", "input_image", "source_image", "source", "image"))
    target = pick(record, ("edited_image", "target_image", "output_image"), required=False)
    fields: Fields = {
        "task": "edit",
        "images": [source],
        "prompt": pick(record, ("instruction", "edit_prompt", "edit", "prompt")),
        "category": record.get("task_type") or "",
    }
    return fields if target is None else fields | {"target": [target]}


# --- questions and conversations ---


def labels(record: Record) -> Fields:
    """A folder of images with a folder per class: asks for the object in the image; the class is the answer."""
    return {
        "task": "understand",
        "images": [pick(record, IMAGES)],
        "prompt": "what is in the picture ?",
        "answer": str(pick(record, ("label", "class", "cls"))),
    }


def scienceqa(record: Record) -> Fields:
    """ScienceQA (arXiv:2209.09513): a choice by its letter, of an image where there is one."""
    letters = "ABCDEFGHIJ"
    choices, answer = list(pick(record, ("choices",))), record.get("answer")
    if not isinstance(answer, int) or not 0 <= answer < len(choices) <= len(letters):
        raise ValueError(f"answer={answer!r}: must be the index of one of {len(choices)} choices")
    hint = str(record.get("hint") or "").strip()
    lines = [hint] if hint else []
    lines += [
        pick(record, ("question",)),
        *(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=False)),
    ]
    shown = images(record)
    return {
        "task": "understand" if shown else "reason",
        "images": shown,
        "prompt": "\n".join([*lines, "Answer with the letter of the choice."]),
        "answer": letters[answer],
        "category": record.get("subject") or "",
    }


ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""Roles of messages by their names in ShareGPT and in chat templates."""


def turns(conversation: Any) -> list[tuple[str, str]]:
    """(role, text) of every turn: ``from`` and ``value``, or ``role`` and ``content``. Any: what the column holds."""
    if not isinstance(conversation, list) or not conversation:
        raise ValueError("a conversation must be a list of turns: see docs/guides/your_data.md")
    found = []
    for turn in conversation:
        speaker = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        if speaker not in ROLES:
            raise ValueError(f"a turn is of {speaker!r}: must be {', '.join(ROLES)}")
        content = turn.get("value", turn.get("content"))
        if isinstance(content, list):  # parts of text and images; the images stand in their own column
            content = "\n".join(part["text"] for part in content if part.get("text"))
        found.append((ROLES[speaker], str(content or "").replace("<image>", "").strip()))
    return found


def exchange(conversation: Any, answered: bool) -> tuple[str, str]:
    """The first question, with the system text before it, and its answer ("" where ``answered`` is false).

    Raises ValueError where the turns are not those of one question.
    """
    said = turns(conversation)
    system = [text for role, text in said if role == "system" and text]
    rest = [turn for turn in said if turn[0] != "system"]
    if not rest or rest[0][0] != "user" or (answered and (len(rest) < 2 or rest[1][0] != "assistant")):
        order = "user, then assistant" if answered else "user"
        raise ValueError(f"the turns are {', '.join(role for role, _ in said)}: must begin with {order}")
    if not answered and len(rest) > 1:
        raise ValueError(f"a prompt of {len(rest)} turns: a row holds one question: leave the earlier turns out")
    return "\n\n".join([*system, rest[0][1]]), rest[1][1] if answered else ""


def question(shown: list[Any], text: str) -> Fields:
    """A question about images, or without any."""
    return {"task": "understand" if shown else "reason", "images": shown, "prompt": text}


def conversations(record: Record) -> Fields:
    """LLaVA and ShareGPT: the first question of ``conversations``; the reply is the target, and no exact answer."""
    text, reply = exchange(pick(record, ("conversations",)), answered=True)
    return question(images(record), text) | {"target": [reply]}


ANSWERS = ("answer", "solution", "ground_truth")
"""Columns of ``trl`` with the right answer, the first one first."""


def other_columns(record: Record, used: Collection[str | None]) -> Fields:
    """The field ``metadata`` of the columns without a use of their own that JSON can hold, if there are any."""
    found = {name: value for name, value in record.items() if name not in (*used, *IMAGES) and _is_json(value)}
    return {"metadata": found} if found else {}


def _is_json(value: Any) -> bool:
    """Whether JSON can hold the value of a column; not for null."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return value is not None


def trl(record: Record) -> Fields:
    """Rows of TRL: ``messages``, or ``prompt`` (a text or turns) with ``completion``, and the right answer if any.

    Other columns are the metadata, which reward functions read.
    """
    answered = next((name for name in ANSWERS if pick(record, (name,), required=False) is not None), None)
    known = other_columns(record, ("messages", "prompt", "completion", answered))
    if answered is not None:
        known["answer"] = str(record[answered])
    if record.get("messages") is not None:
        text, reply = exchange(record["messages"], answered=True)
        return question(images(record), text) | {"target": [reply]} | known
    prompt, reply = pick(record, ("prompt",)), record.get("completion")
    text = prompt if isinstance(prompt, str) else exchange(prompt, answered=False)[0]
    if isinstance(reply, list):
        reply = next((text for role, text in turns(reply) if role == "assistant"), None)
    return question(images(record), text) | ({} if reply is None else {"target": [reply]}) | known


PRESETS: Mapping[str, Callable[[Record], Fields]] = {
    "prompts": prompts,
    "captions": captions,
    "labels": labels,
    "geneval": geneval,
    "gedit": gedit,
    "pickapic": pickapic,
    "scienceqa": scienceqa,
    "llava": conversations,
    "sharegpt": conversations,
    "trl": trl,
}
"""Name -> mapping of one record, which raises ValueError where the record does not fit."""
