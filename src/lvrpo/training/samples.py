"""What a person looks at while a run goes on: a grid of drawings and the sampled groups as rows."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lvrpo.distributed import is_main
from lvrpo.report.grids import Tile, picture_grid
from lvrpo.training.data_parallel import whole_groups
from lvrpo.training.reward_metrics import masked
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import TASKS, Group, RewardTable

GROUPS_PER_TASK = 4


def write(
    run: RunDirectory, step: int, groups: Sequence[Group], table: RewardTable, known: Mapping[int, Sequence[float]]
) -> None:
    """Writes samples/step_NNNNNN/: grid.png and groups.jsonl, a few groups per task.

    ``known``: by row, which members are right (``right_outputs``).
    """
    chosen = [
        p
        for task in TASKS
        for p in [i for i, group in enumerate(groups) if group.prompt.task == task][:GROUPS_PER_TASK]
    ]
    shown = whole_groups(groups, chosen)
    if not is_main():
        return
    right: list[Sequence[float | None]] = [
        known.get(p, [None] * len(group)) for p, group in zip(chosen, shown, strict=True)
    ]
    rows = []
    for group, success in zip(shown, right, strict=True):
        if group.trajectories[0].image is None:
            continue
        pictures = [Tile(part, "source") for part in group.prompt.parts if not isinstance(part, str)]
        pictures += [
            Tile(t.image, t.text or "", good=None if ok is None else bool(ok))
            for t, ok in zip(group.trajectories, success, strict=True)
        ]
        rows.append((prompt_text(group), pictures))
    folder = f"samples/{run.samples_dir(step).name}"
    if rows:
        buffer = io.BytesIO()
        picture_grid(rows).save(buffer, format="PNG")
        run.write_bytes(f"{folder}/grid.png", buffer.getvalue())
    lines = [json.dumps(_row(*each)) for each in zip(shown, [table] * len(shown), chosen, right, strict=True)]
    run.write_text(f"{folder}/groups.jsonl", "".join(line + "\n" for line in lines))


def prompt_text(group: Group) -> str:
    """The words of the prompt."""
    return " ".join(part for part in group.prompt.parts if isinstance(part, str))


def _row(group: Group, table: RewardTable, p: int, success: Sequence[float | None]) -> dict[str, Any]:
    members = []
    for g, trajectory in enumerate(group.trajectories):
        scores = {
            name: float(table.scores[p, g, k]) if bool(table.mask[p, g, k]) else None
            for k, name in enumerate(table.names)
        }
        member = {"text": trajectory.text, "seed": trajectory.seed, "success": success[g], "rewards": scores}
        members.append(member | {"masked": masked(table, p, g)})
    prompt = group.prompt
    return {
        "id": prompt.id,
        "task": prompt.task,
        "category": prompt.category,
        "prompt": prompt_text(group),
        "answer": prompt.answer,
        "judge": table.judge,
        "judged_by": dict(table.judged_by),
        "members": members,
    }
