"""The image of the README: the same prompts and noise drawn by the base and by an aligned run.

    python benchmarks/before_after.py runs/quickstart docs/images/before_after.png

The first test prompt of every category and the first four members, none chosen by how it came out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lvrpo.data.scenes import ScenePrompts
from lvrpo.policies.base import Sampling
from lvrpo.policies.loading import load_policy
from lvrpo.report.grids import Tile, image_grid
from lvrpo.rewards.success import successes

MEMBERS = 4


def main(run: Path, out: Path) -> None:
    """Writes the grid."""
    torch.set_num_threads(1)
    source = ScenePrompts(split="test")
    prompts = [*source.prompts("generate", 7), *source.prompts("edit", 3)]
    sampling = Sampling(group_size=MEMBERS)
    columns = []
    for model in ("tiny", run):
        groups = load_policy(model).sample(prompts, sampling, seeds=list(range(len(prompts))))
        columns.append((groups, successes(groups)))
    rows = []
    for p, prompt in enumerate(prompts):
        tiles = [Tile(part, "given") for part in prompt.parts if not isinstance(part, str)]
        for name, (groups, right) in zip(("before", "after"), columns, strict=True):
            for trajectory, ok in zip(groups[p].trajectories, right[p], strict=True):
                tiles.append(Tile(trajectory.image, name, good=bool(ok)))
        rows.append((" ".join(part for part in prompt.parts if isinstance(part, str)), tiles))
    image_grid(rows, tile_size=64).save(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
