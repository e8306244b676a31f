"""``lvrpo data`` shows the built-in world; ``lvrpo audit --data`` finds leakage between its splits or the user's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lvrpo.commands.options import Command, Options, Parser, add_force, add_seed, positive, refuse_existing
from lvrpo.errors import ContractError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from PIL import Image as PilImage
    from rich.console import Console

    from lvrpo.data.leakage import ComparedPrompt, Overlap, Shared
    from lvrpo.data.scenes.objects import Split
    from lvrpo.training.config import TrainConfig
    from lvrpo.types import Example, TaskKind


def _preview_options(parser: Parser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("scenes.png"), metavar="FILE", help="where to write it (default: scenes.png)"
    )
    parser.add_argument(
        "--split", choices=("train", "validation", "test"), default="test", help="split to show (default: test)"
    )
    add_seed(parser)
    add_force(parser)


def preview(options: Options) -> None:
    from lvrpo.commands.inputs import require_png, write_file
    from lvrpo.pictures import png

    file = options.out / "scenes.png" if options.out.is_dir() or not options.out.suffix else options.out
    require_png(file)
    refuse_existing([file], options.force)
    write_file(file, png(world_sheet(options.split, options.seed)), options.force)
    print(file)


def world_sheet(split: Split, seed: int) -> PilImage.Image:
    """One row per category of the built-in world."""
    from lvrpo.commands.contact_sheet import PER_ROW, contact_sheet
    from lvrpo.data.scenes.prompts import ScenePrompts, ScenesConfig

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
    from lvrpo.data.scenes import VOCABULARY

    print("\n".join(VOCABULARY))


def _rows_options(parser: Parser) -> None:
    parser.add_argument("name", metavar="BENCHMARK", help="the benchmark whose format FILE has; see lvrpo benchmarks")
    parser.add_argument("file", type=Path, metavar="FILE", help="prompts in that format")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl", help="where to write the rows")
    add_force(parser)


def rows(options: Options) -> None:
    """Writes the prompts of a benchmark's file as rows, their questions as facts."""
    import json

    from lvrpo.commands.inputs import write_file
    from lvrpo.evaluation import PUBLISHED
    from lvrpo.registry import resolve

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


BENCHMARK_ROWS = Command(
    "convert prompts of a published benchmark to training or validation rows",
    _rows_options,
    rows,
    "examples:\n"
    "  lvrpo data benchmark geneval evaluation_metadata.jsonl --out rows.jsonl\n\n"
    "The questions of the benchmark become the field facts, which the reward self_vqa asks.",
)
PREVIEW = Command(
    "draw examples of every category of the built-in world into one image",
    _preview_options,
    preview,
    "examples:\n  lvrpo data preview --split train --out world.png",
)
VOCABULARY = Command(
    "list the words of the built-in world",
    lambda parser: None,
    vocabulary,
    "examples:\n  lvrpo data vocabulary > words.txt",
)


SPLITS = ("train", "validation", "test")
VALIDATION = 480
"""Prompts per task of the built-in validation split that are compared."""
OVERLAP = ("task", "prompts", "same prompt", "same content", "looks alike", "picture", "text", "normalized")
OVERLAP += ("one 5-gram", "all 5-grams")
"""Columns of the table of two splits."""
LEAK_MESSAGES = {
    "prompt": "asks what {other} asks, word for word but for case, punctuation and articles, of the same pictures",
    "content": "asks what {other} asks in other words",
    "look": "asks what {other} asks of pictures that look alike",
}


def leakage_options(parser: Parser) -> None:
    """The options of the audit of data; None where not given."""
    group = parser.group("compare the splits of the data, instead of a run")
    group.add_argument(
        "--data",
        nargs="*",
        metavar="CONFIG|FILE",
        help="the splits of a configuration (default: quickstart), or train.jsonl [validation.jsonl] test.jsonl",
    )
    group.add_argument(
        "--steps", type=positive, metavar="N", help="training steps to compare (default: all of the run)"
    )
    group.add_argument(
        "--wording", action="append", metavar="TEXT", help="ignore this beginning of a prompt, such as 'draw'"
    )


def audit_data(options: Options) -> None:
    """Prints one table per pair of splits; raises InputError, or ContractError for the built-in world, on a leak."""
    from dataclasses import asdict

    from lvrpo.commands.inputs import write_json
    from lvrpo.commands.tables import wide_console
    from lvrpo.data.scenes.leakage import CAPTION_PREFIXES

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
    """Prints leaks as counts, and overlaps of texts and pictures as shares, for each pair of splits.

    Returns the overlaps by title, and the first leak as an error.
    """
    from lvrpo.commands.tables import text_table
    from lvrpo.data.leakage import Index, leaks
    from lvrpo.report.formatting import share
    from lvrpo.report.tables import Cell, TextTable

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
                common = (each.picture, each.verbatim, each.normalized, each.some_ngrams, each.all_ngrams)
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
    from lvrpo.commands.inputs import read_config
    from lvrpo.training.config import TrainConfig

    names = [word for word in given if "=" not in word]
    if len(names) > 1:
        raise InputError(f"--data {' '.join(given)}: give one CONFIG, or two or three .jsonl files")
    return read_config(TrainConfig, names[0] if names else "quickstart", [word for word in given if "=" in word])


def _file_splits(paths: Mapping[str, Path], root: Path | None = None) -> dict[str, list[ComparedPrompt]]:
    """Every row with decoded pictures; ``root``: another folder of the pictures."""
    from lvrpo.data.images import load_image
    from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
    from lvrpo.data.leakage import compared_rows, pixel_picture

    def read(path: Path) -> list[ComparedPrompt]:
        source = JsonlPrompts(JsonlConfig(test=path, root=root), "test")
        return list(compared_rows(source.rows(), lambda picture: pixel_picture(load_image(picture))))

    return {split: read(path) for split, path in paths.items()}


def _scene_splits(config: TrainConfig, steps: int, log: Callable[[str], None]) -> dict[str, list[ComparedPrompt]]:
    """Train: the prompts of ``steps`` steps and the pretraining corpus; validation; test: all benchmarks."""
    from lvrpo.data.scenes import ScenePrompts, web_corpus
    from lvrpo.data.scenes.leakage import compared_examples, compared_prompts
    from lvrpo.evaluation.suite import find_benchmarks
    from lvrpo.training.rollout import prompts_of_step

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
