"""GRPO steps of a small random Qwen3-VL on a CPU, here and by TRL's GRPOTrainer: the ratio of processor times.

The same model, pictures, questions, reward, group size, length limit, optimizer and number of updates: float32, AdamW,
one update per rollout, no KL term, no gradient checkpointing, all answers in one batch. A step is timed from the end of
the one before; the first and the last are left out. Both programs run in this process, one after the other, in turn.

    OMP_NUM_THREADS=1 python benchmarks/trl_step.py [--side 64 128] [--new-tokens 32] [--rounds 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "doubles"))
from small_vlm import create_vlm, without_videos

from lvrpo.config import parse_section
from lvrpo.pictures import to_pil
from lvrpo.rewards.function import as_reward
from lvrpo.training.config import TrainConfig
from lvrpo.training.sources import CustomParts, PromptList
from lvrpo.training.trainer import Trainer
from lvrpo.types import Image, Prompt

PROMPTS, GROUP_SIZE = 4, 8
QUESTIONS = ("what color is it", "is it a red circle", "yes or no", "a blue square above it")


@dataclass(frozen=True)
class Timing:
    """Of one program."""

    seconds: float
    """Median of its steps."""
    tokens: float
    """Mean length of its answers."""


@dataclass(frozen=True)
class Setting:
    """Of one comparison."""

    folder: str
    side: int
    new_tokens: int
    steps: int

    def pictures(self) -> list[Image]:
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(3, self.side, self.side, generator=generator) for _ in range(PROMPTS)]


def variety(text: str) -> float:
    """A reward that spreads: the share of different characters."""
    return len(set(text)) / max(1, len(text))


def ours(setting: Setting, folder: Path) -> Timing:
    """Steps of a run of lvrpo, its records included."""
    prompts = [
        Prompt(f"p{i}", "understand", (picture, QUESTIONS[i]), ("text",))
        for i, picture in enumerate(setting.pictures())
    ]
    config = parse_section(
        TrainConfig,
        {
            "policy": setting.folder,
            "device": "cpu",
            "steps": setting.steps,
            "data": {
                "source": "python",
                "prompts_per_step": {"generate": 0, "understand": PROMPTS, "edit": 0, "reason": 0},
            },
            "rollout": {"group_size": GROUP_SIZE, "max_new_tokens": setting.new_tokens},
            "rewards": [{"name": "python:variety", "label": "variety"}],
            "text": {"kl_coef": 0.0, "clip_high": 0.2},
            "advantages": {"kind": "grpo"},
            "optimizer": {"kind": "adamw", "adamw_lr": 1e-6, "warmup_steps": 0},
            "validation": {"every": 1000, "prompts": {"understand": 1}},
            "reference_eval_every": 1000,
            "samples_every": 1000,
            "checkpoint_every": 1000,
        },
        "benchmark",
    )
    reward: Any = as_reward(variety)
    custom = CustomParts({"train": PromptList(prompts)}, {"variety": reward()})
    trainer = Trainer.start(config, folder / "ours", custom=custom)
    ends: list[float] = []
    tokens: list[float] = []

    def observe(row: Any) -> None:
        ends.append(time.process_time())

    policy: Any = trainer.state.policies.policy
    sample = policy.sample

    def counted(*args: Any) -> Any:
        groups = sample(*args)
        tokens.extend(len(t.segments[0].tokens) for group in groups for t in group.trajectories)
        return groups

    policy.sample = counted
    with trainer.run:
        trainer.train(observe)
    return Timing(_median_step(ends), statistics.mean(tokens))


def trl(setting: Setting, folder: Path) -> Timing:
    """Steps of TRL's trainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rows = Dataset.from_dict({
        "prompt": [[{"role": "user", "content": question}] for question in QUESTIONS],
        "image": [to_pil(picture) for picture in setting.pictures()],
    })  # fmt: skip
    ends: list[float] = []
    tokens: list[float] = []

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ends.append(time.process_time())

    def reward(completions: Any, completion_ids: Any, **_: Any) -> list[float]:
        tokens.extend(map(len, completion_ids))
        return [variety(chat[0]["content"]) for chat in completions]

    model = transformers.AutoModelForImageTextToText.from_pretrained(setting.folder, dtype=torch.float32)
    model.generation_config = transformers.GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        processing_class=transformers.AutoProcessor.from_pretrained(setting.folder),
        train_dataset=rows,
        args=GRPOConfig(
            output_dir=str(folder / "trl"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=PROMPTS * GROUP_SIZE,
            num_generations=GROUP_SIZE,
            max_completion_length=setting.new_tokens,
            max_steps=setting.steps,
            beta=0.0,
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            learning_rate=1e-6,
        ),
        callbacks=[Watch()],
    )
    trainer.train()
    return Timing(_median_step(ends), statistics.mean(tokens))


def _median_step(ends: Sequence[float]) -> float:
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return statistics.median(seconds[:-1])


def compare(side: int, new_tokens: int, steps: int, rounds: int) -> dict[str, Any]:
    """Both programs in turn, at one size. Any: JSON."""
    with tempfile.TemporaryDirectory() as name, without_videos(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_vlm("qwen3_vl", Path(name) / "model", width=128, depth=6, vocabulary=2048, max_pixels=side**2)
        setting = Setting(str(model), side, new_tokens, steps)
        found: dict[str, list[Timing]] = {"ours": [], "trl": []}
        for n in range(rounds):
            found["ours"].append(ours(setting, Path(name) / str(n)))
            found["trl"].append(trl(setting, Path(name) / str(n)))
    ratios = [other.seconds / own.seconds for own, other in zip(found["ours"], found["trl"], strict=True)]
    return {
        "side": side,
        "image_tokens": (side // 8) ** 2,
        "new_tokens": new_tokens,
        **{name: [asdict(timing) for timing in timings] for name, timings in found.items()},
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, nargs="+", default=[64, 128], help="of pictures; 8 x 8 pixels are a token")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    torch.set_num_threads(1)
    found = []
    for side in options.side:
        row = compare(side, options.new_tokens, options.steps, options.rounds)
        found.append(row)
        print(f"{row['image_tokens']} image tokens, answers of at most {row['new_tokens']}:")
        for name in ("ours", "trl"):
            parts = ", ".join(f"{t['seconds']:.2f} s a step ({t['tokens']:.1f} tokens)" for t in row[name])
            print(f"  {name}: {parts}")
        print(f"  ratio: {', '.join(f'{ratio:.2f}' for ratio in row['ratios'])}")
    if options.json is not None:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**machine, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
