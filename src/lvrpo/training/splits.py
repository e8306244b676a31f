"""Leakage check between the splits of a run, before it starts; its result is written to the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvrpo.config import read_yaml
from lvrpo.data.base import DATASETS, ComparableSource
from lvrpo.data.jsonl import JsonlConfig, JsonlPrompts
from lvrpo.data.leakage import ComparedPrompt, Index, compared_rows, file_picture, leaks, prompts_fingerprint
from lvrpo.errors import ContractError, InputError
from lvrpo.training.config import TrainConfig
from lvrpo.training.rollout import prompts_of_step
from lvrpo.training.run_directory import CONFIG, RunDirectory
from lvrpo.training.sources import Split, open_source
from lvrpo.types import Prompt

SAMPLED_STEPS = 2
"""Training steps of the built-in world that are checked when a run starts; ``lvrpo audit --data`` checks all."""
SAMPLED_PROMPTS = 60
"""Held-out prompts per task that they are compared with."""


def rows(path: Path, config: JsonlConfig) -> list[ComparedPrompt]:
    """The rows of a file for the check; images are compared by the bytes of their files."""
    source = JsonlPrompts(config.model_copy(update={"test": path, "check": "headers"}), "test")
    return list(compared_rows(source.rows(), file_picture))


def require_no_overlap(index: Index, name: str, others: Iterable[ComparedPrompt], remedy: str) -> None:
    """Raises InputError, with both rows, if a row of ``others`` is also in the file ``name``, with equal images."""
    for row in others:
        where = index.same(row)
        if where is not None:
            raise InputError(f"{row.where}: the same text and pictures as {where} of {name}: {remedy}")


def require_disjoint_splits(config: TrainConfig) -> dict[str, Any]:
    """Checks that the splits of a run are disjoint; returns the record for the manifest. Any: JSON.

    Raises InputError if two of the files train, validation and test share a row.
    """
    if config.data.source == "jsonl":
        return _compare_files(config.data.jsonl)
    source = open_source(config, "train", config.seed) if config.data.source in DATASETS else None
    return _compare_source(config, source) if isinstance(source, ComparableSource) else {"compared": False}


def _compare_files(config: JsonlConfig) -> dict[str, Any]:
    named = {"train": config.train, "validation": config.validation, "test": config.test}
    paths = {split: path for split, path in named.items() if path is not None}
    if len(paths) < 2:
        return {"compared": False}
    found = {split: rows(path, config) for split, path in paths.items()}
    splits = list(found)
    for i, split in enumerate(splits[:-1]):
        index = Index(found[split])
        for other in splits[i + 1 :]:
            remedy = f"take it out of one of them (lvrpo audit --data {' '.join(map(str, paths.values()))} shows all)"
            require_no_overlap(index, f"data.jsonl.{split}", found[other], remedy)
    counts = {split: len(prompts) for split, prompts in found.items()}
    return {"compared": True, "rows": counts, "shared": 0, **_hashes(found)}


def _compare_source(config: TrainConfig, source: ComparableSource) -> dict[str, Any]:
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
    if config.data.source != "jsonl" or not files:
        return
    for split, use in (("train", "trains on"), ("validation", "chooses its weights by")):
        path: Path | None = getattr(config.data.jsonl, split)  # the splits are fields of JsonlConfig
        if path is None or not path.is_file():
            continue
        index = Index(rows(path, config.data.jsonl))
        for file in files:
            remedy = f"{run} {use} it: name a file of rows that it has not seen"
            require_no_overlap(index, f"data.jsonl.{split}", rows(file, config.data.jsonl), remedy)


def require_unseen_by(model: str, benchmarks: Sequence[str]) -> None:
    """``require_unseen`` if a model is an alignment run whose data files still exist."""
    folder = Path(model)
    if not (folder / CONFIG).is_file() or "jsonl" not in str(read_yaml(folder / CONFIG).get("data", "")):
        return
    require_unseen(benchmarks, RunDirectory.read(folder).config(TrainConfig), model)
