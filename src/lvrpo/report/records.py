"""A run directory read back from its files. Everything but config and metrics may be missing or unfinished."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lvrpo.errors import InputError
from lvrpo.reading import is_there, parse_json, read_bytes, read_json, read_json_object

MARKERS = ("config.yaml", "manifest.json", "metrics.jsonl", "summary.json")
"""A folder that holds none of these is not a run directory."""

LEVEL = 0.05
"""p below which a category's difference is told."""


@dataclass(frozen=True)
class Estimate:
    """A score with its 95 % interval."""

    score: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    detectable: float | None = None
    """Of a difference: the smallest true one that could have been told."""
    p_holm: float | None = None
    """Of a category's difference: p, adjusted for how many categories there are."""

    @property
    def direction(self) -> str:
        """Of a difference: up or down when the interval is clear of 0, else flat; unsure without an interval.

        Flat also where p, adjusted for how many categories there are, is not below .05.
        """
        if self.low is None or self.high is None:
            return "unsure"
        if self.p_holm is not None and self.p_holm >= LEVEL:
            return "flat"
        return "up" if self.low > 0 else "down" if self.high < 0 else "flat"


@dataclass(frozen=True)
class TaskScore:
    """The score of a task and of its categories."""

    all: Estimate
    categories: Mapping[str, Estimate] = field(default_factory=dict)
    metric: str = "success"
    """success: a share of right outputs; reward: a mean of the run's own rewards."""


@dataclass(frozen=True)
class Baseline:
    """Another method from the same base with the same compute."""

    name: str
    after: Mapping[str, TaskScore]
    difference: Mapping[str, TaskScore]
    """Its after minus the common before."""


@dataclass(frozen=True)
class Summary:
    """``summary.json``."""

    before: Mapping[str, TaskScore]
    after: Mapping[str, TaskScore]
    difference: Mapping[str, TaskScore]
    baseline: Baseline | None
    raw: Mapping[str, Any]


@dataclass(frozen=True)
class Metrics:
    """``metrics.jsonl``: one row a step, the last one where a resumed run wrote a step twice."""

    rows: tuple[Mapping[str, Any], ...]
    broken_lines: tuple[int, ...] = ()

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


@dataclass(frozen=True)
class FactCheck:
    """One fact of a drawing and whether it holds (None: not known)."""

    question: str
    answer: str
    holds: bool | None


@dataclass(frozen=True)
class Case:
    """One kept evaluation case."""

    id: str
    task: str
    category: str
    text: str
    answer: str
    output_text: str | None
    score: float | None
    image: str | None
    source_image: str | None
    facts: tuple[FactCheck, ...]
    reward: float | None = None
    """Of an output that cannot be told right from wrong."""


@dataclass(frozen=True)
class RunRecord:
    """All that the report knows about a run."""

    path: Path
    config: str
    manifest: Mapping[str, Any]
    metrics: Metrics
    summary: Summary | None
    contract: tuple[Mapping[str, Any], ...]
    phases: tuple[tuple[str, Mapping[str, Case]], ...]
    """(label, cases by id) in order of time: before, step 20, ..., after."""
    grids: tuple[tuple[int, Path], ...]
    """(step, picture of sampled groups) in order of steps."""
    problems: tuple[str, ...]
    """What could not be read, in words for the page."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def finished(self) -> bool:
        """Whether it came to its end, measured or not."""
        if self.summary is None:  # a pretraining run has none, and no plan of an evaluation either
            return (self.path / "policy.json").is_file() and not (self.path / "plan.json").exists()
        return bool(self.summary.after) or not self.summary.before

    def cases(self, label: str) -> Mapping[str, Case]:
        return next((cases for name, cases in self.phases if name == label), {})


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def load_run(path: Path) -> RunRecord:
    """Read a run directory. Raises ``InputError`` for a folder that is none and for a summary that is unreadable."""
    path = Path(path)
    if not path.is_dir() or not any((path / name).is_file() for name in MARKERS):
        why = "holds none of " + ", ".join(MARKERS) if path.is_dir() else "is not a folder"
        raise InputError(
            f"{path} is not a run directory (it {why}): give a folder that lvrpo train or quickstart wrote"
        )
    problems: list[str] = []
    manifest = _tolerant_json(path / "manifest.json", problems)
    contract = _tolerant_json(path / "contract.json", problems)
    metrics = read_metrics(path / "metrics.jsonl")
    if metrics.broken_lines:
        lines = ", ".join(map(str, metrics.broken_lines[:8]))
        problems.append(f"metrics.jsonl: line {lines} is unfinished or not readable and was left out.")
    return RunRecord(
        path=path,
        config=_text(path / "config.yaml"),
        manifest=manifest if isinstance(manifest, dict) else {},
        metrics=metrics,
        summary=read_summary(path / "summary.json"),
        contract=tuple(c for c in contract if isinstance(c, dict)) if isinstance(contract, list) else (),
        phases=tuple(_phases(path, problems)),
        grids=tuple(
            (step, folder / "grid.png") for step, folder in _step_folders(path) if (folder / "grid.png").is_file()
        ),
        problems=tuple(problems),
    )


def read_metrics(path: Path) -> Metrics:
    """Rows by step; a line that is cut off or is no JSON object with a step is counted, not used."""
    rows: dict[float, Mapping[str, Any]] = {}
    broken: list[int] = []
    for number_of_line, line in enumerate(_text(path).splitlines(), start=1):
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
            broken.append(number_of_line)
    return Metrics(tuple(rows[step] for step in sorted(rows)), tuple(broken))


def read_summary(path: Path) -> Summary | None:
    """``summary.json``, or None where there is none yet."""
    if not is_there(path):
        return None
    remedy = "evaluate the run again or delete the file"
    raw = read_json_object(path, remedy, finite=False)
    try:
        before, after, difference = (_task_scores(raw.get(k), k) for k in ("before", "after", "difference"))
        other = raw.get("baseline")
        baseline = None
        if isinstance(other, dict):
            baseline = Baseline(
                name=str(other.get("name") or "baseline"),
                after=_task_scores(other.get("after"), "baseline.after"),
                difference=_task_scores(other.get("difference"), "baseline.difference"),
            )
    except TypeError as error:
        raise InputError(f"{path}: {error}: {remedy}") from error
    return Summary(before, after, difference, baseline, raw)


def _task_scores(raw: object, where: str) -> dict[str, TaskScore]:
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise TypeError(f"{where} is {type(raw).__name__}, not a table of tasks")
    scores: dict[str, TaskScore] = {}
    for task, entry in raw.items():
        estimate = _estimate(entry, f"{where}.{task}")
        if estimate is None:
            continue
        inside = entry.get("categories") or {}
        if not isinstance(inside, dict):
            raise TypeError(f"{where}.{task}.categories is {type(inside).__name__}, not a table")
        named = {str(name): _estimate(value, f"{where}.{task}.categories.{name}") for name, value in inside.items()}
        kept = {name: e for name, e in named.items() if e is not None}
        scores[str(task)] = TaskScore(estimate, kept, str(entry.get("metric") or "success"))
    return scores


def _estimate(entry: object, where: str) -> Estimate | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise TypeError(f"{where} is {type(entry).__name__}, not an object with score, low and high")
    raw = entry.get("score")
    if raw is not None and (isinstance(raw, bool) or not isinstance(raw, int | float)):
        raise TypeError(f"{where}.score is {raw!r}, not a number")
    value = number(raw)
    if value is None:
        return None
    n = number(entry.get("n"))
    low, high, detectable, p_holm = (number(entry.get(name)) for name in ("low", "high", "detectable", "p_holm"))
    return Estimate(value, low, high, None if n is None else int(n), detectable, p_holm)


def _phases(path: Path, problems: list[str]) -> Iterator[tuple[str, dict[str, Case]]]:
    """Before, what was kept in between, after."""
    yield "before", _cases(path / "eval" / "before.json", problems)
    known = [(step, _cases(file, problems)) for step, file in _numbered(path / "eval", "step_*.json")]
    known += [(step, _group_cases(folder / "groups.jsonl")) for step, folder in _step_folders(path)]
    for step, cases in sorted(known, key=lambda pair: pair[0]):
        if cases:
            yield f"step {step}", cases
    yield "after", _cases(path / "eval" / "after.json", problems)


def _cases(path: Path, problems: list[str]) -> dict[str, Case]:
    raw = _tolerant_json(path, problems)
    rows = raw.get("prompts") if isinstance(raw, dict) else None
    return {case.id: case for row in rows or [] if isinstance(row, dict) and (case := _case(row)) is not None}


def _case(row: Mapping[str, Any]) -> Case | None:
    if row.get("id") is None:
        return None
    facts = tuple(
        FactCheck(str(f.get("question", "")), str(f.get("answer", "")), _truth(f.get("holds")))
        for f in row.get("facts") or ()
        if isinstance(f, dict)
    )
    output = row.get("output_text")
    return Case(
        id=str(row["id"]),
        task=str(row.get("task") or ""),
        category=str(row.get("category") or ""),
        text=str(row.get("text") or ""),
        answer="" if row.get("answer") is None else str(row["answer"]),
        output_text=None if output is None else str(output),
        score=number(row.get("score")) if not isinstance(row.get("score"), bool) else float(row["score"]),
        image=str(row["image"]) if row.get("image") else None,
        source_image=str(row["source_image"]) if row.get("source_image") else None,
        facts=facts,
        reward=number(row.get("reward")),
    )


def _group_cases(path: Path) -> dict[str, Case]:
    """The first member of each sampled group, as a case; only those that a kept prompt shares its id with are shown."""
    cases: dict[str, Case] = {}
    for line in _text(path).splitlines():
        try:
            row = parse_json(line, str(path), finite=False)
        except InputError:
            continue
        if not isinstance(row, dict):
            continue
        members = [m for m in row.get("members") or () if isinstance(m, dict)]
        case = _case({**row, **members[0]} | {"id": row.get("id")} if members else row)
        if case is not None and (case.image or case.output_text is not None):
            cases.setdefault(case.id, case)
    return cases


def _truth(value: object) -> bool | None:
    return bool(value) if isinstance(value, bool | int | float) else None


def _step_folders(path: Path) -> list[tuple[int, Path]]:
    return _numbered(path / "samples", "step_*")


def _numbered(folder: Path, pattern: str) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(r"step_(\d+)", entry.stem), entry) for entry in folder.glob(pattern))
    return sorted((int(match[1]), entry) for match, entry in found if match)


def _text(path: Path) -> str:
    """The file's text; empty where there is none. Bytes that are no text become a replacement character."""
    return read_bytes(path, "delete it").decode("utf-8", errors="replace") if is_there(path) else ""


def _tolerant_json(path: Path, problems: list[str]) -> Any:
    if not is_there(path):
        return None
    try:
        return read_json(path, finite=False)
    except InputError as error:
        problems.append(
            f"{path.parent.name + '/' if path.parent.name == 'eval' else ''}{path.name} could not be read: {error}."
        )
        return None
