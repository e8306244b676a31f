"""Items of an evaluation: one prompt with its outputs and scores, kept in a folder so that it can be resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lvrpo.atomic_io import sync, write_atomic
from lvrpo.data.images import load_image, png
from lvrpo.errors import InputError
from lvrpo.metrics import ReadBack
from lvrpo.reading import Record, parse_json, read_json_object, read_text, validate_type
from lvrpo.rewards.base import offline_group
from lvrpo.types import Group, Prompt, TextSegment

SETTINGS, ITEMS = "settings.json", "items.jsonl"


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

    def without_pictures(self) -> Item:
        """The item with the texts of its outputs only, because pictures of many prompts do not fit into memory."""
        texts = tuple(
            replace(t, segments=tuple(s for s in t.segments if isinstance(s, TextSegment)))
            for t in self.group.trajectories
        )
        return replace(self, group=Group(self.group.prompt, texts))


class ItemRecord(Record):
    """One line of ``items.jsonl``."""

    id: str
    scores: list[float | None]
    judged: list[float | None]
    read_back: list[int] | None
    failure: str
    texts: list[str | None]


class ItemStore:
    """A folder with one folder per benchmark: settings.json, items.jsonl and the pictures that were drawn.

    ``items.jsonl`` has a line per prompt: what was asked, every output (pictures by file name) with its score, and why
    a score is missing. An item without a score is evaluated again when the evaluation is resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, benchmark: str, settings: Mapping[str, Any]) -> ItemFolder:
        """The folder of a benchmark; raises InputError where it holds an evaluation with other settings.

        Any: JSON values.
        """
        folder = self.folder / benchmark.replace("/", "-")
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
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, (json.dumps(mine, indent=1, sort_keys=True) + "\n").encode())
        return ItemFolder(folder)


class ItemFolder:
    """The items of one benchmark."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = self._read()

    def read(self, prompt: Prompt, count: int) -> Item | None:
        """The item of a prompt with ``count`` scores, all of them valid; None where it is to be evaluated."""
        line = self._lines.get(prompt.id)
        if line is None or line.failure or len(line.scores) != count or None in line.scores:
            return None
        texts = [[] if text is None else [text] for text in line.texts]
        scores = tuple(math.nan if score is None else score for score in line.scores)
        back = None if line.read_back is None else ReadBack(*line.read_back)
        return Item(offline_group(prompt, texts), scores, tuple(line.judged), back)

    def write(self, items: Sequence[Item]) -> None:
        """Appends items, their pictures first; what a killed process left of a line is overwritten by a resumed one."""
        rows = []
        for item in items:
            prompt, pictures = item.group.prompt, []
            for member, trajectory in enumerate(item.group.trajectories):
                if trajectory.image is not None:
                    name = f"{file_name(prompt.id)}-{member}.png"
                    write_atomic(self.folder / name, png(trajectory.image))
                    pictures.append(name)
            row = {
                "id": prompt.id,
                "category": prompt.category,
                "prompt": " ".join(part for part in prompt.parts if isinstance(part, str)),
                "answer": prompt.answer,
                "scores": [score if math.isfinite(score) else None for score in item.scores],
                "judged": list(item.judged),
                "read_back": None if item.read_back is None else list(vars(item.read_back).values()),
                "failure": item.failure,
                "texts": [trajectory.text for trajectory in item.group.trajectories],
                "images": pictures,
            }
            rows.append(json.dumps(row, ensure_ascii=False) + "\n")
        with (self.folder / ITEMS).open("ab") as file:
            file.write("".join(rows).encode())
        sync(self.folder / ITEMS)

    def pictures(self, prompt: Prompt, samples: int) -> list[bytes]:
        """The PNG files of a prompt; raises InputError for one that is missing or damaged."""
        found = []
        for member in range(samples):
            path = self.folder / f"{file_name(prompt.id)}-{member}.png"
            load_image(path)
            found.append(path.read_bytes())
        return found

    def _read(self) -> dict[str, ItemRecord]:
        """The last line of each prompt; a last line that is not whole is cut off."""
        path = self.folder / ITEMS
        if not os.path.lexists(path):
            return {}
        text = read_text(path, "restore it, or choose another folder")
        whole = text[: text.rfind("\n") + 1]
        if len(whole) < len(text):
            write_atomic(path, whole.encode())
        found = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            where = f"{path}:{number}"
            row = validate_type(parse_json(line, where), ItemRecord, where) if line else None
            if row is not None:
                found[row["id"]] = ItemRecord.model_construct(**row)
        return found


def file_name(prompt_id: str) -> str:
    """A prompt's id as part of a file name, another one for every id."""
    quoted = quote(prompt_id, safe="").replace("%2F", "+")
    return quoted if len(quoted) <= 100 else hashlib.blake2b(prompt_id.encode(), digest_size=16).hexdigest()
