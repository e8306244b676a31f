"""Typed records of the JSON files of evaluations and runs, for writing and reading them.

``from_json`` builds a record from what a JSON file holds. A file of another shape is an ``InputError`` of one line that
names the file, the place and the rule; unknown keys are ignored.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lvrpo.errors import InputError
from lvrpo.metrics import ReadBack
from lvrpo.reading import parse_json, path_exists, read_bytes, read_json_object

R = TypeVar("R")
LEVEL = 0.05
"""p-value below which a difference is significant."""


# --- from JSON to records ---

RULES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}


def from_json(kind: type[R], value: Any, where: str, remedy: str = "restore the file") -> R:
    """A record of a type from what JSON holds; ``where`` begins the message of the ``InputError``. Any: JSON values.

    Null is nan where a float is meant; a number that is not finite is None where a float or None is meant.
    """
    try:
        return _decoded(kind, value, "")
    except TypeError as error:
        raise InputError(f"{where}: {error}: {remedy}") from None


def read_record(kind: type[R], path: Path, remedy: str = "restore the file") -> R:
    """A record from a JSON file; raises ``InputError``."""
    return from_json(kind, read_json_object(path, remedy, finite=False), str(path), remedy)


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return None
    return float(value)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decoded(kind: Any, value: Any, at: str) -> Any:
    """Any: a type annotation and a JSON value. Raises TypeError that begins with the place inside the file."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any or (origin is Literal and value in inner):
        return value
    if origin in (Union, types.UnionType):
        choice = next(each for each in inner if each is not type(None))
        return None if _is_null(value) else _decoded(choice, value, at)
    if is_dataclass(kind) and isinstance(kind, type):
        return _decoded_dataclass(kind, value, at)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        each = [inner[0]] * len(value) if origin is list or inner[-1] is ... else inner
        if len(each) == len(value):
            return origin(_decoded(a, v, f"{at}[{i}]") for i, (a, v) in enumerate(zip(each, value, strict=True)))
    if origin in (Mapping, dict) and isinstance(value, Mapping):
        return {key: _decoded(inner[1], v, f"{at}.{key}") for key, v in value.items()}
    if kind is float and value is None:
        return math.nan
    if kind is float and (isinstance(value, float) or number(value) is not None):
        return value if isinstance(value, float) else number(value)
    if kind is bool and value in (0, 1):
        return bool(value)
    if kind in (int, str) and isinstance(value, kind) and not isinstance(value, bool):
        return value
    if origin in (None, Literal):
        rule = f"one of {', '.join(inner)}" if origin else RULES[kind]
        raise TypeError(f"{at.removeprefix('.')} is {value!r:.60}, not {rule}")
    what = "a list" if origin in (tuple, list) else "an object"
    raise TypeError(f"{at.removeprefix('.') or 'the file'} is {type(value).__name__}, not {what}")


def _decoded_dataclass(kind: Any, value: Any, at: str) -> Any:
    hints = _hints(kind)
    if isinstance(value, list) and len(value) == len(hints):  # written as its values alone
        value = dict(zip(hints, value, strict=True))
    if not isinstance(value, Mapping):
        raise TypeError(f"{at.removeprefix('.') or 'the file'} is {type(value).__name__}, not an object")
    for each in fields(kind):
        if each.name not in value and each.default is MISSING and each.default_factory is MISSING:
            raise TypeError(f"{f'{at}.{each.name}'.removeprefix('.')} is missing")
    values = {name: _decoded(hints[name], value[name], f"{at}.{name}") for name in hints if name in value}
    try:
        return kind(**values)
    except ValueError as error:
        raise TypeError(f"{at.removeprefix('.') or 'the file'}: {error}") from None


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and number(value) is None)


# --- one benchmark, prompt by prompt ---


MeanOver = Literal["prompts", "categories"]


@dataclass(frozen=True)
class BenchmarkRecord:
    """One benchmark, prompt by prompt: every table can be computed from it, and paired with another policy's.

    What follows ``scores`` is empty in records of older versions; else it has one entry per prompt.
    """

    ids: tuple[str, ...]
    categories: tuple[str, ...]
    clusters: tuple[str, ...]
    """Resampling unit of each prompt: its image, or its content."""
    scores: tuple[float, ...]
    """Mean of the first ``samples`` outputs; nan where a reward failed: such prompts are left out of every mean."""
    samples: int = 1
    successes: tuple[tuple[float, ...], ...] = ()
    """1 or 0 of every sample; some prompts are sampled more often than ``samples``."""
    judged: tuple[tuple[float | None, ...], ...] = ()
    """The VQA score of every sample by the judge; () where nothing was judged, None where that failed."""
    read_back: tuple[ReadBack | None, ...] = ()
    """The model's own reading of its first image; None where there is none."""
    forms: tuple[str, ...] = ()
    """The form of each question; "" where there is no right text."""
    right: tuple[str | None, ...] = ()
    """The right answers, where the output is a text."""
    answers: tuple[tuple[str, ...], ...] = ()
    """The answers given, of the first ``samples``."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Sampling parameters, judge, and a digest of the prompts. Any: JSON values."""
    metric: Literal["success", "reward"] = "success"
    """success: shares of right outputs; reward: means of the run's own rewards, for which no samples are recorded."""
    held_out: tuple[bool, ...] = ()
    """Whether a prompt has a composition that training never shows."""
    mean_over: MeanOver = "prompts"
    """What the overall score is the mean of: prompts, or the means of categories."""
    failures: tuple[str, ...] = ()
    """Reasons of missing scores; "" where a prompt has one."""

    def __post_init__(self) -> None:
        """Raises ValueError where lists differ in length."""
        lists = [value for value in vars(self).values() if isinstance(value, tuple)]
        required = (self.ids, self.categories, self.clusters, self.scores)
        if any(len(each) != len(self.ids) for each in [*required, *filter(None, lists)]):
            raise ValueError("its lists differ in length")

    def has_prompts_of(self, other: BenchmarkRecord) -> bool:
        """Whether both are of the same prompts; of records of older versions the ids alone are known."""
        digests = {each.settings["prompts"] for each in (self, other) if "prompts" in each.settings}
        return self.ids == other.ids and len(digests) <= 1

    def as_dict(self) -> dict[str, Any]:
        """As JSON; empty fields are left out."""
        raw: dict[str, Any] = {name: list(values) for name, values in vars(self).items() if isinstance(values, tuple)}
        raw["successes"] = [
            [int(success) if math.isfinite(success) else None for success in row] for row in self.successes
        ]
        raw["read_back"] = [None if back is None else list(vars(back).values()) for back in self.read_back]
        always = ("ids", "categories", "clusters", "scores")
        kept = {name: values for name, values in raw.items() if values or name in always}
        whole = {"mean_over": self.mean_over} if self.mean_over != "prompts" else {}
        return {**kept, "samples": self.samples, "settings": dict(self.settings), "metric": self.metric, **whole}


@dataclass(frozen=True)
class FactCheck:
    """One fact of an image and whether it holds (None: not known)."""

    question: str = ""
    answer: str = ""
    holds: bool | None = None


SampleKey = tuple[str, str]
"""(benchmark, id of the prompt); rows of two files may have the same ids."""


@dataclass(frozen=True)
class Sample:
    """One prompt of an evaluation with its first output: a row of ``prompts``."""

    id: str
    benchmark: str = ""
    """"" in files of older versions."""
    task: str = ""
    category: str = ""
    text: str = ""
    answer: str | None = None
    output_text: str | None = None
    score: float | None = None
    reward: float | None = None
    """Mean reward, where there is no verifiable answer."""
    image: str | None = None
    """File below the run directory; so is ``source_image``."""
    source_image: str | None = None
    facts: tuple[FactCheck, ...] = ()

    @property
    def key(self) -> SampleKey:
        return self.benchmark, self.id


@dataclass(frozen=True)
class Cost:
    """The cost of a baseline."""

    seconds: float
    peak_memory_gib: float


@dataclass(frozen=True)
class EvaluationRecord:
    """``eval/before.json`` and ``eval/after.json``."""

    scores: Mapping[str, BenchmarkRecord]
    seconds: float
    prompts: tuple[Sample, ...] = ()
    """The samples that the report shows."""
    cost: Cost | None = None


# --- results and their differences ---


def direction(low: float | None, high: float | None, p_holm: float | None = None) -> str:
    """``Estimate.direction`` of a difference by its interval and its adjusted p."""
    if low is None or high is None:
        return "unsure"
    if p_holm is not None and p_holm >= LEVEL:
        return "flat"
    return "up" if low > 0 else "down" if high < 0 else "flat"


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of scores, with its 95 % interval."""

    score: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    """Prompts."""
    detectable: float | None = None
    """For a difference: the minimal detectable effect at power .8."""
    p: float | None = None
    """For a difference: the p-value."""
    p_holm: float | None = None
    """For a category's difference: p with Holm's correction over the categories."""

    @property
    def direction(self) -> str:
        """For a difference: up or down where the interval excludes 0, else flat; unsure without an interval.

        Flat also where the adjusted p is not below ``LEVEL``.
        """
        return direction(self.low, self.high, self.p_holm)

    def as_dict(self) -> dict[str, Any]:
        """As JSON; unknown fields are left out."""
        return {each.name: value for each in fields(Estimate) if (value := getattr(self, each.name)) is not None}


@dataclass(frozen=True)
class BenchmarkResult(Estimate):
    """A benchmark, or the difference of two policies on it, with its categories."""

    categories: Mapping[str, Estimate] = field(default_factory=dict)
    compositions: Mapping[str, Estimate] = field(default_factory=dict)
    """seen, unseen: combinations of the prompts, where some are unseen in training."""
    metric: str = "success"
    """success: a share of right outputs; reward: a mean of the run's own rewards."""
    measures: Mapping[str, Any] = field(default_factory=dict)
    """pass_at_k, best_of, ...: what ``evaluation.results`` computes from many samples. Any: JSON values."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON; ``measures`` stand beside the score."""
        parts = {name: {k: e.as_dict() for k, e in vars(self)[name].items()} for name in ("categories", "compositions")}
        found = {name: part for name, part in parts.items() if part or name == "categories"}
        return {**super().as_dict(), **found, "metric": self.metric, **self.measures}


@dataclass(frozen=True)
class BaselineResult:
    """A baseline method from the same base."""

    name: str
    after: Mapping[str, BenchmarkResult]
    difference: Mapping[str, BenchmarkResult]
    """Its results after training minus the common results before."""


@dataclass(frozen=True)
class Summary:
    """``summary.json``: results by benchmark."""

    before: Mapping[str, BenchmarkResult]
    after: Mapping[str, BenchmarkResult]
    difference: Mapping[str, BenchmarkResult]
    baseline: BaselineResult | None
    raw: Mapping[str, Any]
    """The whole file. Any: JSON values."""

    @classmethod
    def read(cls, path: Path) -> Summary | None:
        """None where there is no file yet; raises ``InputError``."""
        if not path_exists(path):
            return None
        remedy = "evaluate the run again or delete the file"
        raw = read_json_object(path, remedy, finite=False)
        other, baseline = raw.get("baseline"), None
        try:
            before, after, difference = (_parse_results(raw.get(n), f".{n}") for n in ("before", "after", "difference"))
            if isinstance(other, dict):
                parts = (_parse_results(other.get(name), f".baseline.{name}") for name in ("after", "difference"))
                baseline = BaselineResult(str(other.get("name") or "baseline"), *parts)
        except TypeError as error:
            raise InputError(f"{path}: {error}: {remedy}") from None
        return cls(before, after, difference, baseline, raw)


def _parse_results(raw: Any, at: str) -> dict[str, BenchmarkResult]:
    """Results by benchmark. Any: a JSON value."""
    found = {}
    for name, entry in _with_score(raw, at).items():
        categories = _with_score(entry.get("categories"), f"{at}.{name}.categories")
        found[name] = _decoded(BenchmarkResult, {**entry, "categories": categories}, f"{at}.{name}")
    return found


def _with_score(table: Any, at: str) -> dict[str, Mapping[str, Any]]:
    """The entries with a score; entries of an unfinished run may be null. Any: a JSON value."""
    entries = _decoded(Mapping[str, Mapping[str, Any] | None], {} if table is None else table, at)
    return {name: each for name, each in entries.items() if each and not _is_null(each.get("score"))}


# --- metrics of training ---


@dataclass(frozen=True)
class Metrics:
    """``metrics.jsonl``: one row a step, the last one where a resumed run wrote a step twice."""

    rows: tuple[Mapping[str, Any], ...]
    """Any: JSON values."""
    broken_lines: tuple[int, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Metrics:
        """Rows by step; lines that are no JSON object with a step are listed in ``broken_lines``."""
        rows: dict[float, Mapping[str, Any]] = {}
        broken: list[int] = []
        text = read_bytes(path, "delete it").decode("utf-8", errors="replace") if path_exists(path) else ""
        for place, line in enumerate(text.split("\n"), start=1):  # a text may hold U+2028
            if not line.strip():
                continue
            try:
                row = parse_json(line, str(path), finite=False)
            except InputError:
                row = None
            step = number(row.get("step")) if isinstance(row, dict) else None
            if isinstance(row, dict) and step is not None:
                rows[step] = row
            else:
                broken.append(place)
        return cls(tuple(rows[step] for step in sorted(rows)), tuple(broken))

    def numeric_keys(self) -> list[str]:
        """Every key that holds a number somewhere, in order of appearance."""
        found = (k for row in self.rows for k, v in row.items() if number(v) is not None)
        return list(dict.fromkeys(found))

    def series(self, key: str) -> list[tuple[float, float]]:
        """(step, value) wherever the key holds a finite number."""
        pairs = ((float(row["step"]), number(row.get(key))) for row in self.rows)
        return [(step, value) for step, value in pairs if value is not None]

    @property
    def last_step(self) -> int | None:
        return int(self.rows[-1]["step"]) if self.rows else None
