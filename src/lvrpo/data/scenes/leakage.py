"""Prompts of the built-in world as the audit of splits compares them: read from texts and pixels alone.

Nothing here knows how the splits were made. What a caption says is parsed from its words, the operands of a sum or a
comparison are read off the image by the verifier.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lvrpo.data.leakage import ComparedImage, ComparedPrompt, compared_pixels
from lvrpo.data.scenes.grammar import DIGITS, OPPOSITE, PARAPHRASED_WORDINGS, RELATION_PHRASE, WORDINGS
from lvrpo.data.scenes.verifier import Reading, read
from lvrpo.types import Example, Image, Prompt

CAPTION_PREFIXES = tuple(
    sorted(
        {
            w.replace("{be}", be).partition("{}")[0].strip()
            for w in (*WORDINGS, *PARAPHRASED_WORDINGS)
            for be in ("is", "are")
        }
        - {""}
    )
)
"""Prefixes of captions in prompts: "draw", "a picture of", "there is" ..."""

_GROUND = re.compile(r" on a (\w+) ground$")
_PLACE = re.compile(r" at the ((?:top|bottom) (?:left|right))$")
_RELATIONS = {phrase: name for name, phrase in RELATION_PHRASE.items()}
_JOINT = re.compile(rf" ({'|'.join(_RELATIONS)}|and) ")
_ORDER = re.compile(r"which digit is (?:larger|smaller) \?|draw the (?:larger|smaller) of \d and \d")
_SUM = re.compile(r"what is the sum \?|draw \d(?: \+ \d)+")


def caption_key(text: str) -> str:
    """A canonical form of a caption, the same for all wordings and orders, and for "a left of b" and "b right of a".

    >>> caption_key("draw a star left of a red circle") == caption_key("a red circle right of a star")
    True
    """
    for start in sorted(CAPTION_PREFIXES, key=len, reverse=True):
        text = text.removeprefix(f"{start} ")
    ground, where = _GROUND.search(text), _PLACE.search(_GROUND.sub("", text))
    objects = _PLACE.sub("", _GROUND.sub("", text))
    first, *rest = _JOINT.split(objects)
    parts = [re.sub(r"^(an?|the digit) ", "", part) for part in (first, *rest[1::2])]
    relation = _RELATIONS.get(rest[0]) if rest else None
    if relation is None:
        parts = sorted(parts)
    elif relation in ("right", "below"):
        parts, relation = parts[::-1], OPPOSITE[relation]
    found = [relation, where and where.group(1), ground and ground.group(1)]
    return " | ".join([*parts, *(str(each) for each in found)])


def operands_key(text: str, reading: Reading | None) -> str:
    """A canonical form of the operands of a sum or comparison, whatever the wording and order; empty if unreadable.

    >>> operands_key("draw the larger of 3 and 5", None)
    'order 3 5'
    """
    name = "sum" if _SUM.fullmatch(text) else "order" if _ORDER.fullmatch(text) else "more"
    if reading is None:
        values = re.findall(r"\d", text)
    elif not reading.clean:
        return ""
    elif name == "more":
        shapes = [o.shape for o in reading.objects]
        values = [f"{shape} {shapes.count(shape)}" for shape in set(shapes)]
    else:
        values = [o.shape for o in reading.objects if o.shape in DIGITS]
    return f"{name} {' '.join(sorted(values))}"


def compared_prompts(prompts: Sequence[Prompt], phash: bool = True) -> list[ComparedPrompt]:
    """Prompts of the world as they are compared; ``phash``: images by perceptual hashes too, which is slow."""
    to_read = [i for i, prompt in enumerate(prompts) if prompt.task == "reason" and prompt.images]
    readings = dict(zip(to_read, read([prompts[i].images[0] for i in to_read]), strict=True))
    known: dict[int, ComparedImage] = {}
    found: list[ComparedPrompt] = []
    for i, prompt in enumerate(prompts):
        content = ""
        if prompt.task == "generate":
            content = f"drawing {caption_key(prompt.text)}"
        elif prompt.task == "reason":
            content = operands_key(prompt.text, readings.get(i))
        images = tuple(_image(image, known, phash) for image in prompt.images)
        found.append(ComparedPrompt(prompt.id, prompt.task, prompt.text, images, content))
    return found


def compared_examples(examples: Iterable[Example]) -> Iterable[ComparedPrompt]:
    """Rows to imitate as they are compared; a caption to write is a text that was seen, too."""
    rows: list[Example] = []
    for example in examples:
        rows.append(example)
        if len(rows) == 512:
            yield from _of_rows(rows)
            rows = []
    yield from _of_rows(rows)


def _of_rows(rows: Sequence[Example]) -> Iterable[ComparedPrompt]:
    yield from compared_prompts([row.prompt for row in rows])
    for row in rows:
        if row.prompt.category == "caption" and row.prompt.task == "understand":
            text = str(row.outputs[0])
            yield ComparedPrompt(row.prompt.id, "generate", text, (), f"drawing {caption_key(text)}")


def _image(image: Image, known: dict[int, ComparedImage], phash: bool) -> ComparedImage:
    """Questions about one image hold the same tensor: it is hashed once."""
    if id(image) not in known:
        known[id(image)] = compared_pixels(image, phash)
    return known[id(image)]
