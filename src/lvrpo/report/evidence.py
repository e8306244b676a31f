"""Committed summaries of runs: small JSON files from which every number of a results page is computed again.

A summary holds the success of every test prompt, one bit each, and what many samples of some of them gave. What the
prompts are (category, picture, form of question) stands once, in the file of their fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lvrpo.errors import InputError
from lvrpo.reading import read_json_object
from lvrpo.statistics import Floats

PROMPTS = "prompts"
"""Folder of the prompt sets, inside that of the summaries."""
TUNING = "tuning-"
"""Beginning of the names of files that say what a grid gave."""
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class RowPlan:
    """A row of a results page."""

    about: str
    group: str
    """ours, rival, oracle, inference or base."""
    runs: tuple[tuple[str, int], ...]
    """(base, seed) of every run that belongs to it."""
    of: str | None = None
    """Read from the runs of another row ..."""
    best_of: int | None = None
    """... the best of so many by the model's own reader ..."""
    settings: str = "tuned"
    """... at tuned or plain settings."""
    untuned: str | None = None


@dataclass(frozen=True)
class TablePlan:
    """A results page."""

    name: str
    evidence: bool
    rows: Mapping[str, RowPlan]
    ours: str
    """The row that the others are compared with."""


@dataclass(frozen=True)
class PromptSet:
    """The prompts of one benchmark, as far as tables need them."""

    categories: tuple[str, ...]
    clusters: tuple[int, ...]
    """Prompts of one number share a picture."""
    held_out: tuple[bool, ...]
    """Whether a prompt shows a combination that training never shows."""
    forms: tuple[str, ...] = ()
    """Of questions; "" where there is no right text."""
    right: tuple[str | None, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: texts once, and their numbers per prompt."""
        texts: dict[str, Any] = {"n": len(self.categories), "held_out": pack_bits(self.held_out)}
        for name in ("categories", "forms", "right"):
            values = [str(value or "") for value in getattr(self, name)]  # three fields, by name
            known = list(dict.fromkeys(values))
            texts[name] = {"values": known, "index": [known.index(value) for value in values]}
        return {**texts, "clusters": list(self.clusters)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PromptSet:
        """What ``as_dict`` gave."""
        texts = {
            name: tuple(raw[name]["values"][i] for i in raw[name]["index"]) for name in ("categories", "forms", "right")
        }
        held_out = tuple(value > 0 for value in unpack_bits(raw["held_out"], raw["n"]))
        right = tuple(value or None for value in texts["right"])
        return cls(texts["categories"], tuple(raw["clusters"]), held_out, texts["forms"], right)


@dataclass(frozen=True)
class Outcome:
    """How one run did on the prompts of one benchmark."""

    prompts: str
    """Fingerprint of the prompts."""
    first: Floats
    """(P,) success of the first sample."""
    samples: int
    """Of each of the prompts that were sampled most often."""
    counts: Floats
    """(P,) right ones among them; nan for a prompt that was not sampled so often."""
    best_of: Mapping[int, Floats]
    """By n: (P,) expected success of the best of n by the model's own reader; nan where unknown."""
    answers: Mapping[str, Mapping[str, int]]
    """By form of question: how often each answer was given."""
    settings: Mapping[str, Any]
    """Guidance and temperature by task."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON: a bit per prompt, a base-36 digit per count, two hexadecimal digits per share."""
        many = np.flatnonzero(np.isfinite(self.counts))
        return {
            "prompts": self.prompts,
            "n": int(self.first.size),
            "first": pack_bits(self.first > 0),
            "samples": self.samples,
            "many": pack_bits(np.isfinite(self.counts)) if many.size else "",
            "counts": "".join(_DIGITS[round(float(value))] for value in self.counts[many]),
            "best_of": {str(n): pack_shares(values[many]) for n, values in self.best_of.items()},
            "answers": {form: dict(given) for form, given in self.answers.items()},
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Outcome:
        """What ``as_dict`` gave."""
        n = raw["n"]
        many = unpack_bits(raw["many"], n) > 0 if raw["many"] else np.zeros(n, dtype=bool)

        def spread(values: Sequence[float] | Floats) -> Floats:
            out = np.full(n, np.nan)
            out[many] = values
            return out

        counts = spread([_DIGITS.index(digit) for digit in raw["counts"]])
        best = {int(size): spread(unpack_shares(text)) for size, text in raw["best_of"].items()}
        first = unpack_bits(raw["first"], n)
        return cls(raw["prompts"], first, raw["samples"], counts, best, raw["answers"], raw["settings"])


@dataclass(frozen=True)
class Summary:
    """One run."""

    row: str
    base: str
    seed: int
    outcomes: Mapping[str, Outcome]
    """By benchmark; in the file a name stands for the measurement of that name."""
    raw: Mapping[str, Any]
    """The whole file: configuration, FLOPs, seconds, hardware."""

    @classmethod
    def read(cls, path: Path) -> Summary:
        """Raises InputError for a file that is no summary."""
        raw = _read_json(path)
        try:
            packed = raw["benchmarks"]
            known = {name: packed[each] if isinstance(each, str) else each for name, each in packed.items()}
            outcomes = {name: Outcome.from_dict(each) for name, each in known.items()}
            return cls(raw["row"], raw["base"], raw["seed"], outcomes, raw)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise InputError(f"{path}: is no summary of a run: restore it, or delete it to run it again") from None


@dataclass(frozen=True)
class Evidence:
    """All summaries of a folder."""

    summaries: Mapping[str, Mapping[tuple[str, int], Summary]]
    """By row, by (base, seed)."""
    prompts: Mapping[str, PromptSet]
    """By fingerprint."""
    tuning: Mapping[str, Mapping[str, Any]]
    """By row: what its grid gave."""

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """An empty or absent folder holds none.

        Raises InputError where runs were evaluated on different prompts: nothing could be said of their difference.
        """
        summaries: dict[str, dict[tuple[str, int], Summary]] = {}
        tuning: dict[str, Mapping[str, Any]] = {}
        seen: dict[str, tuple[str, Path]] = {}
        for path in sorted(folder.glob("*.json")):
            if path.name.startswith(TUNING):
                tuning[path.stem.removeprefix(TUNING)] = _read_json(path)
                continue
            summary = Summary.read(path)
            for name, outcome in summary.outcomes.items():
                prompts, other = seen.setdefault(name, (outcome.prompts, path))
                if prompts != outcome.prompts:
                    raise InputError(
                        f"{path}: {name} was evaluated on other prompts than in {other.name}: evaluate one of them "
                        "again, or delete it"
                    )
            summaries.setdefault(summary.row, {})[summary.base, summary.seed] = summary
        sets = {}
        for prompts, path in seen.values():
            file = prompts_file(folder, prompts)
            if not file.is_file():
                raise InputError(f"{path}: its prompts, {file}, are missing: restore that file, or run again")
            sets[prompts] = PromptSet.from_dict(_read_json(file))
        return cls(summaries, sets, tuning)


def prompts_file(folder: Path, fingerprint: str) -> Path:
    """Where a set of prompts stands."""
    return folder / PROMPTS / f"{fingerprint}.json"


def pack_bits(values: Sequence[Any] | Floats | np.ndarray) -> str:
    """True or false, four to a hexadecimal digit."""
    return np.packbits(np.asarray(values, dtype=bool)).tobytes().hex()


def unpack_bits(text: str, n: int) -> Floats:
    """1 or 0, (n,)."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n).astype(np.float64)


def pack_shares(values: Floats) -> str:
    """Numbers in [0, 1] to the nearest 255th, two hexadecimal digits each."""
    return np.round(np.asarray(values) * 255).astype(np.uint8).tobytes().hex()


def unpack_shares(text: str) -> Floats:
    """What ``pack_shares`` took, up to a 510th."""
    return np.frombuffer(bytes.fromhex(text), dtype=np.uint8) / 255.0


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "restore the file, or delete it to run it again")


__all__ = ["Evidence", "Outcome", "PromptSet", "RowPlan", "Summary", "TablePlan", "prompts_file"]
