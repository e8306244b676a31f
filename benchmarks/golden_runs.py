"""Whether the working tree trains the same numbers as another revision, bit for bit.

    python benchmarks/golden_runs.py REVISION [FAMILY ...]

Every family of recipes runs for three steps in a checkout of REVISION and in this tree, on this machine: rounding
differs between machines, so no numbers are kept. Compared are every tensor of every safetensors file of a run, every
array of its other records, and every metric but seconds. Exits with 1 where anything differs. A family that REVISION
does not have is named and passed over.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SHORT = (
    "steps=3",
    "device=cpu",
    "data.prompts_per_step={generate: 4, understand: 8, edit: 2, reason: 4}",
    "rollout.group_size=4",
    "rollout.num_steps=6",
    "validation={every: 2, prompts: {generate: 4, understand: 8}}",
    "reference_eval_every=2",
    "checkpoint_every=2",
)
PAIRED = ("data.prompts_per_step={generate: 4, understand: 4, edit: 0, reason: 0}",)
KEEP = ("flow.top_bottom_k=2",)
DISCRETE = (
    "policy=policy",
    "device=cpu",
    "steps=3",
    "allow_code=[color_task, discrete_policy]",
    "data.source='color_task:Colors'",
    "data.prompts_per_step={understand: 2, generate: 3, reason: 3}",
    "rewards=[{name: 'color_task:ShareOfColor', label: share}, {name: 'color_task:Says', label: says}]",
    "optimizer={kind: adamw, adamw_lr: 5e-3}",
)
SUPERVISED = (
    "steps=3",
    "device=cpu",
    "corpus={scenes: 200, edits: 60, reasons: 60}",
    "batch={generate: 8, caption: 4, question: 8, edit: 4, reason: 4}",
    "checkpoint_every=2",
    "held_out={generate: 4, understand: 8}",
)
UNTIMED = ("seconds", "seconds_left")


@dataclass(frozen=True)
class Family:
    """A run that stands for recipes that take the same way through the code."""

    command: str
    """train or pretrain."""
    overrides: tuple[str, ...]
    config: str | None = None
    """A built-in recipe; None: everything is in the overrides."""
    discrete: str | None = field(default=None)
    """The kind of segment that the policy of the tests draws, where that one is trained."""


def short(config: str, *overrides: str) -> Family:
    return Family("train", (*SHORT, *overrides), config)


FAMILIES: Mapping[str, Family] = {
    "quickstart": short("quickstart"),
    "lvrpo": short("lvrpo"),
    "self": short("self"),
    "flow_grpo": short("flow_grpo", *KEEP),
    "dance_grpo": short("dance_grpo", *KEEP),
    "mix_grpo": short("mix_grpo", *KEEP),
    "dr_grpo": short("dr_grpo"),
    "gspo": short("gspo"),
    "cispo": short("cispo"),
    "dapo": short("dapo"),
    "dpo": short("dpo"),
    "dpo_offline": short("dpo_offline", "rollout.pool=2"),
    "best_of": short("best_of"),
    "awm": short("quickstart", "flow.kind=awm", "rollout.guidance_scale=1.5", "flow.unguided_kl_coef=0.01"),
    "corl": short("corl", *PAIRED),
    "lvrpo_paper": short("lvrpo_paper", *KEEP),
    "adapter": short("quickstart", "adapter={rank: 4}"),
    "pcgrad": short("quickstart", "gradient_mixing=pcgrad", "gradient_audit.every=2"),
    "offload": short("quickstart", "offload=true"),
    "judge_refresh": short("quickstart", "rewards=[{name: self_vqa}, {name: exact_answer}]", "judge.refresh_every=2"),
    "several_steps": short(
        "quickstart", "num_minibatches=2", "rollout.max_resamples=4", "text.importance_cap=2.0", "text.lr_scale=0.5"
    ),
    "tokens": Family(
        "train",
        (*DISCRETE, "tokens={lr_scale: 0.8}", "rollout={max_new_tokens: 4, guidance_scale: 1.5}"),
        discrete="tokens",
    ),
    "masked": Family(
        "train",
        (*DISCRETE, "masked={clip_high: 0.2}", "rollout={max_new_tokens: 4, num_steps: 4, choice_temperature: 1}"),
        discrete="masked",
    ),
    "pretrain": Family("pretrain", SUPERVISED, "pretrain"),
    "continued": Family("pretrain", SUPERVISED, "continued"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", help="of git: HEAD, a tag, a commit")
    parser.add_argument("family", nargs="*", choices=[*FAMILIES, []], help="default: all")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the runs there")
    given = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        other = Path(scratch) / "revision"
        check_out(given.revision, other)
        for name in given.family or FAMILIES:
            folder = (given.keep or Path(scratch)) / name
            before, after = (
                run(FAMILIES[name], tree, folder / at) for tree, at in ((other, "before"), (ROOT, "after"))
            )
            if isinstance(before, str):
                print(f"{name}: {given.revision} does not run it: {before}")
                failed |= isinstance(after, str)
                continue
            if isinstance(after, str):
                print(f"{name}: FAILS: {after}")
                failed = True
                continue
            compared, different = compare(before, after)
            failed |= bool(different)
            print("\n  ".join([f"{name}: {compared} compared, {len(different)} differ", *different[:8]]), flush=True)
    return int(failed)


def check_out(revision: str, folder: Path) -> None:
    """The files of a revision; the repository stays as it is."""
    archive = subprocess.run(["git", "-C", str(ROOT), "archive", revision], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(archive)) as files:
        files.extractall(folder, filter="data")


def run(family: Family, tree: Path, folder: Path) -> Path | str:
    """The run directory, or the last line of what went wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join(map(str, (tree / "src", tree / "tests/doubles")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    commands = []
    if family.discrete is not None:
        make = f"from discrete_policy import *; DiscretePolicy(({family.discrete!r},)).save(Path('policy'))"
        commands.append([sys.executable, "-c", make])
    config = [] if family.config is None else [family.config]
    if family.config is None:
        (folder / "run.yaml").write_text("allow_code: [color_task, discrete_policy]\n", encoding="utf-8")
        config = ["run.yaml"]
    evaluated = ["--no-evaluate"] if family.command == "train" else []
    overrides: Sequence[str] = family.overrides
    if not (tree / "tests/doubles/color_task.py").exists():  # older revisions have all of it in one file
        overrides = [override.replace("color_task:", "discrete_policy:") for override in overrides]
    commands.append([sys.executable, "-m", "lvrpo", family.command, *config, *overrides, "--out", "run", *evaluated])
    for command in commands:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 3):  # 3: done and not well, as a run of three steps may be
            return (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
    return folder / "run"


def compare(before: Path, after: Path) -> tuple[int, list[str]]:
    """How many values there are, and the names of those that differ."""
    own, other = (dict(values(path)) for path in (before, after))
    different = [name for name in own.keys() | other.keys() if not equal(own.get(name), other.get(name))]
    return len(own), sorted(different)


def values(path: Path) -> Iterator[tuple[str, object]]:
    """Everything that a run computed, by name."""
    for file in sorted(path.rglob("*.safetensors")):
        for name, tensor in load_file(file).items():
            yield f"{file.relative_to(path)}: {name}", tensor
    for file in sorted(path.rglob("*.npz")):
        with np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:
                yield f"{file.relative_to(path)}: {name}", arrays[name].copy()
    for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in UNTIMED:
                yield f"step {row['step']}: {name}", value


def equal(one: object, other: object) -> bool:
    """Bit for bit; nan is nan."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    return type(one) is type(other) and repr(one) == repr(other)


if __name__ == "__main__":
    sys.exit(main())
