"""The gradient audit of a run: how the tasks' gradients agreed, per expert and layer, and how large they were."""

from __future__ import annotations

from dataclasses import dataclass

from lvrpo.records import Metrics
from lvrpo.report.verdict import TASK_LABELS

EXPERTS = ("all", "reading", "drawing", "shared")


@dataclass(frozen=True)
class Cell:
    """A number over the audited steps."""

    mean: float
    low: float
    high: float

    @property
    def tone(self) -> str:
        """pull together, apart, or neither: a cosine that keeps its sign at every audited step."""
        return "together" if self.low > 0 else "apart" if self.high < 0 else "mixed"


@dataclass(frozen=True)
class Table:
    """Rows of named cells."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]


@dataclass(frozen=True)
class GradientAudit:
    """What the page shows of the audit."""

    steps: int
    """Audited ones."""
    cosines: Table
    """Pairs of tasks by expert."""
    layers: Table
    """Layers of the experts by pair of tasks."""
    norms: Table
    """Tasks by expert."""


def gradient_audit(metrics: Metrics) -> GradientAudit | None:
    """The tables of a run that was audited; None of any other."""
    keys = [key.split("/", 3)[1:] for key in metrics.numeric_keys() if key.startswith("gradient/")]
    pairs = list(dict.fromkeys(who for what, who, _ in keys if what == "cosine"))
    tasks = list(dict.fromkeys(who for what, who, _ in keys if what == "norm"))
    if not tasks:
        return None
    layers = sorted({part for _, _, part in keys if "/layer_" in part}, key=_place)
    experts = [part for part in EXPERTS if part in {part for _, _, part in keys}]
    steps = max(len(metrics.series(f"gradient/norm/{task}/all")) for task in tasks)

    def row(what: str, cells: list[tuple[str, str]]) -> tuple[Cell | None, ...]:
        return tuple(_cell(metrics, f"gradient/{what}/{who}/{part}") for who, part in cells)

    return GradientAudit(
        steps,
        Table(tuple(experts), tuple((_names(p), row("cosine", [(p, e) for e in experts])) for p in pairs)),
        Table(
            tuple(map(_names, pairs)),
            tuple((_layer(part), row("cosine", [(p, part) for p in pairs])) for part in layers),
        ),
        Table(tuple(experts), tuple((_names(t), row("norm", [(t, e) for e in experts])) for t in tasks)),
    )


def _cell(metrics: Metrics, key: str) -> Cell | None:
    values = [value for _, value in metrics.series(key)]
    return Cell(sum(values) / len(values), min(values), max(values)) if values else None


def _names(tasks: str) -> str:
    """understand+edit -> Questions and Editing."""
    return " and ".join(TASK_LABELS.get(task, task).partition(",")[0] for task in tasks.split("+"))


def _layer(part: str) -> str:
    expert, _, layer = part.partition("/layer_")
    return f"{expert}, layer {layer}"


def _place(part: str) -> tuple[str, int]:
    expert, _, layer = part.partition("/layer_")
    return expert, int(layer) if layer.isdigit() else 0
