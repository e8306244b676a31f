"""``lvrpo data check``: what the rows of a user are, which cannot be used, and which are there twice."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lvrpo.commands.data import print_overlaps
from lvrpo.commands.options import Command, Options, Parser, add_force, refuse_existing
from lvrpo.errors import InputError
from lvrpo.reading import unused_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lvrpo.data.rows import RowPrompts
    from lvrpo.report.tables import TextTable
    from lvrpo.training.config import DataConfig
    from lvrpo.types import Example, TaskKind

SHOWN_ROWS = 10
"""Rows on the contact sheet."""
SHOWN_PROBLEMS = 20
SIDE = 128
"""Side of a picture on the contact sheet, in pixels."""


def check_options(parser: Parser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a configuration, a file or glob of rows, a folder of images, or a Hub id OWNER/NAME",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="section.key=value if SOURCE is a configuration, else keys of data.datasets such as preset=llava",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="the contact sheet (default: rows.png, with a number if it exists)"
    )
    add_force(parser)


def check(options: Options) -> None:
    """Prints the tables and writes the contact sheet; raises InputError for rows that cannot be used, and for leaks."""
    from lvrpo.commands.contact_sheet import contact_sheet
    from lvrpo.commands.inputs import require_png, write_file
    from lvrpo.commands.tables import text_table, wide_console
    from lvrpo.data.images import load_image
    from lvrpo.data.leakage import compared_rows, duplicates, pixel_picture
    from lvrpo.pictures import png

    out: Path = options.out or unused_path(Path("rows"), ".png")
    file = out if out.suffix else out.with_suffix(".png")
    require_png(file)
    refuse_existing([file], options.force)
    problems: list[str] = []
    splits = opened(_read_data(options.source, options.overrides), problems)
    console = wide_console()
    console.print(text_table(_counts_table(splits)))
    for problem in problems[:SHOWN_PROBLEMS]:
        console.print(f"  {problem}", style="red", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > SHOWN_PROBLEMS:
        console.print(f"  and {len(problems) - SHOWN_PROBLEMS} more", style="red")
    rows = next((rows for rows in splits.values() if len(rows)), None)
    if rows is not None:
        sheet = contact_sheet(f"{rows.name}: {len(rows)} rows", _shown(rows), SIDE)
        write_file(file, png(sheet), options.force)
        console.print(f"\n{SHOWN_ROWS if len(rows) > SHOWN_ROWS else len(rows)} rows: {file}", highlight=False)
    compared = {
        split: list(compared_rows(rows.rows(), lambda picture: pixel_picture(load_image(picture))))
        for split, rows in splits.items()
    }
    for split, prompts in compared.items():
        twice = duplicates(prompts)
        if twice:
            shown = f"{len(twice)} rows are there twice; the first: {twice[0].where} asks what {twice[0].other} asks"
            console.print(f"{split}: {shown}", style="yellow", markup=False)
    _, leak = print_overlaps(compared, console)
    if problems:
        raise InputError(f"{len(problems)} row{'s' * (len(problems) > 1)} cannot be used; the first: {problems[0]}")
    if leak is not None:
        raise InputError(leak)


def _read_data(source: str, overrides: list[str]) -> DataConfig:
    """The data section of CONFIG, or that of a file, a folder or a Hub id with keys of a data set."""
    from lvrpo.commands.inputs import read_config
    from lvrpo.config import load_config, shipped_configs
    from lvrpo.data.jsonl import JsonlConfig
    from lvrpo.data.tables import DatasetConfig
    from lvrpo.training.config import ROW_SOURCES, DataConfig, TrainConfig

    if source.endswith((".yaml", ".yml")) or (source in shipped_configs() and not os.path.lexists(source)):
        data = read_config(TrainConfig, source, overrides).data
        if data.source not in ROW_SOURCES:
            remedy = "lvrpo data preview shows it" if data.source == "scenes" else "give a source of rows"
            raise InputError(f"data.source={data.source}: only rows of jsonl and datasets are checked: {remedy}")
        return data
    _require_source(source)
    if source.endswith(".jsonl") and not overrides and not glob.has_magic(source):
        return DataConfig(source="jsonl", jsonl=JsonlConfig(train=Path(source), check="pixels"))
    if os.path.isfile(source) or glob.has_magic(source):
        named = [f"train={source}"]
    else:
        split = any(each.startswith(("train=", "validation=", "test=")) for each in overrides)
        named = [f"path={source}", *([] if split else ["train=train"])]
    return DataConfig(source="datasets", datasets=(load_config(DatasetConfig, None, [*named, *overrides]),))


def _require_source(source: str) -> None:
    """Raises InputError, without asking the Hub, for a name that can only be a file or folder that does not exist."""
    from lvrpo.config_errors import nearest

    folder, name = os.path.split(source)
    if os.path.lexists(source) or glob.has_magic(source):
        return
    if source.count("/") == 1 and folder.strip(".") and not os.path.isdir(folder):
        return  # OWNER/NAME
    near = nearest(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else None
    remedy = f"did you mean {os.path.join(folder, near)}?" if near else "check the path; an id on the Hub is OWNER/NAME"
    raise InputError(f"{source}: no such file or folder: {remedy}")


def opened(data: DataConfig, problems: list[str]) -> dict[str, RowPrompts]:
    """The rows by split, every picture decoded; errors of rows are added to ``problems``."""
    from lvrpo.data.jsonl import JsonlPrompts
    from lvrpo.data.tables import DatasetPrompts

    found: dict[str, RowPrompts] = {}
    for split in ("train", "validation", "test"):
        if data.has_split(split):
            if data.source == "jsonl":
                pixels = data.jsonl.model_copy(update={"check": "pixels"})
                found[split] = JsonlPrompts(pixels, split, problems=problems)
            else:
                sets = [each.model_copy(update={"check": "pixels"}) for each in data.datasets]
                found[split] = DatasetPrompts(sets, split, problems=problems)
    return found


def _counts_table(splits: Mapping[str, RowPrompts]) -> TextTable:
    """Rows by split and task, and how many have what rewards and success need."""
    from lvrpo.report.tables import TextTable

    heads = ("split", "task", "rows", "with answer", "with facts", "with target", "categories")
    rows = []
    for split, found in splits.items():
        for task in found.tasks:
            has = found.has(task)
            rows.append((split, task, *(str(has[name]) for name in ("rows", "answer", "facts", "target", "category"))))
    return TextTable("rows", heads, tuple(rows))


def _shown(rows: RowPrompts) -> list[tuple[TaskKind, str, Sequence[Example]]]:
    """The first rows of every task by category, ``SHOWN_ROWS`` in all where there are as many."""
    shown = dict.fromkeys(rows.tasks, 0)
    while sum(shown.values()) < min(SHOWN_ROWS, len(rows)):
        for task in rows.tasks:
            if shown[task] < rows.size(task) and sum(shown.values()) < SHOWN_ROWS:
                shown[task] += 1
    found: dict[tuple[TaskKind, str], list[Example]] = {}
    for task, count in shown.items():
        for example in rows.examples(task, count):
            found.setdefault((task, example.prompt.category or example.prompt.source), []).append(example)
    return [(task, category, examples) for (task, category), examples in found.items()]


CHECK = Command(
    "check your own rows: a contact sheet, counts per task, errors, duplicates, overlap of splits",
    check_options,
    check,
    "examples:\n"
    "  lvrpo data check own.yaml\n"
    "  lvrpo data check pictures preset=labels\n"
    "  lvrpo data check 'shards/train-*.tar' preset=captions --out rows.png\n"
    "  lvrpo data check derek-thomas/ScienceQA preset=scienceqa 'train=train[:200]' streaming=true",
)
