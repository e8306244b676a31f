"""How much of the measured matmul rate each part of a step reaches, and how many operators it calls.

    OMP_NUM_THREADS=1 python benchmarks/roofline.py [--part PART ...] [--device cpu] [--repeats 5] [--against REVISION]

FLOPs are those of matmuls, attention and convolutions, forward and backward, as torch counts them. Operators are all
that torch dispatches, kernels those of them that are no views. Counted is the second call of a part. Seconds are of one
thread of the processor, or on a GPU until it is done. Rates and parts are measured in turn; medians are printed.

``--against``: instead, the seconds of each part in a revision of git and in this tree, each in a process of its own, in
turn; the ratio is the median of those of neighbors, above 1 where this tree is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import PIPE

import torch
from bagel_step import make_policy, make_prompts, sampling_of, seeds_of
from golden_runs import ROOT, check_out
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lvrpo.config import load_config, shipped_configs
from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.policies.base import Sampling
from lvrpo.rewards.table import score_groups
from lvrpo.training.advantages import segment_advantages
from lvrpo.training.config import TrainConfig
from lvrpo.training.rollout import prompts_of_step, rollout
from lvrpo.training.trainer import Trainer, train_step

SIDE, COPIED = 2048, 256 << 20
PARTS = (
    "tiny rollout",
    "tiny rewards",
    "tiny update",
    "tiny 64 tokens",
    "bagel 64 px",
    "bagel 256 px",
    "bagel joint step",
)


class Operators(TorchDispatchMode):
    """Counts the operators that are called, those that are no views, and those that read a number from the device."""

    count = kernels = reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        self.kernels += not func.is_view
        self.reads += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def attention_flops(q: Sequence[int], k: Sequence[int], *_: object, **__: object) -> int:
    """Of queries (B, H, L, E) over keys (B, K, S, E): two matmuls."""
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


def attention_backward_flops(_: object, q: Sequence[int], k: Sequence[int], *__: object, **___: object) -> int:
    """Five matmuls: one is that of the forward pass again."""
    return attention_flops(q, k) * 5 // 2


UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
"""What torch's counter does not know: attention on a CPU."""


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call."""
    if device.type == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def quickstart_parts(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The parts of a step of the quickstart, from its second step on."""
    config = load_config(TrainConfig, shipped_configs()["quickstart"], [f"device={device.type}", "threads=1"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer.start(config, Path(folder) / "run")
        with trainer.run:
            policies = trainer.state.policies
            prompts = prompts_of_step(trainer.source, config, 1)
            groups = rollout(policies, prompts, config, 1)
            yield "tiny rollout", lambda: rollout(policies, prompts, config, 1)

            def rewards() -> object:
                with policies.use("judge") as judge:
                    return score_groups(trainer.rewards, groups, judge)

            yield "tiny rewards", rewards
            with policies.use("judge") as judge:
                table = score_groups(trainer.rewards, groups, judge)
            advantages = segment_advantages(table, groups, config.advantages)
            update = (policies, trainer.objectives, trainer.state.optimizers, groups, advantages, config, 1)
            yield "tiny update", lambda: train_step(*update).means()
            questions = trainer.source.prompts("understand", 16)
            texts = Sampling(
                group_size=8, max_new_tokens=64, temperature=100.0
            )  # nearly uniform: few answers end early
            with policies.use("policy") as policy:
                yield "tiny 64 tokens", lambda: policy.sample(questions, texts, list(range(16)))


def bagel_parts(device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """A small BAGEL: a group of 8 images, guided, ten steps; and a joint step of all tasks."""
    for size in (64, 256):
        policy = make_policy(BagelSizes(width=256, depth=6, mlp_width=512, image_size=size)).to(device)
        prompts = [prompt for prompt in make_prompts(size) if prompt.task == "generate"][:1]
        drawing = Sampling(group_size=8, num_steps=10, guidance_scale=4.0, guidance_renorm="global")
        yield f"bagel {size} px", lambda: policy.sample(prompts, drawing, [5])  # noqa: B023  # called before the next
        if size == 64:
            every = make_prompts(size)
            groups = policy.sample(every, sampling_of(4), seeds_of(every))
            trajectories = [trajectory for group in groups for trajectory in group.trajectories]

            def step() -> None:
                rows = policy.logprobs(trajectories)  # noqa: B023
                torch.cat([scored.logprobs.flatten() for row in rows for scored in row]).mean().backward()
                policy.zero_grad(set_to_none=True)  # noqa: B023

            yield "bagel joint step", step


def parts_of(device: torch.device, chosen: Sequence[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The chosen parts; a part may be called until the next one is asked for."""
    for of, parts in (("tiny", quickstart_parts), ("bagel", bagel_parts)):
        if any(name.startswith(of) for name in chosen):
            yield from ((name, call) for name, call in parts(device) if name in chosen)


def measure(options: argparse.Namespace, device: torch.device) -> None:
    """Prints FLOPs, seconds, rates and operators."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    source, target = (torch.empty(COPIED, dtype=torch.uint8, device=device) for _ in range(2))
    print(
        f"{'part':18} {'GFLOP':>8} {'seconds':>8} {'GFLOP/s':>8} {'of matmul':>9} "
        f"{'operators':>9} {'kernels':>7} {'reads':>6}"
    )
    rates, copies = [], []
    for name, call in parts_of(device, options.part):
        call()
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as flops, Operators() as operators:
            call()
        taken, own = [], []
        for _ in range(options.repeats):
            own.append(2 * SIDE**3 / seconds(lambda: a @ b, device) / 1e9)
            copies.append(2 * COPIED / seconds(lambda: target.copy_(source), device) / 1e9)
            taken.append(seconds(call, device))
        total, median, rate = flops.get_total_flops() / 1e9, statistics.median(taken), statistics.median(own)
        rates += own
        print(
            f"{name:18} {total:8.1f} {median:8.3f} {total / median:8.1f} {total / median / rate:9.0%} "
            f"{operators.count:9} {operators.kernels:7} {operators.reads:6}",
            flush=True,
        )
    print(f"matmul {SIDE} x {SIDE} x {SIDE} in {dtype}: {statistics.median(rates):.1f} GFLOP/s")
    print(f"copy of {COPIED >> 20} MiB, read and written: {statistics.median(copies):.1f} GB/s")


def serve(part: str, device: torch.device) -> None:
    """Calls a part once for every line of the input, and prints its seconds."""
    for _, call in parts_of(device, [part]):
        call()
        for _ in sys.stdin:
            print(seconds(call, device), flush=True)


def compare(options: argparse.Namespace) -> None:
    """Prints the seconds of both trees and their ratio."""
    with tempfile.TemporaryDirectory() as folder:
        check_out(options.against, Path(folder))
        print(f"{'part':18} {'before':>8} {'after':>8} {'ratio':>6}  ratios of neighbors")
        for part in options.part:
            own = [sys.executable, __file__, "--serve", part, "--device", options.device]
            trees = (Path(folder), ROOT)
            workers = [
                subprocess.Popen(
                    own, text=True, env=os.environ | {"PYTHONPATH": str(tree / "src")}, stdin=PIPE, stdout=PIPE
                )
                for tree in trees
            ]
            before, after = zip(*(tuple(map(one_call, workers)) for _ in range(options.repeats)), strict=True)
            for worker in workers:
                worker.communicate()
            ratios = [one / other for one, other in zip(before, after, strict=True)]
            print(
                f"{part:18} {statistics.median(before):8.3f} {statistics.median(after):8.3f} "
                f"{statistics.median(ratios):6.2f}  {min(ratios):.2f} to {max(ratios):.2f}",
                flush=True,
            )


def one_call(worker: subprocess.Popen[str]) -> float:
    """The seconds of one call in a process of ``serve``."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", metavar="REVISION")
    parser.add_argument("--serve", metavar="PART", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.against is not None:
        compare(options)
    elif options.serve is not None:
        serve(options.serve, torch.device(options.device))
    else:
        measure(options, torch.device(options.device))


if __name__ == "__main__":
    main()
