"""Steps of flow_grpo's training script (scripts/train_sd3.py) and of lvrpo's trainer on one pipeline, for ``peers.py``.

Both draw a group per prompt with stochastic steps and train all recorded steps but the last with the clipped objective,
guided, in one batch and one update: AdamW on all weights of the transformer, no KL term, a gradient through the
conditional branch alone. The script runs as it is: its sampling, its statistics per prompt, its loop over timesteps.
Replaced are what it reports to (wandb), its command line (absl, ml_collections), the worker processes of its data
loaders, and its rewards, which need weights. Its prompts are as long as lvrpo's: 256 tokens of T5 instead of 128.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import runpy
import statistics
import sys
import time
import types
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lvrpo.config import parse_section
from lvrpo.rewards.function import as_reward
from lvrpo.training.components import CustomComponents, PromptList
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer
from lvrpo.types import Image, Prompt

SCRIPT = "scripts/train_sd3.py"
T5_TOKENS = 256
GUIDANCE, NOISE_LEVEL, LEARNING_RATE = 4.5, 0.7, 1e-6


@dataclass(frozen=True)
class FlowSetting:
    """Of one comparison."""

    folder: str
    """A StableDiffusion3Pipeline."""
    side: int
    """Of images, in pixels."""
    prompts: Sequence[str]
    group_size: int
    num_steps: int
    """Of the flow; all but the last are trained."""
    steps: int
    """Of training; the first and the last are not timed."""


def brightness(image: Image) -> float:
    """A reward that spreads: images of a random model differ by little."""
    return 1000 * float(image.mean())


def lvrpo_step(setting: FlowSetting, scratch: Path) -> float:
    """Median processor seconds of a step, its records included."""
    prompts = [Prompt(f"p{i}", "generate", (text,), ("image",)) for i, text in enumerate(setting.prompts)]
    config = parse_section(
        TrainConfig,
        {
            "policy": setting.folder,
            "device": "cpu",
            "steps": setting.steps,
            "data": {
                "source": "python",
                "prompts_per_step": {"generate": len(prompts), "understand": 0, "edit": 0, "reason": 0},
            },
            "rollout": {
                "group_size": setting.group_size, "num_steps": setting.num_steps, "solver": "euler",
                "sampler": "flow_sde", "noise_level": NOISE_LEVEL, "window": {"kind": "full"},
                "guidance_scale": GUIDANCE,
                "guided_logprobs": "detach_uncond", "image_size": [setting.side, setting.side],
            },
            "rewards": [{"name": "python:brightness", "label": "brightness"}],
            "advantages": {"kind": "grpo", "std": "batch"},
            "flow": {"kind": "flow_grpo", "kl_coef": 0.0, "top_bottom_k": setting.group_size // 2},
            "optimizer": {"kind": "adamw", "adamw_lr": LEARNING_RATE, "warmup_steps": 0},
            "validation": {"every": 1000, "prompts": {"generate": 1}},
            "reference_eval_every": 1000,
            "samples_every": 1000,
            "checkpoint_every": 1000,
        },
        "benchmark",
    )  # fmt: skip
    reward: Any = as_reward(brightness)
    custom = CustomComponents({"train": PromptList(prompts)}, {"brightness": reward()})
    trainer = Trainer.start(config, scratch / "ours", custom=custom)
    ends: list[float] = []
    with trainer.run:
        trainer.train(lambda row: ends.append(time.process_time()))
    return median_step(ends)


def median_step(ends: Sequence[float]) -> float:
    """From the ends of all steps; the last step, which also ends the run, is left out."""
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return statistics.median(seconds[:-1])


class _DoneError(Exception):
    """Ends the loop of the script, which has no end."""


class _Settings(types.SimpleNamespace):
    """Stands in for ml_collections.ConfigDict."""


def flow_grpo_step(setting: FlowSetting, repository: Path, scratch: Path) -> float:
    """Median processor seconds of a step: one rollout of all prompts and one update."""
    scratch.mkdir(parents=True, exist_ok=True)
    lines = "".join(f"{prompt}\n" for prompt in setting.prompts)
    (scratch / "train.txt").write_text(lines)
    (scratch / "test.txt").write_text(f"{setting.prompts[0]}\n")
    script = _script(repository)
    script.FLAGS = types.SimpleNamespace(config=_config(setting, repository, scratch))
    ends: list[float] = []

    class Sampler(script.DistributedKRepeatSampler):
        """Notes where an epoch begins, which is where the one before has ended."""

        def set_epoch(self, epoch: int) -> None:
            ends.append(time.process_time())
            if len(ends) > setting.steps:
                raise _DoneError
            super().set_epoch(epoch)

    def scored(images: torch.Tensor, *_: Any, **__: Any) -> tuple[dict[str, list[float]], dict[str, Any]]:
        return {"avg": [brightness(image.float()) for image in images]}, {}

    script.DistributedKRepeatSampler = Sampler
    script.flow_grpo.rewards.multi_score = lambda device, config: scored
    with suppress(_DoneError), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        script.main(None)
    return median_step(ends[1:])


def _script(repository: Path) -> Any:
    """The module of the script, with stand-ins for what it imports and does not need here. Any: code of the user."""

    def stand_in(name: str, **content: Any) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(content)
        sys.modules[name] = module

    nothing = types.SimpleNamespace(FLAGS=None, DEFINE_config_file=lambda *_, **__: None)
    stand_in("absl", app=nothing, flags=nothing)
    stand_in("ml_collections", ConfigDict=_Settings, config_flags=nothing)
    silent = dict.fromkeys(("init", "log", "Image"), lambda *_, **__: None)
    stand_in("wandb", **silent)
    sys.path.insert(0, str(repository))
    stand_in("flow_grpo.rewards")
    package: Any = importlib.import_module("flow_grpo")
    package.rewards = sys.modules["flow_grpo.rewards"]
    spec = importlib.util.spec_from_file_location("flow_grpo_train_sd3", repository / SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    load, embed = script.DataLoader, script.compute_text_embeddings
    script.DataLoader = lambda *args, **kwargs: load(*args, **{**kwargs, "num_workers": 0})
    script.compute_text_embeddings = lambda *args, **kwargs: embed(
        *args, **{**kwargs, "max_sequence_length": T5_TOKENS}
    )
    script.tqdm = lambda rows, **_: rows
    return script


def _config(setting: FlowSetting, repository: Path, scratch: Path) -> Any:
    """The script's default configuration at the sizes of a comparison. Any: a class of the script's."""
    config = runpy.run_path(str(repository / "config/base.py"))["get_config"]()
    config.logdir, config.save_dir, config.dataset = str(scratch), str(scratch), str(scratch)
    config.pretrained.model, config.resolution = setting.folder, setting.side
    config.mixed_precision, config.use_lora, config.prompt_fn = "no", False, "general_ocr"
    config.eval_freq = config.save_freq = 10**9  # it evaluates once, before the first step
    images = len(setting.prompts) * setting.group_size
    sample, train = config.sample, config.train
    sample.num_steps, sample.eval_num_steps, sample.guidance_scale = setting.num_steps, 1, GUIDANCE
    sample.noise_level, sample.num_image_per_prompt, sample.num_batches_per_epoch = NOISE_LEVEL, setting.group_size, 1
    sample.train_batch_size = train.batch_size = images
    train.timestep_fraction = (setting.num_steps - 1) / setting.num_steps + 1e-6
    train.learning_rate = LEARNING_RATE
    return config
