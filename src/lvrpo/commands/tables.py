"""Tables of the report on the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lvrpo.report.tables import Cell, TextTable, measure_tables, summary_phases, summary_table

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
    for head in content.heads:
        table.add_column(Text(head), overflow="fold")  # a name of the user may look like markup
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
