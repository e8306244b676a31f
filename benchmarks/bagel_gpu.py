"""BAGEL in its full shape on one GPU: loading, memory, text, images, one joint LoRA step; ends inside ten minutes.

    python benchmarks/bagel_gpu.py                    random weights of BAGEL-7B-MoT, made on the card
    python benchmarks/bagel_gpu.py --folder FOLDER    the weights of a folder: loading is timed too
    python benchmarks/bagel_gpu.py --dry-run          a small shape on the CPU: the script itself is tried

Writes a table in Markdown with date and hardware (--out, default docs/results/bagel_gpu.md; a dry run prints it only).
What a random model draws and writes is noise; what it costs is the same.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdapterConfig, add_adapter
from lvrpo.policies.bagel.checkpoint import VAE
from lvrpo.policies.bagel.config import BagelConfig
from lvrpo.policies.bagel.create import BagelSizes, bagel_config, position_table, train_tokenizer
from lvrpo.policies.bagel.encoders import VitConfig
from lvrpo.policies.bagel.policy import THINK_THEN_ANSWER, THINK_THEN_DRAW, BagelPolicy
from lvrpo.policies.bagel.tokenizer import BagelTokenizer
from lvrpo.policies.base import Sampling
from lvrpo.policies.mot import flow_sampler
from lvrpo.policies.mot.transformer import MoTConfig
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import KINDS, GroupAdvantages
from lvrpo.training.memory_estimate import estimate_policy
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.policies import Policies
from lvrpo.training.trainer import train_step
from lvrpo.types import Group, Prompt, TextSegment

LIMIT_S = 540.0
"""No part begins after so many seconds."""
VOCABULARY_SIZE = 152_064
GIB = 2**30
ADAPTER = AdapterConfig(rank=32, alpha=64)
"""Of the joint step."""


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *rest: object, **options: object) -> int:
    """Of one attention whose keys are shared by several heads, which torch's own count refuses."""
    B, N, L, D = query
    return 2 * B * N * L * key[2] * (D + value[3])


ATTENTION_FLOPS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}_attention"): attention_flops
    for kernel in ("flash", "efficient", "cudnn")
}


@dataclass(frozen=True)
class Shape:
    """What is measured at which size."""

    config: BagelConfig
    device: torch.device
    dtype: torch.dtype
    matmul: int
    """Side of the square matrices that the card is measured with."""
    image_size: int
    text_tokens: int
    num_steps: int
    """Of an image as published."""
    step_image_size: int
    """Of the images of the joint step."""
    step_num_steps: int
    thought: int
    """Tokens of a text in the joint step."""


@dataclass
class Report:
    """The rows of the table, and the clock."""

    device: torch.device
    started: float = field(default_factory=time.perf_counter)
    rows: list[tuple[str, str]] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        self.rows.append((name, value))
        print(f"{name}: {value}", flush=True)

    def measure(self, name: str, part: Callable[[], str]) -> None:
        """Runs a part and notes what it says; one that does not fit into the memory or the time says so."""
        if time.perf_counter() - self.started > LIMIT_S:
            return self.add(name, "not measured: the ten minutes were over")
        try:
            return self.add(name, part())
        except torch.OutOfMemoryError:
            return self.add(name, "did not fit into the memory")
        except InputError as error:
            return self.add(name, f"not measured: {error}")

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds, the device's queue emptied before and after."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self) -> str:
        """Of memory since the last call."""
        if self.device.type != "cuda":
            return "not measured on a CPU"
        peak = torch.cuda.max_memory_allocated(self.device) / GIB
        torch.cuda.reset_peak_memory_stats(self.device)
        return f"{peak:.1f} GiB"


def full_shape(device: torch.device) -> Shape:
    """BAGEL-7B-MoT."""
    transformer = MoTConfig(
        width=3584,
        depth=28,
        heads=28,
        key_heads=4,
        mlp_width=18944,
        mlp="swiglu",
        attention_bias=True,
        rope_theta=1e6,
    )
    vit = VitConfig(width=1152, mlp_width=4304, heads=16, depth=26, patch_size=14, side=70)
    config = BagelConfig(transformer=transformer, vit=vit, vocabulary_size=VOCABULARY_SIZE)
    return Shape(config, device, torch.bfloat16, 8192, 1024, 128, 49, 512, 10, 64)


def small_shape() -> Shape:
    """For a dry run."""
    sizes = BagelSizes(width=64, depth=2, heads=4, key_heads=2, mlp_width=96, vit_width=32, vit_depth=1, vit_heads=2)
    return Shape(bagel_config(sizes), torch.device("cpu"), torch.bfloat16, 128, 64, 4, 3, 64, 2, 3)


def empty_policy(shape: Shape) -> BagelPolicy:
    """On the meta device."""
    small = train_tokenizer([THINK_THEN_DRAW, THINK_THEN_ANSWER], 1024)
    words = BagelTokenizer(small.tokenizer, shape.config.vocabulary_size, small.files)
    with torch.device("meta"):
        return BagelPolicy(shape.config, words)


def random_policy(shape: Shape) -> BagelPolicy:
    """Random weights, made where they stay."""
    policy = empty_policy(shape)
    generator = torch.Generator(shape.device).manual_seed(0)
    state = {}
    for name, tensor in policy.state_dict().items():
        dtype = torch.float32 if name.startswith(VAE) else shape.dtype
        if name.endswith("_position"):
            side = round(len(tensor) ** 0.5)
            state[name] = position_table(side, tensor.shape[1]).to(shape.device, dtype)
            continue
        value = torch.zeros(tensor.shape, dtype=dtype, device=shape.device)
        if tensor.ndim == 1 and name.endswith("weight"):
            value.fill_(1.0)
        elif tensor.ndim > 1:
            value.normal_(0.0, 0.02, generator=generator)
        state[name] = value
    policy.load_state_dict(state, assign=True)
    return policy.to(shape.device)


def measure(shape: Shape, folder: Path | None) -> Report:
    """All parts, one after another."""
    report = Report(shape.device)
    side, dtype = shape.matmul, shape.dtype
    rate = [0.0]

    def matmul() -> str:
        a = torch.randn(side, side, device=shape.device, dtype=dtype)
        report.timed(lambda: a @ a)
        rate[0] = 20 * 2 * side**3 / report.timed(lambda: [a @ a for _ in range(20)])
        return f"{rate[0] / 1e12:.3g} TFLOP/s ({side} x {side} x {side})"

    report.measure("matmul, bfloat16", matmul)
    holder: list[BagelPolicy] = []
    if folder is None:
        seconds = report.timed(lambda: holder.append(random_policy(shape)))
        report.add("weights", f"random, made on the device in {seconds:.1f} s")
    else:
        seconds = report.timed(lambda: holder.append(BagelPolicy.load(folder, shape.device, dtype)))
        report.add("weights", f"loaded in {seconds:.1f} s from {folder.name}")
    policy = holder[0]
    weights = sum(t.nbytes for t in policy.state_dict().values())
    report.add("size of the weights", f"{weights / GIB:.2f} GiB")
    report.add("peak memory of loading", report.peak())
    with torch.no_grad():
        report.measure("text", lambda: text(policy, shape, report))
        report.measure("one pass over 8 images", lambda: one_pass(policy, shape, report, rate[0]))
        report.measure(f"images, {shape.image_size} x {shape.image_size}", lambda: images(policy, shape, report))
    report.measure("joint LoRA step, G = 8", lambda: joint_step(policy, shape, report))
    report.measure("predicted for that step", lambda: predicted(shape))
    return report


def text(policy: BagelPolicy, shape: Shape, report: Report) -> str:
    """Eight answers about one image."""
    sampling = Sampling(group_size=8, max_new_tokens=shape.text_tokens)
    prompt = Prompt("text", "understand", (noise(shape.image_size), "what is it"), ("text",))
    policy.sample([prompt], Sampling(group_size=8, max_new_tokens=2), [0])
    groups: list[Group] = []
    seconds = report.timed(lambda: groups.extend(policy.sample([prompt], sampling, [0])))
    segments = [segment for trajectory in groups[0].trajectories for segment in trajectory.segments]
    tokens = sum(len(segment.tokens) for segment in segments if isinstance(segment, TextSegment))
    return f"{tokens / seconds:.3g} tokens/s (8 answers of {shape.text_tokens}, prefill included), peak {report.peak()}"


def one_pass(policy: BagelPolicy, shape: Shape, report: Report, rate: float) -> str:
    """One model evaluation for a group of eight, as a share of what the card does in plain products."""
    runner, grid = policy.runner, policy.encoders.default_grid((shape.image_size, shape.image_size))
    cache, owner = runner.prefill_shared([runner.row(("an image",), draws=True)] * 8)
    x_t = torch.randn(8, grid[0] * grid[1], policy.encoders.channels, device=shape.device)
    t = torch.full((8,), 0.5, device=shape.device)

    def run() -> torch.Tensor:
        return flow_sampler.velocity(runner, cache.select(owner), x_t, t, grid)

    with FlopCounterMode(display=False, custom_mapping=ATTENTION_FLOPS) as counter:
        run()
    seconds = min(report.timed(run) for _ in range(3))
    done = counter.get_total_flops() / seconds
    return f"{seconds:.3g} s, {done / 1e12:.3g} TFLOP/s, {done / rate:.0%} of the matmul rate, peak {report.peak()}"


def images(policy: BagelPolicy, shape: Shape, report: Report) -> str:
    """As published: guidance on text at t > 0.4."""
    size = (shape.image_size, shape.image_size)
    default = policy.default_sampling("generate")
    sampling = Sampling(
        group_size=1,
        num_steps=shape.num_steps,
        solver="euler",
        timestep_shift=default.timestep_shift,
        guidance_scale=default.guidance_scale,
        guidance_renorm=default.guidance_renorm,
        guidance_interval=default.guidance_interval,
        image_size=size,
    )
    prompt = Prompt("image", "generate", ("an image",), ("image",))
    seconds = report.timed(lambda: policy.sample([prompt], sampling, [0]))
    rate = f"{1 / seconds:.3g} images/s, {seconds:.3g} s each"
    return f"{rate} ({shape.num_steps} steps, guided, decoded), peak {report.peak()}"


def step_config(shape: Shape) -> TrainConfig:
    """Of the joint step."""
    tree = {
        "name": "step",
        "device": str(shape.device),
        "rollout": {
            "group_size": 8,
            "max_new_tokens": shape.thought,
            "num_steps": shape.step_num_steps,
            "solver": "euler",
            "image_size": (shape.step_image_size, shape.step_image_size),
        },
        "limits": {"backward_tokens": 8192, "gradient_checkpointing": True},
        "optimizer": {"kind": "adamw", "adamw_lr": 1e-4},
        "adapter": ADAPTER,
    }
    return TrainConfig.model_validate(tree)


def step_prompts(shape: Shape) -> list[Prompt]:
    """One of each task."""
    source = noise(shape.step_image_size)
    return [
        Prompt("u", "understand", (source, "what is it"), ("text",)),
        Prompt("g", "generate", ("an image",), ("image",)),
        Prompt("e", "edit", (source, "make it red"), ("image",)),
        Prompt("r", "reason", ("an image",), ("text", "image")),
    ]


def predicted(shape: Shape) -> str:
    """What ``lvrpo check`` would say of the joint step; needs no memory of the card."""
    policy = empty_policy(shape)
    state = {n: t if n.startswith(VAE) else t.to(shape.dtype) for n, t in policy.state_dict().items()}
    policy.load_state_dict(state, assign=True)
    estimate = estimate_policy(policy, step_config(shape), step_prompts(shape))
    return f"{estimate.peak / GIB:.1f} GiB, most in the {estimate.peak_phase}"


def joint_step(policy: BagelPolicy, shape: Shape, report: Report) -> str:
    """Rollout and update of one prompt of each task: an adapter on both experts, advantages made up."""
    config, prompts = step_config(shape), step_prompts(shape)
    add_adapter(policy, ADAPTER, "the measured weights")
    config.limits.apply(policy)
    policies = Policies(policy)
    optimizer = Optimizers(policy, config.optimizer, 10)
    groups: list[Group] = []
    sampling = config.rollout.sampling(0, 0)
    sampled = report.timed(lambda: groups.extend(policy.sample(prompts, sampling, [0, 1, 2, 3])))
    sampling_peak = report.peak()
    A = torch.linspace(-1.5, 1.5, 8).expand(len(groups), -1)
    advantages = dict.fromkeys(KINDS, GroupAdvantages.all_valid(A))
    objectives = objectives_of(config, policy.segment_kinds)
    trained = report.timed(lambda: train_step(policies, objectives, [optimizer], groups, advantages, config, 0))
    adapter = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    side = shape.step_image_size
    what = f"understand, generate, edit, think then draw; {side} x {side}, {shape.step_num_steps} steps"
    how = f"{shape.thought} tokens, {adapter / 1e6:.3g} million weights, 4 of 8 images at 2 times, checkpointed"
    seconds = f"{sampled + trained:.3g} s: rollout {sampled:.3g}, update {trained:.3g} ({what}; {how})"
    return f"{seconds}, peak of the rollout {sampling_peak}, of the update {report.peak()}"


def noise(side: int) -> torch.Tensor:
    """An image."""
    return torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))


def table(report: Report, shape: Shape, dry: bool) -> str:
    """The report as a page."""
    name = torch.cuda.get_device_name(shape.device) if shape.device.type == "cuda" else platform.machine() + " CPU"
    seconds = time.perf_counter() - report.started
    what = "a small shape: the script alone is tried" if dry else "BAGEL-7B-MoT's shape"
    lines = [
        "# BAGEL on one GPU",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {name}, torch {torch.__version__}, {what}; {seconds:.0f} s.",
        "",
        "| measured | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in report.rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="BAGEL in its full shape on one GPU")
    parser.add_argument("--folder", type=Path, help="weights to load; default: random ones")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dry-run", action="store_true", help="a small shape on the CPU; nothing is written")
    parser.add_argument("--out", type=Path, default=Path("docs/results/bagel_gpu.md"))
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA card: use --dry-run to try the script")
    shape = small_shape() if options.dry_run else full_shape(torch.device(options.device))
    page = table(measure(shape, options.folder), shape, options.dry_run)
    print("\n" + page)
    if not options.dry_run:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(page)


if __name__ == "__main__":
    main()
