"""Predicted against measured peak memory of two training steps, each in a process of its own.

    python benchmarks/memory.py [SHAPE ...]

Measured is the largest resident memory of the process less what it held after its imports, with a C library that gives
freed blocks back at once: by default its heap keeps up to 55 % more (docs/log.md). Small shapes, minutes on one
core; prints one line a shape and exits with 1 if one is off by more than 15 %.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIMIT = 0.15
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc: what was freed is no longer resident."""
COMMON = [
    "device=cpu",
    "steps=2",
    "optimizer.kind=adamw",
    "control_every=2",
    "rewards=[{name: 'spread:Spread'}]",
    "guard={every: 2, prompts: {understand: 4}}",
]
TASKS = "data.prompts_per_step={generate: 2, understand: 4}"
DRAWINGS = "data.prompts_per_step={generate: 4}"
BAGEL = ["rollout={group_size: 4, num_steps: 3, max_new_tokens: 24}"]
SHAPES: dict[str, tuple[dict[str, Any] | None, list[str]]] = {
    "tiny, a quarter of quickstart's step": (
        None,
        ["data.prompts_per_step={generate: 7, understand: 16, edit: 3, reason: 6}"],
    ),
    "bagel 512 x 8, all weights": ({"width": 512, "depth": 8, "mlp_width": 1024}, [TASKS, *BAGEL]),
    "bagel 512 x 8, adamw_8bit": (
        {"width": 512, "depth": 8, "mlp_width": 1024},
        [TASKS, *BAGEL, "optimizer.kind=adamw_8bit"],
    ),
    "bagel 768 x 8, LoRA": ({"width": 768, "depth": 8, "mlp_width": 2048}, [TASKS, *BAGEL, "adapter={rank: 8}"]),
    "bagel 768 x 8, LoRA on bfloat16": (
        {"width": 768, "depth": 8, "mlp_width": 2048},
        [TASKS, *BAGEL, "adapter={rank: 8}", "precision={weights: bfloat16}"],
    ),
    "bagel 256 x 6, 128 x 128 drawings": (
        {"width": 256, "depth": 6, "image_size": 128},
        [DRAWINGS, *BAGEL, "adapter={rank: 8}", "flow={noise_draws: 4}"],
    ),
    "bagel 256 x 6, two drawings at once": (
        {"width": 256, "depth": 6, "image_size": 128},
        [DRAWINGS, *BAGEL, "adapter={rank: 8}", "flow={noise_draws: 4}", "limits={backward_members: 2}"],
    ),
    "bagel 256 x 6, 30000 words": (
        {"width": 256, "depth": 6, "vocabulary_size": 30000},
        ["data.prompts_per_step={understand: 16}", "rollout={group_size: 8, max_new_tokens: 24}", "adapter={rank: 8}"],
    ),
}
"""Name -> sizes of ``lvrpo init bagel-tiny`` (None: the shipped tiny policy), settings of the run."""
SPREAD = """
import torch
from lvrpo.rewards.base import Scores

class Spread:
    def applies(self, prompt):
        return True

    def score(self, groups, judge):
        return Scores(torch.tensor([[t.seed % 7 / 6 for t in group.trajectories] for group in groups]))
"""


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prepare(sizes: dict[str, Any] | None, folder: Path) -> str:
    """The policy of a shape."""
    if sizes is None:
        return "tiny"
    import torch

    from lvrpo.policies.bagel.create import BagelSizes, create_bagel

    policy = create_bagel(BagelSizes.model_validate(sizes), ["a picture of a red circle"])
    with torch.no_grad():
        for parameter in policy.parameters():  # a layer of zeros would give an adapter no gradient
            if not parameter.any():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    policy.save(folder)
    return str(folder)


def work(settings: list[str], estimate: bool) -> dict[str, Any]:
    """In a process of its own: the estimate, or the run."""
    import torch._dynamo  # noqa: F401  # an optimizer imports it at its first step

    from lvrpo.config import load_config
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.run import Alignment
    from lvrpo.training.trial import memory_needed

    sys.path.insert(0, ".")
    config = load_config(TrainConfig, None, settings)
    if config.adapter is not None:
        import peft  # noqa: F401
    if config.optimizer.kind == "adamw_8bit":
        import bitsandbytes  # noqa: F401
    if estimate:
        found = memory_needed(config)
        assert found is not None
        return {"peak": found.peak, "worst": found.worst, "lines": found.lines()}
    before = peak()
    alignment = Alignment.start(config, Path("run"))
    with alignment.run:
        alignment.go()
    return {"peak": peak() - before}


def main(names: list[str]) -> int:
    """Prints the table; returns the exit code."""
    off = 0
    for name in names or SHAPES:
        sizes, extra = SHAPES[name]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "spread.py").write_text(SPREAD)
            policy = prepare(sizes, Path(folder) / "policy")
            settings = [f"policy={policy}", *COMMON, *extra]
            results, environment = [], os.environ | GIVEN_BACK
            for what in ("estimate", "run"):
                command = [sys.executable, str(Path(__file__).resolve()), "--work", what, *settings]
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=environment)
                if done.returncode:
                    print(done.stderr[-2000:], file=sys.stderr)
                    return 1
                results.append(json.loads(done.stdout.splitlines()[-1]))
        predicted, measured = (result["peak"] for result in results)
        wrong = predicted / measured - 1
        off += abs(wrong) > LIMIT
        mib = 2**20
        print(
            f"{name:36} predicted {predicted / mib:7.0f}  measured {measured / mib:7.0f} MiB  {wrong:+6.1%}", end="  "
        )
        print(f"({results[0]['worst']})", flush=True)
    return 1 if off else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(sys.argv[3:], sys.argv[2] == "estimate")))
        sys.exit(0)
    sys.exit(main(sys.argv[1:]))
