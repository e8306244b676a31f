"""Items of an evaluation: one prompt with its outputs and scores, kept in a folder so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lvrpo.atomic_io import sync, write_atomic
from lvrpo.errors import InputError
from lvrpo.images import load_image, png
from lvrpo.metrics import ReadBack
from lvrpo.reading import Record, parse_json, read_json_object, read_text, validate_type
from lvrpo.rewards.base import offline_group
from lvrpo.rewards.verifiable_text import normalize_answer
from lvrpo.training.checkpoint import disk_errors
from lvrpo.types import Group, Prompt, TextSegment

SETTINGS, ITEMS = "settings.json", "items.jsonl"
PART = "items.{rank}.jsonl"
"""What one of several processes writes, until ``ItemStore.open`` joins the parts."""
ANSWER_LENGTH = 80
"""Characters of an answer that a record keeps."""


@dataclass(frozen=True)
class Item:
    """One prompt of an evaluation with its outputs and their scores."""

    group: Group
    """The first ``Benchmark.samples`` outputs; from a folder, their texts alone."""
    scores: tuple[float, ...]
    """Scores of all samples; nan where scoring failed."""
    judged: tuple[float | None, ...] = ()
    read_back: ReadBack | None = None
    failure: str = ""
    """Reason of a missing score; "" if every sample has one."""

    cluster: str = ""
    digest: str = ""
    """``cluster_of`` and ``prompt_digest`` of the prompt with its images."""

    def without_images(self) -> Item:
        """The item with texts only, because images of many prompts do not fit into memory."""
        prompt = without_images(self.group.prompt)
        texts = tuple(
            replace(t, prompt=prompt, segments=tuple(s for s in t.segments if isinstance(s, TextSegment)))
            for t in self.group.trajectories
        )
        return replace(self, group=Group(prompt, texts))


class ItemRecord(Record):
    """One line of ``items.jsonl``."""

    id: str
    asked: str | None = None
    """``prompt_digest``; None in files of older versions, whose items are evaluated again."""
    scores: list[float | None]
    judged: list[float | None]
    read_back: list[int] | None
    failure: str
    texts: list[str | None]


class ItemStore:
    """A folder with one folder per benchmark: settings.json, items.jsonl and the images that were drawn.

    ``items.jsonl`` has a line per prompt: what was asked, every output (images by file name) with its score, and why
    a score is missing. An item without a score is evaluated again when the evaluation is resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, benchmark: str, settings: Mapping[str, Any]) -> ItemFolder:
        """The folder of a benchmark, with what several processes wrote in one file.

        Raises InputError where it holds an evaluation with other settings. Of several processes only one may call it.
        Any: JSON values.
        """
        folder = self.folder_of(benchmark)
        path = folder / SETTINGS
        mine = json.loads(json.dumps(settings))
        if os.path.lexists(path):
            theirs = read_json_object(path)
            other = next((key for key in {**theirs, **mine} if theirs.get(key) != mine.get(key)), None)
            if other is not None:
                raise InputError(
                    f"{folder}: holds an evaluation with {other} {theirs.get(other)!r:.80}, this one has "
                    f"{mine.get(other)!r:.80}: choose another folder (--out)"
                )
        else:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_atomic(path, (json.dumps(mine, indent=1, sort_keys=True) + "\n").encode())
        _join_parts(folder)
        return ItemFolder(folder)

    def folder_of(self, benchmark: str) -> Path:
        """The folder of a benchmark, which need not be there yet."""
        return self.folder / benchmark.replace("/", "-")


def _join_parts(folder: Path) -> None:
    """Appends the whole lines of the parts to ``items.jsonl``, of which a line that is not whole is cut off."""
    parts = sorted(folder.glob(PART.format(rank="*")))
    texts = [whole_lines(path) for path in (folder / ITEMS, *parts)]
    if parts or texts[0] != _text(folder / ITEMS):
        write_atomic(folder / ITEMS, "".join(texts).encode())
    for part in parts:
        part.unlink()


def _text(path: Path) -> str:
    return read_text(path, "restore it, or choose another folder") if os.path.lexists(path) else ""


def whole_lines(path: Path) -> str:
    """The text of a file up to its last line end; "" where there is no file."""
    text = _text(path)
    return text[: text.rfind("\n") + 1]


class ItemFolder:
    """The items of one benchmark."""

    def __init__(self, folder: Path, part: int | None = None) -> None:
        """``part``: the rank of one of several processes, each of which writes a file of its own."""
        self.folder = folder
        self._file = folder / (ITEMS if part is None else PART.format(rank=part))
        self._lines = self._read()

    def read(self, prompt: Prompt, count: int, failed: bool = False) -> Item | None:
        """The item of a prompt with ``count`` scores; None where it is to be evaluated.

        It is where another prompt had this id, as rows without ids are named after their line. ``failed``: also one
        whose scoring failed.
        """
        line, digest = self._lines.get(prompt.id), prompt_digest(prompt)
        if line is None or len(line.scores) != count or line.asked != digest:
            return None
        if not failed and (line.failure or None in line.scores):
            return None
        texts = [[] if text is None else [text] for text in line.texts]
        scores = tuple(math.nan if score is None else score for score in line.scores)
        back = None if line.read_back is None else ReadBack(*line.read_back)
        group, judged = offline_group(prompt, texts), tuple(line.judged)
        return Item(group, scores, judged, back, line.failure, cluster_of(prompt), digest)

    def holds(self, prompt: Prompt) -> bool:
        """Whether the outputs of a prompt are there, scored or not."""
        return prompt.id in self._lines

    def write(self, items: Sequence[Item]) -> None:
        """Appends items, their images first; what a killed process left of a line is overwritten by a resumed one."""
        rows = []
        for item in items:
            prompt, images = item.group.prompt, []
            for member, trajectory in enumerate(item.group.trajectories):
                if trajectory.image is not None:
                    name = f"{file_name(prompt.id)}-{member}.png"
                    with disk_errors(self.folder):
                        write_atomic(self.folder / name, png(trajectory.image))
                    images.append(name)
            row = {
                "id": prompt.id,
                "asked": prompt_digest(prompt),
                "category": prompt.category,
                "prompt": prompt.text,
                "answer": prompt.answer,
                "scores": [score if math.isfinite(score) else None for score in item.scores],
                "judged": list(item.judged),
                "read_back": None if item.read_back is None else list(vars(item.read_back).values()),
                "failure": item.failure,
                "texts": [trajectory.text for trajectory in item.group.trajectories],
                "images": images,
            }
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        with disk_errors(self._file):
            with self._file.open("ab") as file:
                file.write("".join(rows).encode())
            sync(self._file)

    def images(self, prompt: Prompt, samples: int) -> list[bytes]:
        """The PNG files of a prompt; raises InputError for one that is missing or damaged."""
        found = []
        for member in range(samples):
            path = self.folder / f"{file_name(prompt.id)}-{member}.png"
            load_image(path)
            found.append(path.read_bytes())
        return found

    def _read(self) -> dict[str, ItemRecord]:
        """The last line of each prompt."""
        path = self.folder / ITEMS
        found = {}
        # not splitlines: a text may hold other separators, such as U+2028
        for number, line in enumerate(whole_lines(path).split("\n"), start=1):
            where = f"{path}:{number}"
            row = validate_type(parse_json(line, where), ItemRecord, where) if line else None
            if row is not None:
                found[row["id"]] = ItemRecord.model_construct(**row)
        return found


def prompt_digest(prompt: Prompt) -> str:
    """Hash of everything of a prompt that its outputs and their scores depend on."""
    facts = [(fact.kind, fact.question, fact.answer, fact.check, fact.choices) for fact in prompt.facts]
    texts = [part if isinstance(part, str) else list(part.shape) for part in prompt.parts]
    content = (prompt.task, texts, prompt.output, prompt.answer, facts, prompt.rules, prompt.metadata, prompt.world)
    digest = hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8)
    for tensor in (*prompt.images, *(() if prompt.edited is None else (prompt.edited,))):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def prompts_digest(digests: Iterable[str]) -> str:
    """Hash of the ``prompt_digest`` of several prompts."""
    return hashlib.blake2b("".join(digests).encode(), digest_size=8).hexdigest()


def without_images(prompt: Prompt) -> Prompt:
    """The prompt with its texts only."""
    return replace(prompt, parts=tuple(part for part in prompt.parts if isinstance(part, str)), edited=None)


def cluster_of(prompt: Prompt) -> str:
    """The unit of the bootstrap: a hash of the prompt's images, else its content, else its id."""
    digest = hashlib.blake2b(digest_size=8)
    for image in prompt.images:
        digest.update(image.numpy().tobytes())
    return digest.hexdigest() if prompt.images else prompt.content or prompt.id


def questions(groups: Sequence[Group]) -> dict[str, tuple[Any, ...]]:
    """forms, right and answers of a record, for the prompts whose output is a text with a right answer; {} if none."""
    has_answer = [group.prompt.output == ("text",) and group.prompt.answer is not None for group in groups]
    if not any(has_answer):
        return {}
    rows = list(zip(groups, has_answer, strict=True))
    return {
        "forms": tuple(form_of(group.prompt) if text else "" for group, text in rows),
        "right": tuple(normalize_answer(str(group.prompt.answer)) if text else None for group, text in rows),
        "answers": tuple(
            tuple(normalize_answer(t.text or "")[:ANSWER_LENGTH] for t in group.trajectories) if text else ()
            for group, text in rows
        ),
    }


def form_of(prompt: Prompt) -> str:
    """The form of a question, else its category, else its task."""
    return prompt.form or prompt.category or prompt.task


def file_name(prompt_id: str) -> str:
    """A prompt's id as part of a file name, another one for every id."""
    quoted = quote(prompt_id, safe="").replace("%2F", "+")
    return quoted if len(quoted) <= 100 else hashlib.blake2b(prompt_id.encode(), digest_size=16).hexdigest()
