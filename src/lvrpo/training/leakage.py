"""Leakage check between the splits of a run, before it starts; its result is written to the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvrpo.config import read_yaml
from lvrpo.data.base import DATASETS, ComparableTask
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.data.leakage import ComparedPrompt, Index, compared_file, compared_rows, leaks, prompts_fingerprint
from lvrpo.data.rows import RowPrompts
from lvrpo.data.tables import DatasetPrompts
from lvrpo.errors import ContractError, InputError
from lvrpo.training.components import open_source
from lvrpo.training.config import ROW_SOURCES, DataConfig, TrainConfig
from lvrpo.training.rollout import prompts_of_step
from lvrpo.training.run_directory import CONFIG, RunDirectory
from lvrpo.types import Prompt, Split

SAMPLED_STEPS = 2
"""Training steps of the built-in world that are checked when a run starts; ``lvrpo audit --data`` checks all."""
SAMPLED_PROMPTS = 60
"""Held-out prompts per task that they are compared with."""


def rows(path: Path, config: JsonlConfig) -> list[ComparedPrompt]:
    """The rows of a file for the check."""
    return compared(JsonlPrompts(config.model_copy(update={"test": path, "check": "headers"}), "test"))


def compared(source: RowPrompts) -> list[ComparedPrompt]:
    """Rows of the user for the check; images are compared by the bytes of their files."""
    return list(compared_rows(source.rows(), compared_file))


def require_no_overlap(index: Index, name: str, others: Iterable[ComparedPrompt], remedy: str) -> None:
    """Raises InputError, with both rows, if a row of ``others`` is also in the file ``name``, with equal images."""
    for row in others:
        where = index.same(row)
        if where is not None:
            raise InputError(f"{row.where}: the same text and images as {where} of {name}: {remedy}")


def require_disjoint_splits(config: TrainConfig, opened: Mapping[Split, RowPrompts] | None = None) -> dict[str, Any]:
    """Checks that the splits of a run are disjoint; returns the record for the manifest. Any: JSON.

    ``opened``: the rows of the user by split, if they are open already. Raises InputError if two of the splits train,
    validation and test share a row.
    """
    if config.data.source in ROW_SOURCES:
        return _compare_rows(config, opened_rows(config.data) if opened is None else opened)
    source = open_source(config, "train", config.seed) if config.data.source in DATASETS else None
    return _compare_source(config, source) if isinstance(source, ComparableTask) else {"compared": False}


def opened_rows(
    data: DataConfig, splits: Sequence[Split] = ("train", "validation", "test"), problems: list[str] | None = None
) -> dict[Split, RowPrompts]:
    """The rows of the user by split, those that are named.

    ``problems``: errors of rows are added here instead of raised, and every image is decoded.
    """
    pixels = {} if problems is None else {"check": "pixels"}
    jsonl, sets = data.jsonl.model_copy(update=pixels), [each.model_copy(update=pixels) for each in data.datasets]
    found: dict[Split, RowPrompts] = {}
    for split in filter(data.has_split, splits):
        if data.source == "jsonl":
            found[split] = JsonlPrompts(jsonl, split, problems=problems)
        else:
            found[split] = DatasetPrompts(sets, split, problems=problems)
    return found


def _compare_rows(config: TrainConfig, opened: Mapping[Split, RowPrompts]) -> dict[str, Any]:
    if len(opened) < 2:
        return {"compared": False}
    found = {split: compared(rows) for split, rows in opened.items()}
    named = [rows.name for rows in opened.values()]
    shows = f" (lvrpo audit --data {' '.join(named)} shows all)" if config.data.source == "jsonl" else ""
    splits = list(found)
    for i, split in enumerate(splits[:-1]):
        index = Index(found[split])
        for other in splits[i + 1 :]:
            name = f"data.{config.data.source}.{split}"
            require_no_overlap(index, name, found[other], f"take it out of one of them{shows}")
    counts = {split: len(prompts) for split, prompts in found.items()}
    return {"compared": True, "rows": counts, "shared": 0, **_hashes(found)}


def _compare_source(config: TrainConfig, source: ComparableTask) -> dict[str, Any]:
    steps = range(min(SAMPLED_STEPS, config.steps))
    trained = [prompt for step in steps for prompt in prompts_of_step(source, config, step)]
    held: tuple[Split, ...] = ("validation", "test")
    held_out = {split: source.compared(_held_out_prompts(config, split)) for split in held}
    index = Index(source.compared(trained), source.prefixes)
    for split, prompts in held_out.items():
        for shared in leaks(index.overlaps(prompts), near_duplicates=False):
            raise ContractError(f"{shared.where} of {split} asks what {shared.other} asks: splits are not apart")
    counts = {"train": len(trained), **{split: len(prompts) for split, prompts in held_out.items()}}
    return {"compared": True, "prompts": counts, "shared": 0, **_hashes(held_out)}


def _held_out_prompts(config: TrainConfig, split: Split) -> list[Prompt]:
    source = open_source(config, split, 0)
    prompts: list[Prompt] = []
    for task, count in config.data.prompts_per_step.items():
        prompts += source.prompts(task, SAMPLED_PROMPTS) if count and task in source.tasks else []
    return prompts


def _hashes(splits: Mapping[str, list[ComparedPrompt]]) -> dict[str, str]:
    return {f"{split}_sha256": prompts_fingerprint(prompts) for split, prompts in splits.items()}


def require_unseen(benchmarks: Sequence[str], config: TrainConfig, run: str = "the run") -> None:
    """Raises InputError if a benchmark file holds training or validation rows of a run."""
    files = [Path(name) for name in benchmarks if name.endswith(".jsonl")]
    if config.data.source not in ROW_SOURCES or not files:
        return
    uses: tuple[tuple[Split, str], ...] = (("train", "trains on"), ("validation", "chooses its weights by"))
    for split, use in uses:
        if config.data.source == "jsonl":
            path: Path | None = getattr(config.data.jsonl, split)  # the splits are fields of JsonlConfig
            seen = [] if path is None or not path.is_file() else rows(path, config.data.jsonl)
        else:
            seen = [row for source in opened_rows(config.data, (split,)).values() for row in compared(source)]
        index = Index(seen)
        for file in files:
            remedy = f"{run} {use} it: name a file of rows that it has not seen"
            require_no_overlap(index, f"data.{config.data.source}.{split}", rows(file, config.data.jsonl), remedy)


def require_unseen_by(model: str, benchmarks: Sequence[str]) -> None:
    """``require_unseen`` if a model is an alignment run on rows of the user; files that are gone are passed over."""
    folder = Path(model)
    data = str(read_yaml(folder / CONFIG).get("data", "")) if (folder / CONFIG).is_file() else ""
    if not any(source in data for source in ROW_SOURCES):
        return
    require_unseen(benchmarks, RunDirectory.read(folder).config(TrainConfig), model)
