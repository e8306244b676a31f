"""One joint step of a small BAGEL, ours against the straightforward way: same numbers, the ratio of processor times.

Ours: a prompt is prefilled once for its group, the members of all groups go together, the replay is packed. The
straightforward way: every member prefills its prompt alone, with every branch of its guidance, and is replayed alone.
Also the peak memory of loading, as a multiple of the weights.

    OMP_NUM_THREADS=1 python benchmarks/bagel_step.py [--repeats 3] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lvrpo.data.scenes import VOCABULARY, ScenePrompts, ScenesConfig
from lvrpo.policies.bagel.create import BagelSizes, create_bagel
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Sampling
from lvrpo.sampling import derive_seed
from lvrpo.types import Prompt, TaskKind, TextSegment, Trajectory

TASKS: dict[TaskKind, int] = {"understand": 2, "generate": 2, "edit": 2, "reason": 2}
LOADED_MIB = 160
"""Weights of the model whose loading is watched."""


@dataclass(frozen=True)
class Step:
    """What a way of doing the step gives."""

    trajectories: list[Trajectory]
    gradient: torch.Tensor
    sample_s: float
    train_s: float


def make_policy(sizes: BagelSizes) -> BagelPolicy:
    """Random, without the zeros that a fresh model has."""
    policy = create_bagel(sizes, [" ".join(VOCABULARY)])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if not parameter.any() or ".generation." in name:
                spread = parameter.shape[-1] ** -0.5
                parameter += spread * torch.randn(parameter.shape, generator=generator)
    return policy


def make_prompts(size: int) -> list[Prompt]:
    """Of every task of the built-in world."""
    source = ScenePrompts(ScenesConfig(size=size), "train", 0)
    prompts = [prompt for task, count in TASKS.items() for prompt in source.prompts(task, count)]
    return [replace(p, output=("text", "image")) if p.task == "reason" else p for p in prompts]


def sampling_of(group_size: int) -> Sampling:
    """Guided three ways, two stochastic steps of eight."""
    return Sampling(
        group_size=group_size,
        max_new_tokens=16,
        num_steps=8,
        sampler="flow_sde",
        window=(1, 2),
        guidance_scale=4.0,
        image_guidance_scale=2.0,
        guidance_renorm="text_channel",
    )


def loss_of(policy: BagelPolicy, trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """A policy gradient at ratio 1, every member with an advantage of its own."""
    terms = []
    for trajectory, row in zip(trajectories, policy.logprobs(trajectories), strict=True):
        advantage = (trajectory.member % 4 - 1.5) / len(trajectory.segments)
        terms += [
            -advantage * (scored.logprobs - segment.behavior_logprobs).exp().mean()
            for scored, segment in zip(row, trajectory.segments, strict=True)
        ]
    return torch.stack(terms).sum()


def ours(policy: BagelPolicy, prompts: Sequence[Prompt], sampling: Sampling) -> Step:
    """Groups together, one packed replay."""
    start = time.process_time()
    groups = policy.sample(prompts, sampling, seeds_of(prompts))
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    sampled = time.process_time()
    loss_of(policy, trajectories).backward()
    return Step(trajectories, taken(policy), sampled - start, time.process_time() - sampled)


def straightforward(policy: BagelPolicy, prompts: Sequence[Prompt], sampling: Sampling) -> Step:
    """Member by member."""
    start = time.process_time()
    trajectories = []
    with torch.no_grad():
        for prompt, seed in zip(prompts, seeds_of(prompts), strict=True):
            for member in range(sampling.group_size):
                trajectories.append(policy.sample_member(prompt, sampling, seed, member))
    sampled = time.process_time()
    for trajectory in trajectories:
        loss_of(policy, [trajectory]).backward()
    return Step(trajectories, taken(policy), sampled - start, time.process_time() - sampled)


def seeds_of(prompts: Sequence[Prompt]) -> list[int]:
    return [derive_seed(0, prompt.id) for prompt in prompts]


def taken(policy: BagelPolicy) -> torch.Tensor:
    """The gradient, which is cleared."""
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad(set_to_none=True)
    return gradient


def differences(one: Step, other: Step) -> dict[str, float]:
    """How far two ways are apart; texts must be equal."""
    logprobs = latents = 0.0
    for a, b in zip(one.trajectories, other.trajectories, strict=True):
        for s, r in zip(a.segments, b.segments, strict=True):
            if isinstance(s, TextSegment):
                assert isinstance(r, TextSegment)
                assert torch.equal(s.tokens, r.tokens), "the two ways wrote different texts"
            else:
                assert not isinstance(r, TextSegment)
                latents = max(latents, float((s.latent - r.latent).abs().max() / s.latent.abs().max()))
            scale = s.behavior_logprobs.abs().clamp(min=1)
            logprobs = max(logprobs, float(((s.behavior_logprobs - r.behavior_logprobs).abs() / scale).max()))
    gradient = float((one.gradient - other.gradient).norm() / one.gradient.norm())
    return {"logprobs": logprobs, "latents": latents, "gradient": gradient}


def compare(sizes: BagelSizes, group_size: int, repeats: int) -> dict[str, float]:
    """The best of so many repetitions, the two ways in turn."""
    policy, prompts, sampling = make_policy(sizes), make_prompts(sizes.image_size), sampling_of(group_size)
    ways: tuple[Callable[..., Step], ...] = (ours, straightforward)
    steps = [[way(policy, prompts, sampling) for way in ways] for _ in range(repeats)]
    out: dict[str, float] = {"members": float(len(prompts) * group_size), **differences(*steps[0])}
    for part in ("sample_s", "train_s"):
        for way, found in zip(("ours", "straightforward"), zip(*steps, strict=True), strict=True):
            out[f"{way}_{part}"] = min(getattr(step, part) for step in found)
    totals = [out[f"{way}_sample_s"] + out[f"{way}_train_s"] for way in ("ours", "straightforward")]
    out["ratio_sample"] = out["straightforward_sample_s"] / out["ours_sample_s"]
    out["ratio_train"] = out["straightforward_train_s"] / out["ours_train_s"]
    return out | {"ratio": totals[1] / totals[0]}


def loading_peak(dtype: str, mib: int) -> float:
    """Peak memory of loading a model of so many MiB in a process of its own, over the memory of its weights."""
    width = 64 * max(1, round((mib * 2**20 / 4 / (2 * 4 * 2.5 * 4)) ** 0.5 / 64))  # four layers, two experts
    sizes = BagelSizes(width=width, depth=4, heads=8, key_heads=4, mlp_width=2 * width)
    with tempfile.TemporaryDirectory() as folder:
        create_bagel(sizes).save(Path(folder) / "large")
        create_bagel(BagelSizes(width=64, depth=1, heads=2, key_heads=1)).save(Path(folder) / "small")
        command = [sys.executable, __file__, "--load", folder, dtype]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found["peak"] / found["weights"]


def load_and_report(folder: Path, dtype: str) -> None:
    """Prints what loading took beyond what the process held before it."""
    BagelPolicy.load(folder / "small", dtype=getattr(torch, dtype))  # what the libraries load at their first use
    before = memory("VmRSS")
    policy = BagelPolicy.load(folder / "large", dtype=getattr(torch, dtype))
    weights = sum(t.nbytes for t in policy.state_dict().values())
    print(json.dumps({"peak": memory("VmHWM") - before, "weights": weights}))


def memory(name: str) -> int:
    """Of this process, in bytes (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--load", nargs=2, metavar=("FOLDER", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        return load_and_report(Path(options.load[0]), options.load[1])
    torch.set_num_threads(1)
    sizes = BagelSizes(
        width=options.width, depth=options.depth, mlp_width=2 * options.width, image_size=options.image_size
    )
    found = compare(sizes, options.group_size, options.repeats)
    found |= {f"loading_{dtype}": loading_peak(dtype, LOADED_MIB) for dtype in ("float32", "bfloat16")}
    for name, value in found.items():
        print(f"{name:24} {value:.3g}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
