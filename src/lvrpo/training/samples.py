"""Samples of a training step for the reader: an image grid and the groups with their rewards, in ``samples/``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lvrpo.distributed import is_main
from lvrpo.images import png
from lvrpo.report.grids import Tile, image_grid
from lvrpo.training.data_parallel import gather_groups
from lvrpo.training.reward_metrics import mask_reasons
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import TASKS, Group, RewardTable

GROUPS_PER_TASK = 4


def write_samples(
    run: RunDirectory, step: int, groups: Sequence[Group], table: RewardTable, known: Mapping[int, Sequence[float]]
) -> None:
    """Writes samples/step_NNNNNN/: grid.png and groups.jsonl, a few groups per task; ``known``: ``group_successes``."""
    chosen = [
        p
        for task in TASKS
        for p in [i for i, group in enumerate(groups) if group.prompt.task == task][:GROUPS_PER_TASK]
    ]
    shown = gather_groups(groups, chosen)
    if not is_main():
        return
    successes: list[Sequence[float | None]] = [
        [None if math.isnan(one) else one for one in known.get(p, [math.nan] * len(group))]
        for p, group in zip(chosen, shown, strict=True)
    ]
    rows = []
    for group, success in zip(shown, successes, strict=True):
        if group.trajectories[0].image is None:
            continue
        images = [Tile(image, "source") for image in group.prompt.images]
        images += [
            Tile(t.image, t.text or "", good=None if ok is None else bool(ok))
            for t, ok in zip(group.trajectories, success, strict=True)
        ]
        rows.append((group.prompt.text, images))
    folder = f"samples/{run.samples_dir(step).name}"
    if rows:
        run.write_bytes(f"{folder}/grid.png", png(image_grid(rows)))
    lines = [json.dumps(_row(*each)) for each in zip(shown, [table] * len(shown), chosen, successes, strict=True)]
    run.write_text(f"{folder}/groups.jsonl", "".join(line + "\n" for line in lines))


def _row(group: Group, table: RewardTable, p: int, success: Sequence[float | None]) -> dict[str, Any]:
    members = []
    for g, trajectory in enumerate(group.trajectories):
        scores = {
            name: float(table.scores[p, g, k]) if bool(table.mask[p, g, k]) else None
            for k, name in enumerate(table.names)
        }
        member = {"text": trajectory.text, "seed": trajectory.seed, "success": success[g], "rewards": scores}
        members.append(member | {"masked": mask_reasons(table, p, g)})
    prompt = group.prompt
    return {
        "id": prompt.id,
        "task": prompt.task,
        "category": prompt.category,
        "prompt": group.prompt.text,
        "answer": prompt.answer,
        "judge": table.judge,
        "judged_by": dict(table.judged_by),
        "members": members,
    }
