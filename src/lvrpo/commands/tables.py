"""Results as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lvrpo.report.tables import TextTable, measure_tables, summary_phases

LEVEL = 0.05

Result = Mapping[str, Any]
"""Any: score, low, high, n and categories, as ``summary.json`` holds them."""


def number(value: float, signed: bool = False) -> str:
    """.42, or +.42 for a difference; 0 to 1 needs no leading zero."""
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return text.replace("0.", ".", 1)


def finite(value: float | None) -> float | None:
    """The number, or None for null and nan."""
    return value if value is not None and math.isfinite(value) else None


def interval(result: Result | None, signed: bool = False) -> str:
    """.42 [.38, .46]; of a difference also the minimal detectable effect, ≥ .05."""
    if not result or finite(result["score"]) is None:
        return ""
    low, high, detectable = (finite(result.get(name)) for name in ("low", "high", "detectable"))
    spread = ", no interval"
    if low is not None and high is not None:
        spread = f" [{number(low, signed)}, {number(high, signed)}]"
    return number(result["score"], signed) + spread + ("" if detectable is None else f" ≥ {number(detectable)}")


def tone(difference: Result | None) -> str:
    """Green where the interval lies above 0, red below; of a category only with a corrected (Holm) p < .05."""
    if not difference or difference["low"] is None:
        return ""
    adjusted = finite(difference.get("p_holm"))
    if adjusted is not None and adjusted >= LEVEL:
        return "dim"
    return "green" if difference["low"] > 0 else "red" if difference["high"] < 0 else "dim"


def scores_table(results: Mapping[str, Result], title: str) -> Table:
    """One evaluation."""
    table = Table(title=title, title_justify="left", box=None, header_style="dim", padding=(0, 1))
    masked = any("masked" in result for result in results.values())
    heads = [("benchmark", "left"), ("score, 95 % interval", "left"), ("scored" if masked else "prompts", "right")]
    for name, justify in [*heads, *([("masked", "right")] if masked else [])]:
        table.add_column(name, justify=justify)  # type: ignore[arg-type]  # left and right are what rich takes
    for name, result in results.items():
        lost = [str(result.get("masked", {}).get("prompts", 0))] if masked else []
        table.add_row(Text(name, style="bold"), interval(result), str(result["n"]), *lost)
        for category, inner in result["categories"].items():
            table.add_row(f"  {category.replace('_', ' ')}", interval(inner), str(inner["n"]), style="dim")
    return table


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Before, after, difference per task and category, and the baseline where there is one."""
    baseline = summary.get("baseline")
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    heads = ["task", "before", "after", "difference [95 %]"]
    heads += ["baseline", "ours minus it"] if baseline else []
    for name in heads:
        table.add_column(name)
    for task, before in summary["before"].items():
        parts = [before, summary["after"][task], summary["difference"][task]]
        if baseline:
            parts += [baseline["after"][task], summary["ours_minus_baseline"][task]]
        _add(table, task, parts, bold=True)
        for category in before["categories"]:
            _add(table, f"  {category}", [part["categories"][category] for part in parts])
    return table


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """``summary_table`` and the tables of ``measure_tables``."""
    phases = summary_phases(summary)
    return [summary_table(summary), *(text_table(each) for each in measure_tables(phases, summary["difference"]))]


def _add(table: Table, name: str, parts: list[Result], bold: bool = False) -> None:
    before, after, difference, *other = parts
    style = "bold" if bold else ""
    cells = [
        Text(name.replace("_", " "), style=style),
        Text(number(before["score"]), style=style),
        Text(number(after["score"]), style=style),
        Text(interval(difference, signed=True), style=f"{style} {tone(difference)}".strip()),
    ]
    if other:
        cells.append(Text(number(other[0]["score"]), style=style))
        cells.append(Text(interval(other[1], signed=True), style=f"{style} {tone(other[1])}".strip()))
    table.add_row(*cells)


def text_table(content: TextTable) -> Table:
    """A table of the report for the terminal."""
    table = Table(title=content.title, caption=content.note or None, box=None, header_style="dim", padding=(0, 1))
    table.title_justify = table.caption_justify = "left"
    table.min_width = min(max(len(content.title), len(content.note)), 100)  # else they wrap to the width of the cells
    for head in content.heads:
        table.add_column(head, overflow="fold")
    for first, *rest in content.rows:
        inner = first.startswith(" ")
        table.add_row(Text(first, style="" if inner else "bold"), *map(Text, rest), style="dim" if inner else "")
    return table


def print_tables(tables: Sequence[Table]) -> None:
    """Prints tables with a blank line between two."""
    console = wide_console()
    for i, table in enumerate(tables):
        if i:
            console.print()
        console.print(table)


def wide_console(quiet: bool = False) -> Console:
    """A console that does not wrap tables when the output is piped; ``quiet``: it prints nothing."""
    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(highlight=False, width=160, quiet=quiet)
