"""Several runs side by side: a table for the terminal and the same one as markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table
from rich.text import Text

from lvrpo.errors import InputError
from lvrpo.records import Estimate
from lvrpo.report.numbers import score
from lvrpo.report.run import RunRecord, load_run
from lvrpo.report.verdict import label, task_order

COLORS = {"up": "green", "down": "red", "flat": "dim", "unsure": "dim"}


@dataclass(frozen=True)
class Cell:
    """One task of one run."""

    before: Estimate | None
    after: Estimate | None
    difference: Estimate | None


@dataclass(frozen=True)
class Comparison:
    """Rows are runs (and their baselines), columns are tasks."""

    tasks: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]

    def table(self) -> Table:
        """For ``rich.print``."""
        table = Table(title="before → after, difference with 95 % interval", title_justify="left", show_lines=True)
        table.add_column("run", overflow="fold")
        for task in self.tasks:
            table.add_column(label(task), justify="right", overflow="fold")
        for name, cells in self.rows:
            table.add_row(Text(name), *(_rich_cell(cell) for cell in cells))
        return table

    def markdown(self) -> str:
        """A table for a results page."""
        heads = ["run", *(label(task) for task in self.tasks)]
        lines = ["| " + " | ".join(heads) + " |", "|---" + "|--:" * len(self.tasks) + "|"]
        for name, cells in self.rows:
            texts = [f"{_values(cell)}<br>{_change(cell)}" if _change(cell) else _values(cell) for cell in cells]
            lines.append("| " + " | ".join([name.replace("|", "\\|"), *texts]) + " |")
        return "\n".join(lines) + "\n"


def compare_runs(runs: Sequence[Path]) -> Comparison:
    """Read the summaries of some runs. A run without one has empty cells; a baseline inside one is a row of its own."""
    if not runs:
        raise InputError("no run to compare: name at least one run directory")
    records = [load_run(Path(path)) for path in runs]
    tables = [t for r in records if r.summary for t in (r.summary.before, r.summary.after)]
    tasks = tuple(task_order(*tables))
    counted = Counter(record.name for record in records)
    rows: list[tuple[str, tuple[Cell, ...]]] = []
    for record in records:
        name = record.name if counted[record.name] == 1 else str(record.path)
        rows.append((name if record.finished else f"{name} (not finished)", _cells(record, tasks)))
        if record.summary and record.summary.baseline:
            base = record.summary.baseline
            cells = tuple(Cell(record.summary.before.get(t), base.after.get(t), base.difference.get(t)) for t in tasks)
            rows.append((f"{name}: {base.name}", cells))
    return Comparison(tasks, tuple(rows))


def _cells(record: RunRecord, tasks: tuple[str, ...]) -> tuple[Cell, ...]:
    summary = record.summary
    if summary is None:
        return tuple(Cell(None, None, None) for _ in tasks)
    tables = (summary.before, summary.after, summary.difference)
    return tuple(Cell(*(table.get(task) for table in tables)) for task in tasks)


def _values(cell: Cell) -> str:
    before, after = (score(e.score) if e else "–" for e in (cell.before, cell.after))
    return f"{before} → {after}" if cell.before or cell.after else "–"


def _change(cell: Cell) -> str:
    d = cell.difference
    if d is None:
        return ""
    interval = ""
    if d.low is not None and d.high is not None:
        interval = f" [{score(d.low, signed=True)}, {score(d.high, signed=True)}]"
    return score(d.score, signed=True) + interval


def _rich_cell(cell: Cell) -> Text:
    text = Text(_values(cell))
    if cell.difference is not None:
        text.append("\n" + _change(cell), style=COLORS[cell.difference.direction])
    return text
