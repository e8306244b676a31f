"""``lvrpo benchmarks``, and the options of ``lvrpo evaluate`` that published benchmarks need."""

from __future__ import annotations

import argparse
from pathlib import Path

from lvrpo.commands.options import Command, Options, Parser, guidance, names, share
from lvrpo.evaluation import BENCHMARKS, PUBLISHED


def published_options(parser: Parser) -> None:
    """Adds the options that published benchmarks need."""
    parser.add_argument("--data", type=Path, metavar="DIR", help="with a folder for each published benchmark")
    parser.add_argument("--detector", metavar="FOLDER", help="of transformers, for geneval")
    parser.add_argument("--color-classifier", metavar="FOLDER", help="a CLIP or SigLIP, for geneval")
    parser.add_argument(
        "--thresholds",
        type=two_shares,
        metavar="OBJECT,COUNTING",
        help="scores of the detector that count (default: .3,.9, GenEval's own, for Mask2Former)",
    )
    parser.add_argument(
        "--vlm",
        type=Path,
        metavar="FOLDER|FILE.yaml",
        help="who judges the drawings of geneval2, dpg, wise, t2i_compbench: a model of transformers, or an endpoint",
    )
    parser.add_argument(
        "--guidance", type=guidances, metavar="X[,Y]", help="of published drawings, each scale (default: MODEL's own)"
    )


def guidances(text: str) -> list[float]:
    """Guidance scales, each once."""
    found = [guidance(name) for name in names(text)]
    if len({*found}) < len(found):
        raise argparse.ArgumentTypeError(f"{text}: a scale stands twice")
    return found


def two_shares(text: str) -> tuple[float, float]:
    """Two numbers from 0 to 1."""
    found = [share(name) for name in names(text)]
    if len(found) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: write OBJECT,COUNTING, such as .3,.9")
    return found[0], found[1]


def list_benchmarks(options: Options) -> None:
    """Prints every published benchmark with what it needs."""
    from rich.table import Table

    from lvrpo.commands.tables import wide_console
    from lvrpo.registry import resolve

    table = Table(box=None, header_style="dim", padding=(0, 1))
    for head in ("benchmark", "size", "files (--data DIR)", "who judges", "license", "source"):
        table.add_column(head, overflow="fold")
    for name in PUBLISHED:
        found = resolve("benchmark", name, PUBLISHED)
        files = ", ".join(f"{found.folder or found.name}/{file}" for file in found.files)
        table.add_row(name, found.size, files, found.needs, found.license, found.source)
    console = wide_console()
    console.print(table)
    console.print(f"built in: scenes ({', '.join(BENCHMARKS)}); rows of your own: FILE.jsonl", soft_wrap=True)


BENCHMARK_LIST = Command(
    "list the published benchmarks and what each needs",
    lambda parser: None,
    list_benchmarks,
    "example: lvrpo benchmarks; lvrpo evaluate MODEL --data DIR --benchmark geneval_vqa",
)
