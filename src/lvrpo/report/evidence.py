"""Committed summaries of runs: small JSON files from which every number of a results page is computed again.

A summary holds the success of every test prompt, one bit each, and what many samples of some of them gave. What the
prompts are (category, image, form of question) stands once, in the file of their fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lvrpo.errors import InputError
from lvrpo.metrics import FEW_ANSWERS, pass_at_k
from lvrpo.reading import read_json_object
from lvrpo.statistics import Floats, TwoWayInterval, seeds_and_prompts_interval

PROMPTS = "prompts"
"""Folder of the prompt sets, inside that of the summaries."""
TUNING = "tuning-"
"""Prefix of the files with the results of grids."""
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
    """... the best of n by the model's own reader ..."""
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
    """Prompts of one number share an image."""
    held_out: tuple[bool, ...]
    """Whether a prompt shows a combination that training never shows."""
    forms: tuple[str, ...] = ()
    """Forms of the questions; "" where there is no right text."""
    right: tuple[str | None, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """As JSON: each text once, and its index per prompt."""
        texts: dict[str, Any] = {"n": len(self.categories), "held_out": _pack_bits(self.held_out)}
        for name in ("categories", "forms", "right"):
            values = [str(value or "") for value in getattr(self, name)]  # three fields, by name
            known = list(dict.fromkeys(values))
            texts[name] = {"values": known, "index": [known.index(value) for value in values]}
        return {**texts, "clusters": list(self.clusters)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> PromptSet:
        """The inverse of ``as_dict``."""
        texts = {
            name: tuple(raw[name]["values"][i] for i in raw[name]["index"]) for name in ("categories", "forms", "right")
        }
        held_out = tuple(value > 0 for value in _unpack_bits(raw["held_out"], raw["n"]))
        right = tuple(value or None for value in texts["right"])
        return cls(texts["categories"], tuple(raw["clusters"]), held_out, texts["forms"], right)


@dataclass(frozen=True)
class Outcome:
    """The outcome of one run on the prompts of one benchmark."""

    prompts: str
    """Fingerprint of the prompts."""
    first: Floats
    """(P,) success of the first sample."""
    samples: int
    """Samples per prompt, for the prompts that were sampled most often."""
    counts: Floats
    """(P,) right ones among them; nan for a prompt that was not sampled so often."""
    best_of: Mapping[int, Floats]
    """Per n, (P,): expected success of the best of n by the model's own reader; nan where unknown."""
    answers: Mapping[str, Mapping[str, int]]
    """Per form of question, the number of times each answer was given."""
    settings: Mapping[str, Any]
    """Guidance and temperature by task."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON: a bit per prompt, a base-36 digit per count, two hexadecimal digits per share."""
        many = np.flatnonzero(np.isfinite(self.counts))
        return {
            "prompts": self.prompts,
            "n": int(self.first.size),
            "first": _pack_bits(self.first > 0),
            "samples": self.samples,
            "many": _pack_bits(np.isfinite(self.counts)) if many.size else "",
            "counts": "".join(_DIGITS[round(float(value))] for value in self.counts[many]),
            "best_of": {str(n): _pack_shares(values[many]) for n, values in self.best_of.items()},
            "answers": {form: dict(given) for form, given in self.answers.items()},
            "settings": dict(self.settings),
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Outcome:
        """The inverse of ``as_dict``."""
        n = raw["n"]
        many = _unpack_bits(raw["many"], n) > 0 if raw["many"] else np.zeros(n, dtype=bool)

        def spread(values: Sequence[float] | Floats) -> Floats:
            out = np.full(n, np.nan)
            out[many] = values
            return out

        counts = spread([_DIGITS.index(digit) for digit in raw["counts"]])
        bytes_of = {int(size): bytes.fromhex(text) for size, text in raw["best_of"].items()}
        best = {size: spread(np.frombuffer(shares, dtype=np.uint8) / 255.0) for size, shares in bytes_of.items()}
        first = _unpack_bits(raw["first"], n)
        return cls(raw["prompts"], first, raw["samples"], counts, best, raw["answers"], raw["settings"])


@dataclass(frozen=True)
class Summary:
    """One run."""

    row: str
    base: str
    seed: int
    outcomes: Mapping[str, Outcome]
    """Outcomes by benchmark; in the file a benchmark is stored under the name of its measurement."""
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
    """Summaries by row, then by (base, seed)."""
    prompts: Mapping[str, PromptSet]
    """Prompt sets by fingerprint."""
    tuning: Mapping[str, Mapping[str, Any]]
    """Results of the grids, by row."""

    @classmethod
    def read(cls, folder: Path) -> Evidence:
        """An empty or absent folder holds none.

        Raises InputError where runs were evaluated on different prompts, since they cannot be compared.
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
    """The file of a set of prompts."""
    return folder / PROMPTS / f"{fingerprint}.json"


def _pack_bits(values: Sequence[Any] | Floats | np.ndarray) -> str:
    """True or false, four to a hexadecimal digit."""
    return np.packbits(np.asarray(values, dtype=bool)).tobytes().hex()


def _unpack_bits(text: str, n: int) -> Floats:
    """1 or 0, (n,)."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n).astype(np.float64)


def _pack_shares(values: Floats) -> str:
    """Numbers in [0, 1] to the nearest 255th, two hexadecimal digits each."""
    return np.round(np.asarray(values) * 255).astype(np.uint8).tobytes().hex()


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, "restore the file, or delete it to run it again")


Run = tuple[str, int]
"""(base, seed)."""


@dataclass(frozen=True)
class Measure:
    """A column of the page."""

    heading: str
    benchmark: str
    kind: Literal["first", "balanced", "pass"] = "first"
    """The first sample; the same weighted so that its mean is the balanced accuracy; pass@k of many samples."""
    k: int = 1
    prompts: Literal["all", "seen", "unseen"] = "all"
    """All, or those with combinations that training shows, or never shows."""


MEASURES = (
    Measure("generation", "generate"),
    Measure("unguided", "generate_plain"),
    Measure("unseen compositions", "generate", prompts="unseen"),
    Measure("pass@16", "generate", "pass", 16),
    Measure("editing", "edit"),
    Measure("understanding", "understand", "balanced"),
    Measure("reasoning", "reason"),
)
SEEN = Measure("seen compositions", "generate", prompts="seen")


@dataclass(frozen=True)
class Column:
    """One measure of one row, run by run."""

    values: Mapping[Run, Floats]
    """(P,), nan for prompts that it does not know."""
    clusters: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Over runs and prompts; nan where nothing is known."""
        known = [float(np.nanmean(values)) for values in self.values.values() if np.isfinite(values).any()]
        return sum(known) / len(known) if known else float("nan")

    @property
    def known(self) -> bool:
        """Whether any value is."""
        return bool(self.values) and np.isfinite(self.mean)


def column(plan: TablePlan, row: str, measure: Measure, evidence: Evidence, many: bool = False) -> Column:
    """The column of one row, from its summaries.

    ``many``: the mean of many samples in place of the first one, for prompts that have them.
    """
    own = plan.rows[row]
    summaries = evidence.summaries.get(own.of or row, {})
    values: dict[Run, Floats] = {}
    clusters: tuple[int, ...] = ()
    for run in own.runs:
        found = None if run not in summaries else _values(own, measure, summaries[run], evidence, many)
        if found is not None:
            values[run], prompts = found
            clusters = prompts.clusters
    return Column(values, clusters)


def difference(later: Column, earlier: Column, by_base: bool = False) -> TwoWayInterval | None:
    """``later`` minus ``earlier`` over the runs that both have, and the prompts that all of these know.

    ``by_base``: a run of which ``earlier`` lacks the seed is compared with that of the same base. None where nothing
    can be compared.
    """
    pairs: list[tuple[Floats, Floats]] = []
    of_base = {base: values for (base, _), values in earlier.values.items()}
    for run, values in later.values.items():
        other = earlier.values.get(run, of_base.get(run[0]) if by_base else None)
        if other is not None:
            pairs.append((values, other))
    if not pairs:
        return None
    table = np.stack([values - other for values, other in pairs])
    mask = np.isfinite(table).all(axis=0)
    if not mask.any():
        return None
    own = [later.clusters[i] for i in np.flatnonzero(mask)]
    return seeds_and_prompts_interval(table[:, mask], own)


def balanced_weights(prompts: PromptSet) -> Floats:
    """(P,) weights whose sum is 1: sum_i w_i s_i is the mean over forms of their balanced accuracy.

        w_i = 1 / (|F| |A_f| n_fa),   question i of form f with right answer a; n_fa such questions

    0 for questions of a form with one right answer alone, or with more than ``FEW_ANSWERS``.
    """
    counts: dict[str, dict[str, int]] = {}
    for form, right in zip(prompts.forms, prompts.right, strict=True):
        if form and right is not None:
            of_form = counts.setdefault(form, {})
            of_form[right] = of_form.get(right, 0) + 1
    used = {form: answers for form, answers in counts.items() if 2 <= len(answers) <= FEW_ANSWERS}
    return np.array(
        [
            1.0 / (len(used) * len(used[form]) * used[form][right]) if form in used and right is not None else 0.0
            for form, right in zip(prompts.forms, prompts.right, strict=True)
        ]
    )


def _values(
    row: RowPlan, measure: Measure, summary: Summary, evidence: Evidence, many: bool
) -> tuple[Floats, PromptSet] | None:
    name = measure.benchmark
    if row.settings == "plain" and measure.kind != "pass" and not name.endswith("_plain"):
        name += "_plain"
    outcome = summary.outcomes.get(name)
    if outcome is None:
        return None
    prompts = evidence.prompts[outcome.prompts]
    values = _of_outcome(row, measure, outcome, many)
    if measure.kind == "balanced":
        values = values * balanced_weights(prompts) * values.size
    if measure.prompts != "all":
        wanted = np.array(prompts.held_out) == (measure.prompts == "unseen")
        values = np.where(wanted, values, np.nan)
    return values, prompts


def _of_outcome(row: RowPlan, measure: Measure, outcome: Outcome, many: bool) -> Floats:
    unknown = np.full(outcome.first.size, np.nan)
    if row.best_of is not None:
        single = measure.kind == "first" and not measure.benchmark.endswith("_plain")
        return outcome.best_of.get(row.best_of, unknown) if single else unknown
    if measure.kind == "pass":
        if row.settings == "plain" or outcome.samples < measure.k:
            return unknown
        known = np.isfinite(outcome.counts)
        passes = [pass_at_k(outcome.samples, round(float(c)), measure.k) for c in outcome.counts[known]]
        unknown[known] = passes
        return unknown
    return outcome.counts / outcome.samples if many else outcome.first
