"""Predicted against measured peak memory of two training steps, each in a process of its own.

    python benchmarks/memory.py [--device cpu | cuda] [SHAPE ...]

Measured on a CPU: the most anonymous memory of the process, less what it had when the run began, with libraries that
give freed blocks and kernels back: by default they keep them (docs/log.md). On a card: the most that torch allocated.
No text ends before its limit, as predicted. Small shapes, minutes on one core; prints one line a shape and exits with 1
if one is off by more than 15 %, or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

LIMIT = 0.15
GIVEN_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8",
    "LRU_CACHE_CAPACITY": "8",
}
"""For glibc: what was freed is no longer resident. For oneDNN and torch's use of it: few compiled kernels are kept; in
bfloat16 there is one of half a MiB for every shape of a product, up to 1024 of them."""
EVERY_S = 0.001
"""How often the memory is looked at."""
COMMON = [
    "steps=2",
    "optimizer.kind=adamw",
    "reference_eval_every=2",
    "rewards=[{name: 'spread:Spread'}]",
    "validation={every: 2, prompts: {understand: 4}}",
]
TASKS = "data.prompts_per_step={generate: 2, understand: 4}"
DRAWINGS = "data.prompts_per_step={generate: 4}"
BAGEL = ["rollout={group_size: 4, num_steps: 3, max_new_tokens: 24}"]
WORDS_AND_DRAWINGS = "data.prompts_per_step={generate: 2, understand: 4}"
TOKENS = [
    "rollout={group_size: 4, max_new_tokens: 24, guidance_scale: 3, guided_logprobs: detach_uncond}",
    "text={kl_coef: 0.01}",
]
FLOW = [
    "rollout={group_size: 4, num_steps: 3, guidance_scale: 3, sampler: flow_sde, window: {kind: full}, solver: euler}",
    "flow={kind: flow_grpo, kl_coef: 0.01}",
]
SHAPES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "tiny, a quarter of quickstart's step": (
        "tiny",
        {},
        ["data.prompts_per_step={generate: 7, understand: 16, edit: 3, reason: 6}"],
    ),
    "bagel 512 x 8, all weights": ("bagel-tiny", {"width": 512, "depth": 8, "mlp_width": 1024}, [TASKS, *BAGEL]),
    "bagel 512 x 8, adamw_8bit": (
        "bagel-tiny",
        {"width": 512, "depth": 8, "mlp_width": 1024},
        [TASKS, *BAGEL, "optimizer.kind=adamw_8bit"],
    ),
    "bagel 512 x 8, offloaded": (
        "bagel-tiny",
        {"width": 512, "depth": 8, "mlp_width": 1024},
        [TASKS, *BAGEL, "offload=true"],
    ),
    "bagel 512 x 8, offloaded, bfloat16": (
        "bagel-tiny",
        {"width": 512, "depth": 8, "mlp_width": 1024},
        [TASKS, *BAGEL, "offload=true", "precision={compute: bfloat16}", "limits={gradient_checkpointing: true}"],
    ),
    "bagel 768 x 8, LoRA": (
        "bagel-tiny",
        {"width": 768, "depth": 8, "mlp_width": 2048},
        [TASKS, *BAGEL, "adapter={rank: 8}"],
    ),
    "bagel 768 x 8, LoRA on bfloat16": (
        "bagel-tiny",
        {"width": 768, "depth": 8, "mlp_width": 2048},
        [TASKS, *BAGEL, "adapter={rank: 8}", "precision={weights: bfloat16}"],
    ),
    "bagel 256 x 6, 128 x 128 images": (
        "bagel-tiny",
        {"width": 256, "depth": 6, "image_size": 128},
        [DRAWINGS, *BAGEL, "adapter={rank: 8}", "flow={timesteps_per_sample: 4}"],
    ),
    "bagel 256 x 6, two images at once": (
        "bagel-tiny",
        {"width": 256, "depth": 6, "image_size": 128},
        [DRAWINGS, *BAGEL, "adapter={rank: 8}", "flow={timesteps_per_sample: 4}", "limits={microbatch_size: 2}"],
    ),
    "bagel 256 x 6, 30000 words": (
        "bagel-tiny",
        {"width": 256, "depth": 6, "vocabulary_size": 30000},
        ["data.prompts_per_step={understand: 16}", "rollout={group_size: 8, max_new_tokens: 24}", "adapter={rank: 8}"],
    ),
    "janus 256 x 4, 20000 words": (
        "janus-tiny",
        {"width": 256, "depth": 4, "mlp_width": 512, "vocabulary_size": 20000, "codes": 4096, "image_size": 64},
        [WORDS_AND_DRAWINGS, *TOKENS, "tokens={kind: grpo, kl_coef: 0.01}"],
    ),
    "janus 256 x 4, both branches with a gradient, LoRA": (
        "janus-tiny",
        {"width": 256, "depth": 4, "mlp_width": 512, "vocabulary_size": 20000, "codes": 4096, "image_size": 64},
        [WORDS_AND_DRAWINGS, *TOKENS, "rollout.guided_logprobs=joint", "tokens={kind: grpo}", "adapter={rank: 8}"],
    ),
    "emu3 256 x 4, 20000 words": (
        "emu3-tiny",
        {"width": 256, "depth": 4, "mlp_width": 512, "vocabulary_size": 20000, "image_size": 64},
        [WORDS_AND_DRAWINGS, *TOKENS, "tokens={kind: grpo, kl_coef: 0.01}"],
    ),
    "showo 256 x 4, 20000 words": (
        "showo-tiny",
        {"width": 256, "depth": 4, "mlp_width": 512, "vocabulary_size": 20000, "bits": 12, "image_size": 64},
        [
            *(WORDS_AND_DRAWINGS, *TOKENS, "rollout.num_steps=3", "rollout.choice_temperature=1.0"),
            "masked={kind: grpo, kl_coef: 0.01}",
        ],
    ),
    "showo2 256 x 4, 20000 words": (
        "showo2-tiny",
        {"width": 256, "depth": 4, "mlp_width": 512, "vocabulary_size": 20000, "head_width": 256, "image_size": 64},
        [WORDS_AND_DRAWINGS, *FLOW, "rollout.max_new_tokens=24"],
    ),
    "sd3 256 x 4, LoRA": (
        "sd3-tiny",
        {"width": 256, "depth": 4, "heads": 4, "text_width": 256, "image_size": 64},
        ["data.prompts_per_step={generate: 4}", *FLOW, "validation.prompts={generate: 4}", "adapter={rank: 8}"],
    ),
    "idefics3 256 x 4, 20000 words": (
        "idefics3",
        {"width": 256, "depth": 4, "vocabulary": 20000},
        ["data.prompts_per_step={understand: 8}", "rollout={group_size: 4, max_new_tokens: 24}"],
    ),
}
"""Name -> what ``lvrpo init`` makes (tiny: the shipped policy; idefics3: one of the tests), its sizes, settings."""
SPREAD = """
import torch
from lvrpo.rewards.base import Scores

class Spread:
    def applies(self, prompt):
        return True

    def score(self, groups, judge):
        return Scores(torch.tensor([[t.seed % 7 / 6 for t in group.trajectories] for group in groups]))
"""


class Peak(threading.Thread):
    """The most anonymous memory of this process above what it had at the start, in bytes: code and files left out."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = anonymous()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(EVERY_S):
            self.most = max(self.most, anonymous())

    def result(self) -> int:
        self.done.set()
        self.join()
        return self.most - self.before


def anonymous() -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: the measurement needs Linux")


def never_end() -> None:
    """Texts are written up to their limit from now on, whatever tokens are in them: the estimate is of these."""
    from lvrpo.policies import decoding

    plain = decoding.generate_text

    def generate(decoder: Any, owner: Any, embed: Any, head: Any, end_ids: Any, *rest: Any) -> Any:  # Any: as there
        return plain(decoder, owner, embed, head, (), *rest)

    for name, module in list(sys.modules.items()):
        if name.startswith("lvrpo.policies.") and getattr(module, "generate_text", None) is plain:
            module.generate_text = generate  # type: ignore[attr-defined]


def prepare(kind: str, sizes: dict[str, Any], folder: Path) -> str:
    """The policy of a shape."""
    if kind == "tiny":
        return "tiny"
    if kind == "idefics3":
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "doubles"))
        from small_vlm import create_vlm

        return str(create_vlm(kind, folder, **sizes))
    if kind != "bagel-tiny":
        from lvrpo.cli import main

        assert main(["init", kind, str(folder), *(f"{name}={value}" for name, value in sizes.items())]) == 0
        return str(folder)
    import torch

    from lvrpo.policies.bagel.create import BagelSizes, create_bagel

    policy = create_bagel(BagelSizes.model_validate(sizes), ["a picture of a red circle"])
    with torch.no_grad():
        for parameter in policy.parameters():  # a layer of zeros would give an adapter no gradient
            if not parameter.any():
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    policy.save(folder)
    return str(folder)


def work(parts: str, settings: list[str]) -> dict[str, Any]:
    """In a process of its own: the estimate, the run, or both."""
    import torch
    import torch._dynamo  # an optimizer imports it at its first step

    from lvrpo.config import load_config
    from lvrpo.policies.loading import policy_class, policy_folder
    from lvrpo.policies.mot.policy import MoTPolicy
    from lvrpo.registry import allow_code
    from lvrpo.training.config import TrainConfig
    from lvrpo.training.dry_run import memory_needed
    from lvrpo.training.setup import require_extras
    from lvrpo.training.trainer import Trainer

    sys.path.insert(0, ".")
    allow_code(["spread"])
    config = load_config(TrainConfig, None, settings)
    require_extras(config)
    out: dict[str, Any] = {}
    if parts in ("estimate", "both"):
        found = memory_needed(config)
        out = {"predicted": found.peak, "worst": found.peak_phase}
    if parts == "estimate":
        return out
    kind = policy_class(folder := policy_folder(config.policy))
    if not issubclass(kind, MoTPolicy):
        kind.from_config(folder)  # imports packages, whose code is not counted
    cuda = config.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(torch.zeros(1, device=config.device).device)
    memory = Peak()
    if not cuda:
        memory.start()
    alignment = Trainer.start(config, Path("run"))
    never_end()
    with alignment.run:
        alignment.train()
    return out | {"measured": torch.cuda.max_memory_allocated(config.device) if cuda else memory.result()}


def measure(name: str, device: str) -> float | None:
    """Prints the line of a shape; how far the prediction is off, None where there is none."""
    kind, sizes, extra = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "spread.py").write_text(SPREAD)
        policy = prepare(kind, sizes, Path(folder) / "policy")
        settings = [f"device={device}", f"policy={policy}", *COMMON, *extra]
        found: dict[str, Any] = {}
        # on a CPU what the estimate leaves in the heap would be taken for memory of the run
        for what in ("both",) if device.startswith("cuda") else ("estimate", "run"):
            command = [sys.executable, str(Path(__file__).resolve()), "--work", what, *settings]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | GIVEN_BACK
            )
            if done.returncode:
                why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
                print(f"{name:36} failed ({what}): {why}", flush=True)
                return None
            found |= json.loads(done.stdout.splitlines()[-1])
    predicted, measured = found["predicted"], found["measured"]
    wrong = predicted / measured - 1
    numbers = f"predicted {predicted / 2**20:7.0f}  measured {measured / 2**20:7.0f} MiB  {wrong:+6.1%}"
    print(f"{name:36} {numbers}  ({found['worst']})", flush=True)
    return wrong


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description="Predicted against measured peak memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    options = parser.parse_args()
    if unknown := set(options.shapes) - set(SHAPES):
        parser.error(f"no such shape: {', '.join(sorted(unknown))}")
    found = [measure(name, options.device) for name in options.shapes or SHAPES]
    return 1 if any(wrong is None or abs(wrong) > LIMIT for wrong in found) else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        print(json.dumps(work(sys.argv[2], sys.argv[3:])))
        sys.exit(0)
    sys.exit(main())
