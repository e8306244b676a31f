"""``lvrpo data`` shows the built-in world; ``lvrpo audit --data`` finds leakage between its splits or the user's."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image as PilImage
from rich.console import Console

from lvrpo.commands.inputs import read_config, require_png, write_file, write_json
from lvrpo.commands.options import Options, refuse_existing
from lvrpo.commands.progress import text_table, wide_console
from lvrpo.config import load_config, shipped_configs
from lvrpo.config_errors import nearest
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.data.leakage import ComparedPrompt, Index, Overlap, Shared, compared_pixels, compared_rows, duplicates, leaks
from lvrpo.data.rows import RowPrompts
from lvrpo.data.scenes import VOCABULARY, ScenePrompts, ScenesConfig, Split, web_corpus
from lvrpo.data.scenes.leakage import CAPTION_PREFIXES, compared_examples, compared_prompts
from lvrpo.data.tables import DatasetConfig
from lvrpo.errors import ContractError, InputError
from lvrpo.evaluation import PUBLISHED
from lvrpo.evaluation.suite import find_benchmarks
from lvrpo.images import load_image, png
from lvrpo.reading import unused_path
from lvrpo.registry import resolve
from lvrpo.report.formatting import share
from lvrpo.report.grids import PER_ROW, contact_sheet
from lvrpo.report.tables import Cell, TextTable
from lvrpo.training.config import ROW_SOURCES, DataConfig, TrainConfig
from lvrpo.training.leakage import opened_rows
from lvrpo.training.rollout import prompts_of_step
from lvrpo.types import Example, TaskKind


def preview(options: Options) -> None:
    file = options.out / "scenes.png" if options.out.is_dir() or not options.out.suffix else options.out
    require_png(file)
    refuse_existing([file], options.force)
    write_file(file, png(world_sheet(options.split, options.seed)), options.force)
    print(file)


def world_sheet(split: Split, seed: int) -> PilImage.Image:
    """One row per category of the built-in world."""
    source = ScenePrompts(ScenesConfig(), split, seed)
    rows: list[tuple[TaskKind, str, list[Example]]] = []
    for task in source.tasks:
        cycle = source.category_cycles[task]
        count = PER_ROW // 2 if task == "edit" else PER_ROW
        step = len(cycle) * (source.config.questions_per_picture if task == "understand" else 1)
        for category in dict.fromkeys(cycle):
            first = cycle.index(category)
            rows.append((task, category, [source.example(task, first + step * k) for k in range(count)]))
    return contact_sheet(f"The built-in world: {source.name}", rows, 3 * source.config.size)


def vocabulary(options: Options) -> None:
    print("\n".join(VOCABULARY))


def rows(options: Options) -> None:
    """Writes the prompts of a benchmark's file as rows, their questions as facts."""
    refuse_existing([options.out], options.force)
    prompts = resolve("benchmark", options.name, PUBLISHED).read(options.file)
    lines = []
    for prompt in prompts:
        facts = [
            {"question": f.question, "answer": f.answer, "kind": f.kind, "choices": list(f.choices)}
            for f in prompt.facts
        ]
        row = {"id": prompt.id, "task": prompt.task, "prompt": str(prompt.parts[0]), "category": prompt.category}
        lines.append(json.dumps({**row, "facts": facts}, ensure_ascii=False) + "\n")
    write_file(options.out, "".join(lines).encode(), options.force)
    print(f"{len(lines)} rows in {options.out}")


SPLITS = ("train", "validation", "test")
VALIDATION = 480
"""Prompts per task of the built-in validation split that are compared."""
OVERLAP = ("task", "prompts", "same prompt", "same content", "looks alike", "image", "text", "normalized")
OVERLAP += ("one 5-gram", "all 5-grams")
"""Columns of the table of two splits."""
LEAK_MESSAGES = {
    "prompt": "asks what {other} asks, word for word but for case, punctuation and articles, of the same images",
    "content": "asks what {other} asks in other words",
    "look": "asks what {other} asks of images that look alike",
}


def audit_data(options: Options) -> None:
    """Prints one table per pair of splits; raises InputError, or ContractError for the built-in world, on a leak."""
    if options.run is not None or options.judge is not None:
        raise InputError(f"--data and {options.run or '--judge'}: give one of the two")
    console = wide_console()
    world, sets = _load_splits(options, lambda text: console.print(text, style="dim", soft_wrap=True))
    wordings = [*(options.wording or []), *(CAPTION_PREFIXES if world else ())]
    found, leak = print_overlaps(sets, console, wordings, near_duplicates=not world)
    head = {"splits": list(sets), "rows": {name: len(prompts) for name, prompts in sets.items()}}
    write_json(options, {**head, "overlaps": {title: list(map(asdict, each)) for title, each in found.items()}})
    if leak is not None:
        raise (ContractError if world else InputError)(leak)
    console.print("\napart: no prompt of one split is asked in another", style="green", highlight=False)


def print_overlaps(
    splits: Mapping[str, Sequence[ComparedPrompt]],
    console: Console,
    wordings: Sequence[str] = (),
    near_duplicates: bool = True,
) -> tuple[dict[str, list[Overlap]], str | None]:
    """Prints leaks as counts, and overlaps of texts and images as shares, for each pair of splits.

    Returns the overlaps by title, and the first leak as an error.
    """
    found: dict[str, list[Overlap]] = {}
    first: Shared | None = None
    for i, (name, prompts) in enumerate(splits.items()):
        index = Index(prompts, wordings)
        for other, held_out in list(splits.items())[i + 1 :]:
            title, rows = f"{other} in {name}", []
            found[title] = index.overlaps(held_out)
            first = first or next(iter(leaks(found[title], near_duplicates)), None)
            for each in found[title]:
                leaking = (Cell(str(n), "down" if n else "") for n in (each.same, each.content))
                common = (each.image, each.verbatim, each.normalized, each.some_ngrams, each.all_ngrams)
                shares = (share(count / each.prompts) for count in common)
                rows.append((each.task, str(each.prompts), *leaking, str(each.look), *shares))
            console.print()
            console.print(text_table(TextTable(f"{title} ({index.size} prompts)", OVERLAP, tuple(rows))))
    if first is None:
        return found, None
    return found, f"{first.where} {LEAK_MESSAGES[first.leak].format(other=first.other)}: take it out of one of them"


def _load_splits(options: Options, log: Callable[[str], None]) -> tuple[bool, Mapping[str, Sequence[ComparedPrompt]]]:
    """(whether the splits are of the built-in world, prompts by split)."""
    files = [Path(name) for name in options.data if name.endswith(".jsonl") and "=" not in name]
    if files:
        if len(files) != len(options.data) or not 2 <= len(files) <= 3:
            raise InputError(f"--data {' '.join(options.data)}: give two or three .jsonl files, or a CONFIG")
        if options.steps is not None:
            raise InputError(f"--steps {options.steps}: every row of a file counts: leave it out")
        return False, _file_splits(dict(zip(SPLITS if len(files) == 3 else (SPLITS[0], SPLITS[2]), files, strict=True)))
    config = _read_train_config(options.data)
    if config.data.source == "scenes":
        return True, _scene_splits(config, options.steps or config.steps, log)
    if config.data.source != "jsonl":
        remedy = "use lvrpo data check" if config.data.source == "datasets" else "give files of rows"
        raise InputError(f"data.source={config.data.source}: only scenes and jsonl are compared here: {remedy}")
    jsonl = config.data.jsonl
    named = {"train": jsonl.train, "validation": jsonl.validation, "test": jsonl.test}
    paths = {split: path for split, path in named.items() if path is not None}
    if len(paths) < 2:
        raise InputError(f"data.jsonl has {', '.join(paths)} alone: add data.jsonl.test, or name the files")
    return False, _file_splits(paths, jsonl.root)


def _read_train_config(given: Sequence[str]) -> TrainConfig:
    """CONFIG section.key=value ..., the quickstart by default."""
    names = [word for word in given if "=" not in word]
    if len(names) > 1:
        raise InputError(f"--data {' '.join(given)}: give one CONFIG, or two or three .jsonl files")
    return read_config(TrainConfig, names[0] if names else "quickstart", [word for word in given if "=" in word])


def _file_splits(paths: Mapping[str, Path], root: Path | None = None) -> dict[str, list[ComparedPrompt]]:
    """Every row with decoded images; ``root``: another folder of the images."""
    configs = {split: JsonlConfig(test=path, root=root) for split, path in paths.items()}
    return {split: _compared(JsonlPrompts(config, "test")) for split, config in configs.items()}


def _compared(rows: RowPrompts) -> list[ComparedPrompt]:
    """Rows for the comparison of splits, images by their pixels."""
    return list(compared_rows(rows.rows(), lambda image: compared_pixels(load_image(image))))


def _scene_splits(config: TrainConfig, steps: int, log: Callable[[str], None]) -> dict[str, list[ComparedPrompt]]:
    """Train: the prompts of ``steps`` steps and the pretraining corpus; validation; test: all benchmarks."""
    source = ScenePrompts(config.data.scenes, "train", config.seed)
    train = [found for step in range(steps) for found in compared_prompts(prompts_of_step(source, config, step))]
    log(f"train: {len(train)} prompts of {steps} steps")
    corpus = web_corpus()
    rows = [
        found
        for part in (corpus.generate, corpus.caption, corpus.question, corpus.edit, corpus.reason)
        for found in compared_examples(part)
    ]
    log(f"train: {len(corpus)} rows of the corpus of the base")
    held_out = ScenePrompts(config.data.scenes, "validation", 0)
    validation = compared_prompts([prompt for task in held_out.tasks for prompt in held_out.prompts(task, VALIDATION)])
    benchmarks = find_benchmarks(["scenes"])
    prompts = [prompt for benchmark in benchmarks for prompt in benchmark.prompts(benchmark.n)]
    test = {(prompt.id, prompt.parts[-1]): prompt for prompt in prompts}  # a paraphrase has the id of its original
    log(f"validation: {len(validation)} prompts; test: {len(test)} of {', '.join(b.name for b in benchmarks)}")
    return {"train": [*train, *rows], "validation": validation, "test": compared_prompts(list(test.values()))}


# --- lvrpo data check ---

SHOWN_ROWS = 10
"""Rows on the contact sheet."""
SHOWN_PROBLEMS = 20
SIDE = 128
"""Side of an image on the contact sheet, in pixels."""


def check(options: Options) -> None:
    """Prints the tables and writes the contact sheet; raises InputError for rows that cannot be used, and for leaks."""
    out: Path = options.out or unused_path(Path("rows"), ".png")
    file = out if out.suffix else out.with_suffix(".png")
    require_png(file)
    refuse_existing([file], options.force)
    problems: list[str] = []
    splits = opened_rows(_read_data(options.source, options.overrides), problems=problems)
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
    compared = {split: _compared(rows) for split, rows in splits.items()}
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
    folder, name = os.path.split(source)
    if os.path.lexists(source) or glob.has_magic(source):
        return
    if source.count("/") == 1 and folder.strip(".") and not os.path.isdir(folder):
        return  # OWNER/NAME
    near = nearest(name, os.listdir(folder or ".")) if os.path.isdir(folder or ".") else None
    remedy = f"did you mean {os.path.join(folder, near)}?" if near else "check the path; an id on the Hub is OWNER/NAME"
    raise InputError(f"{source}: no such file or folder: {remedy}")


def _counts_table(splits: Mapping[Split, RowPrompts]) -> TextTable:
    """Rows by split and task, and how many have what rewards and success need."""
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
