"""The reward audit as the template draws it, from ``audit.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvrpo.errors import InputError
from lvrpo.reading import is_there, read_json
from lvrpo.report.curves import TASK_NAMES, Chart, Points, line_chart
from lvrpo.report.records import Estimate, number
from lvrpo.report.verdict import label

FEW = 10
"""A correlation over fewer groups is not shown."""
NAMES = {
    "tokens": "tokens written",
    "cut_off": "share of texts cut off",
    "text_diversity": "share of a group's texts that differ",
    "picture_diversity": "difference of a group's pictures",
    "red": "mean red",
    "green": "mean green",
    "blue": "mean blue",
}
"""Of traits; other names are shown as they are."""


@dataclass(frozen=True)
class Scorer:
    """One row of the table of causes."""

    name: str
    weight: float | None
    """None: held out."""
    caused: tuple[float | None, ...]
    """Share, the share asked for, the share under the other formula."""
    dead: tuple[float | None, ...]
    """Shares of groups: constant, all best, all worst; share of outputs: missing."""


@dataclass(frozen=True)
class Course:
    """One row of the table of means."""

    name: str
    is_score: bool
    """Whether up is good; a trait of the outputs is neither good nor bad."""
    first: float | None
    last: float | None
    difference: Estimate | None
    control: float | None


@dataclass(frozen=True)
class Correlations:
    """A table of correlations inside groups; None where too few groups stand behind it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@dataclass(frozen=True)
class Valid:
    """One row of the table of validity; None where too few groups stand behind a number."""

    name: str
    """Of a reward, or of a category of prompts."""
    is_category: bool
    rank: Estimate | None
    auc: Estimate | None
    first: float | None
    """AUC in the first part of the run, where that is known."""
    last: float | None
    change: Estimate | None


@dataclass(frozen=True)
class Task:
    """What the rewards did in one task."""

    label: str
    groups: int
    with_signal: float | None
    rest: float | None
    scorers: tuple[Scorer, ...]
    courses: tuple[Course, ...]
    validity: tuple[Valid, ...]
    verifier: str
    """Who grades for ``Valid.rank``."""
    correlations: Correlations
    shares: tuple[Chart, ...]
    """The share that a reward caused beside the one its weight asks for."""
    others: tuple[Chart, ...]
    """Validity, constant groups, and traits of the outputs beside those of the base."""


@dataclass(frozen=True)
class Audit:
    """``audit.json``."""

    formula: str
    other_formula: str
    steps: str
    first: str
    last: str
    tasks: tuple[Task, ...]
    alarms: tuple[str, ...]
    """Of both kinds."""
    parted: bool
    """Whether one of them is of a reward that rose while a held-out score fell."""
    comparisons: int


def read_audit(path: Path, problems: list[str]) -> Audit | None:
    """The audit, or None where the run has none; what cannot be read is noted in ``problems``."""
    if not is_there(path):
        return None
    try:
        return _audit(read_json(path, finite=False))
    except (InputError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        problems.append(
            f"{path.name} could not be read ({type(error).__name__}: {error}): lvrpo report writes it anew."
        )
        return None


def _audit(raw: Mapping[str, Any]) -> Audit:
    first, last = (f"steps {window['first']} to {window['last']}" for window in (raw["windows"][0], raw["windows"][-1]))
    steps, recorded = raw["steps"], raw["recorded"]
    every = steps["last"] - steps["first"] + 1
    return Audit(
        formula=str(raw["formula"]),
        other_formula=str(raw["other_formula"]),
        steps=f"{recorded:,} of {every:,} steps are on record" if recorded < every else "All steps are on record",
        first=first,
        last=last,
        tasks=tuple(_task(str(task), found) for task, found in raw["tasks"].items()),
        alarms=tuple(str(a["words"]) for a in (*raw["alarms"].get("missing", ()), *raw["alarms"]["found"])),
        parted=bool(raw["alarms"]["found"]),
        comparisons=int(raw["alarms"]["comparisons"]),
    )


def _task(task: str, raw: Mapping[str, Any]) -> Task:
    scorers = tuple(_scorer(s) for s in raw["scorers"])
    courses = [_course(s["name"], s["mean"], is_score=True) for s in raw["scorers"]]
    courses += [_course(name, change, is_score=False) for name, change in raw["drift"].items()]
    name = TASK_NAMES.get(task) or label(task)
    return Task(
        label=name,
        groups=int(raw["groups"]),
        with_signal=number(raw["with_signal"]),
        rest=number(raw["rest"]),
        scorers=scorers,
        courses=tuple(courses),
        validity=tuple(row for found in raw.get("validity", ()) for row in _valid(found)),
        verifier=next((str(found["verifier"]) for found in raw.get("validity", ())), ""),
        correlations=_correlations(raw["scorers"]),
        shares=_share_charts(name, scorers, raw["series"]),
        others=_other_charts(raw["series"], raw["control_series"]),
    )


def _scorer(raw: Mapping[str, Any]) -> Scorer:
    caused = tuple(number(raw[key]) for key in ("share", "configured_share", "other_share"))
    dead = tuple(number(raw[key]) for key in ("constant", "all_best", "all_worst", "missing"))
    return Scorer(str(raw["name"]), number(raw["weight"]) or None, caused, dead)


def _valid(raw: Mapping[str, Any]) -> list[Valid]:
    """A reward and its categories; nothing of one that scores as success does."""
    if raw["is_success"]:
        return []
    along, whole, categories = raw["along"], raw["whole"], raw["categories"]
    first, last = (None if along is None else _known(along[end]["auc"]) for end in ("first", "last"))
    row = Valid(
        name=str(raw["name"]),
        is_category=False,
        rank=_known(whole["rank"]),
        auc=_known(whole["auc"]),
        first=first and first.score,
        last=last and last.score,
        change=None if along is None else _known(along["auc_change"]),
    )
    inner = categories.items() if len(categories) > 1 else ()
    return [row, *(Valid(_words(c), True, _known(r["rank"]), _known(r["auc"]), None, None, None) for c, r in inner)]


def _known(raw: Mapping[str, Any]) -> Estimate | None:
    """An interval over enough groups."""
    value = number(raw["score"])
    return None if value is None or raw["n"] < FEW else Estimate(value, number(raw["low"]), number(raw["high"]))


def _course(name: str, raw: Mapping[str, Any], is_score: bool) -> Course:
    moved = raw["difference"]
    value = number(moved["score"])
    difference = None if value is None else Estimate(value, number(moved["low"]), number(moved["high"]))
    return Course(
        NAMES.get(name, name), is_score, number(raw["first"]), number(raw["last"]), difference, number(raw["control"])
    )


def _correlations(scorers: list[Mapping[str, Any]]) -> Correlations:
    names = [str(scorer["name"]) for scorer in scorers]
    columns = list(dict.fromkeys([*names, *(name for scorer in scorers for name in scorer["correlations"])]))
    if not any(scorer["correlations"] for scorer in scorers):
        return Correlations((), ())
    rows = []
    for scorer in scorers:
        found = [scorer["correlations"].get(column) for column in columns]
        values = tuple(number(c["value"]) if c is not None and c["groups"] >= FEW else None for c in found)
        rows.append((str(scorer["name"]), values))
    return Correlations(tuple(NAMES.get(column, column) for column in columns), tuple(rows))


def _share_charts(task: str, scorers: tuple[Scorer, ...], series: Mapping[str, Any]) -> tuple[Chart, ...]:
    """One per trained reward where there is more than one."""
    trained = [scorer for scorer in scorers if scorer.caused[1] is not None]
    charts = []
    for scorer in trained if len(trained) > 1 else []:
        points = _points(series.get(f"share/{scorer.name}"))
        if points:
            asked = scorer.caused[1] or 0.0
            ends = [(points[0][0], asked), (points[-1][0], asked)]
            charts.append(line_chart(f"{task}: {_words(scorer.name)}", points, ends, "asked for"))
    return tuple(charts)


def _other_charts(series: Mapping[str, Any], control: Mapping[str, Any]) -> tuple[Chart, ...]:
    charts = []
    for key, raw in series.items():
        kind, _, name = key.partition("/")
        points = _points(raw)
        if kind == "share" or not points:
            continue
        titles = {"constant": f"groups constant in {name}", "auc": f"AUC of {name}"}
        title = titles.get(kind, NAMES.get(key, key)) if name else NAMES.get(key, key)
        charts.append(line_chart(_words(title), points, _points(control.get(key)), "the base on the same prompts"))
    return tuple(charts)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _points(raw: Any) -> Points:
    """Pairs of finite numbers. Any: what JSON holds."""
    pairs = ((number(step), number(value)) for step, value in raw or [])
    return [(step, value) for step, value in pairs if step is not None and value is not None]
