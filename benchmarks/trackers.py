"""What a tracker costs a run: processor seconds of the run itself and of the process of the tracker, per step.

python benchmarks/trackers.py [steps], with the packages of the trackers installed. Wall clock says little on a shared
machine, so processor time is counted; the run itself does nothing for a tracker but start its process.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TRACKERS = {"none": "[]", "tensorboard": "[{kind: tensorboard}]", "wandb offline": "[{kind: wandb, mode: offline}]"}


def measure(steps: int, trackers: str) -> dict[str, float]:
    """A quickstart run of so many steps, without evaluation."""
    from lvrpo.config import load_config, shipped_configs
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.trainer import Trainer

    given = [f"steps={steps}", f"trackers={trackers}", "device=cpu"]
    config = load_config(TrainConfig, shipped_configs()["quickstart"], given)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.start(config, Path(folder) / "run")
        with trainer.run:
            before = resource.getrusage(resource.RUSAGE_SELF)
            trainer.train()
            after = resource.getrusage(resource.RUSAGE_SELF)
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"run": own / steps, "tracker": (children.ru_utime + children.ru_stime) / steps}


def main(steps: int) -> None:
    """Each in a process of its own, in turns."""
    for name, trackers in TRACKERS.items():
        command = [sys.executable, __file__, str(steps), trackers]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
        found = json.loads(done.stdout.splitlines()[-1])
        share = found["tracker"] / found["run"]
        print(f"{name:14s} run {found['run']:.3f} s a step, tracker {found['tracker']:.3f} s a step ({share:.2%})")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(json.dumps(measure(int(sys.argv[1]), sys.argv[2])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
