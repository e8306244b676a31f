"""Cells and plain tables of the audits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

FEW = 10
"""A correlation over fewer groups is not shown."""
TRAITS = {
    "tokens": "tokens written",
    "cut_off": "texts cut off",
    "text_diversity": "texts of a group that differ",
    "picture_diversity": "difference of a group's pictures",
}
"""Names where the plain one is not clear."""


def plain_table(title: str, names: list[str], left: int) -> Table:
    """A table without a frame; all but the first ``left`` columns to the right."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="dim", padding=(0, 1, 0, 0), pad_edge=False)
    for i, name in enumerate(names):
        table.add_column(name, justify="left" if i < left else "right")
    return table


def share(value: float | None) -> str:
    """.52; a dash for none."""
    from lvrpo.report.numbers import score

    return "–" if value is None or value != value else score(value, 2)


def signed_share(value: float) -> str:
    """+.52"""
    from lvrpo.report.numbers import score

    return score(value, 2, signed=True)


def trait_name(name: str) -> str:
    """A scorer or trait in words, for a cell."""
    from rich.markup import escape

    return escape(TRAITS.get(name, name))
