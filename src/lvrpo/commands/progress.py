"""Live progress of a run: a bar, rewards with small curves, the seconds left; plain lines without a terminal."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lvrpo.report.tables import Cell, TextTable, measure_tables, summary_phases, summary_table

BLOCKS = "▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24
PLAIN_EVERY_S = 10.0
RECENT = 5
"""Steps that a shown reward is the mean of."""


def sparkline(values: Sequence[float], width: int = CURVE_WIDTH) -> str:
    """The values as a row of blocks, from their smallest to their largest; means of equal parts where they are many."""
    if not values:
        return ""
    parts = min(width, len(values))
    edges = [round(i * len(values) / parts) for i in range(parts + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    span = high - low
    return "".join(BLOCKS[round((v - low) / span * (len(BLOCKS) - 1)) if span > 1e-9 else 0] for v in means)


def clock(seconds: float) -> str:
    """75 -> "1:15"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """A watcher of runs. A context manager: leaving it leaves the last state on the screen."""

    def __init__(self, total: int, console: Console | None = None, quiet: bool = False) -> None:
        self.total = total
        self.console = console or Console(highlight=False, quiet=quiet)
        self.history: dict[str, list[float]] = {}
        self.row: Mapping[str, Any] = {}
        self.notes: list[str] = []
        self._live: Live | None = None
        self._printed_at = float("-inf")
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def phase(self, text: str) -> None:
        """Says what begins."""
        self._close()
        passed = clock(time.monotonic() - self._started)
        self.console.print(f"[dim]{passed:>6}[/dim]  {escape(text)}", soft_wrap=True)

    def step(self, row: Mapping[str, Any]) -> None:
        """Shows a row of metrics."""
        self.row = row
        for name, value in row.items():
            if isinstance(value, int | float) and name.startswith(("reward/", "control/", "loss/", "validation/")):
                self.history.setdefault(name, []).append(float(value))
        action = row.get("validation/action")
        if action and action not in ("none", "kept best"):
            self.notes.append(f"step {row['step']}: validation {action}")
        if not self.console.is_terminal:
            self._plain(row)
        elif self._live is None:
            self._live = Live(self._screen(), console=self.console, refresh_per_second=4)
            self._live.start()
        else:
            self._live.update(self._screen())
        if row["step"] >= self.total:
            self._close()

    def _close(self) -> None:
        if self._live is not None:
            self._live.update(self._screen(), refresh=True)
            self._live.stop()
            self._live = None

    def _plain(self, row: Mapping[str, Any]) -> None:
        if self.notes:
            self.console.print("        " + escape(self.notes.pop()), soft_wrap=True)
        now = time.monotonic()
        if now - self._printed_at < PLAIN_EVERY_S and row["step"] < self.total:
            return
        self._printed_at = now
        values = [f"{label(name)} {self._now(name)}" for name in self._shown()]
        head = f"step {row['step']}/{self.total}, {clock(row['seconds_left'])} left"
        self.console.print(f"        {head}: {', '.join(values)}", soft_wrap=True, markup=False)

    def _screen(self) -> Group:
        row = self.row
        head = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total, completed=row["step"], width=30)
        times = f"{clock(row['seconds'])} passed, {clock(row['seconds_left'])} left"
        head.add_row(f"  step {row['step']}/{self.total}", bar, times)
        table = Table(box=None, padding=(0, 1), header_style="dim")
        table.add_column("reward" if self._rewarded() else "loss")
        table.add_column("now", justify="right")
        if self._rewarded():
            table.add_column("base", justify="right")
        table.add_column("")
        for name in self._shown():
            base = self.history.get(name.replace("reward/", "control/", 1))
            cells = [Text(label(name)), self._now(name)]
            if self._rewarded():
                cells.append(f"{sum(base[-RECENT:]) / len(base[-RECENT:]):.3f}" if base else "")
            table.add_row(*cells, Text(sparkline(self.history[name]), style="cyan"))
        return Group(head, table, *(Text(f"  {note}", style="yellow") for note in self.notes[-3:]))

    def _rewarded(self) -> bool:
        return any(name.startswith("reward/") for name in self.history)

    def _shown(self) -> list[str]:
        if not self._rewarded():
            return [name for name in self.history if name.startswith(("loss/", "validation/"))]
        return [name for name in self.history if name.startswith("reward/") and not name.endswith("/success")]

    def _now(self, name: str) -> str:
        """The recent mean; "-" if the last step has none, for example because every score failed."""
        return "-" if name.startswith("reward/") and name not in self.row else f"{self._recent(name):.3f}"

    def _recent(self, name: str) -> float:
        last = self.history[name][
            -RECENT if not name.startswith("validation/") else -1 :
        ]  # a validation score is a mean already
        return sum(last) / len(last)


def label(name: str) -> str:
    """reward/generate/all_facts -> "generate all facts"."""
    kind, _, rest = name.partition("/")
    return f"{'held-out ' if kind == 'validation' else ''}{rest.replace('/', ' ').replace('_', ' ')}"


# --- tables ---

NUMBER = re.compile(r"[−+]?[\d.,]*|–")
"""A cell that is aligned to the right where its whole column is such."""
COLORS = {"up": "green", "down": "red", "flat": "dim", "unsure": "dim"}


def summary_tables(summary: Mapping[str, Any]) -> list[TextTable]:
    """Results before and after, and the tables of ``measure_tables``. Any: JSON values."""
    return [summary_table(summary), *measure_tables(summary_phases(summary), summary["difference"])]


def text_table(content: TextTable) -> Table:
    """A table for the terminal."""
    title, note = Text(content.title, "table.title"), Text(content.note, "table.caption")
    table = Table(title=title if title else None, caption=note if note else None, box=None, header_style="dim")
    table.title_justify = table.caption_justify = "left"
    table.min_width = min(max(len(content.title), len(content.note)), 100)  # else they wrap to the width of the cells
    table.leading = int(any("\n" in cell for row in content.rows for cell in row))
    for k, head in enumerate(content.heads):
        numbers = k > 0 and all(NUMBER.fullmatch(row[k]) for row in content.rows)
        justify = "right" if numbers else "left"
        table.add_column(Text(head), overflow="fold", justify=justify)  # a name of the user may look like markup
    for first, *rest in content.rows:
        inner = first.startswith(" ")
        cells = (Text(cell, style=COLORS.get(cell.tone, "") if isinstance(cell, Cell) else "") for cell in rest)
        table.add_row(Text(first, style="" if inner else "bold"), *cells, style="dim" if inner else "")
    return table


def print_tables(tables: Iterable[TextTable], console: Console | None = None) -> None:
    """Prints tables with a blank line between two."""
    console = console or wide_console()
    for i, table in enumerate(tables):
        if i:
            console.print()
        console.print(text_table(table))


def wide_console(quiet: bool = False) -> Console:
    """A console that does not wrap tables when the output is piped; ``quiet``: it prints nothing."""
    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(highlight=False, width=160, quiet=quiet)
