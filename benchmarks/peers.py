"""Steps of lvrpo against those of other programs on a CPU, one thread: the ratio of processor times, in one run.

    OMP_NUM_THREADS=1 python benchmarks/peers.py [--work text image janus draw train] [--bagel DIR]
        [--flow-grpo DIR] [--image-tokens 16 256 1024] [--new-tokens 16 64 256] [--rounds 3] [--json FILE]

text      a GRPO step of 16 questions x 8 answers, by TRL's GRPOTrainer (``pip install trl``)
image   a GRPO step of 4 questions about an image each x 8 answers of at most 32 tokens, by the same
janus     a group of 8 guided images of a Janus, by ``generate`` of transformers, called for one image after another
          and for all at once (lvrpo also scores them); and the replay of a group with its update, by the same code for
          one image at a time
draw      a group of 8 drawings of a BAGEL in ten guided steps, by the official inferencer, one after another
train     a step of a Stable Diffusion 3: a group of 8 drawings in five guided steps, four of them trained, by the
          training script of flow_grpo

Both sides of a row have the same small random model in float32, the same prompts, sizes and number of steps, and run in
this process in turn; a ratio above 1 is for lvrpo. In ``text`` and ``image`` both run their trainers: one update a
rollout, AdamW, no KL term, all answers in one batch; a step is timed from the end of the one before, the first and the
last are left out. ``--bagel`` is a clone of github.com/ByteDance-Seed/Bagel, whose code runs and needs einops.
FlashAttention, which it imports, is replaced by torch's attention, and its casts to bfloat16 by none. ``--flow-grpo``
is a clone of github.com/yifan123/flow_grpo, of which ``flow_grpo_steps.py`` runs the script.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bagel_step import make_policy, make_prompts
from flow_grpo_steps import SCRIPT, FlowSetting, flow_grpo_step, lvrpo_step, median_step
from janus_group import draw_group, update_group
from safetensors.torch import load_file
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "doubles"))
from small_vlm import create_vlm, without_videos

from lvrpo.config import parse_section
from lvrpo.images import to_pil
from lvrpo.policies.bagel.create import BagelSizes
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Sampling
from lvrpo.policies.diffusers_flow.create import PipelineSizes, create_pipeline
from lvrpo.rewards.function import as_reward
from lvrpo.training.components import CustomComponents, PromptList
from lvrpo.training.config import TrainConfig
from lvrpo.training.trainer import Trainer
from lvrpo.types import Image, Parts, Prompt

GROUP_SIZE, STEPS = 8, 10
PROMPTS = {"text": 16, "image": 4}
QUESTIONS = tuple(
    f"{question}{end}"
    for end in ("", " now", " is it", " a circle")
    for question in ("what color is it", "is it a red circle", "yes or no", "a blue square above it")
)


WORKS = ("text", "image", "janus", "draw", "train")
ANSWER_STEPS = 5
"""Of a training run; the first and the last are not timed."""
TRAIN_STEPS = 5
"""Of the flow in ``train``."""


@dataclass
class Pair:
    """Processor seconds of both sides, in turn."""

    ours: list[float] = field(default_factory=list)
    peer: list[float] = field(default_factory=list)


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
    """Of images, of which 8 x 8 pixels are a token; 0: there are none."""
    new_tokens: int
    steps: int

    @property
    def questions(self) -> Sequence[str]:
        return QUESTIONS[: PROMPTS["image" if self.side else "text"]]

    def images(self) -> list[Image]:
        generator = torch.Generator().manual_seed(0)
        return [torch.rand(3, self.side, self.side, generator=generator) for _ in self.questions if self.side]


def variety(text: str) -> float:
    """A reward that spreads: the share of different characters."""
    return len(set(text)) / max(1, len(text))


def ours(setting: Setting, folder: Path) -> Timing:
    """Steps of a run of lvrpo, its records included."""
    parts: list[Parts] = [(question,) for question in setting.questions]
    if setting.side:
        parts = [(image, *own) for image, own in zip(setting.images(), parts, strict=True)]
    prompts = [Prompt(f"p{i}", "understand", own, ("text",)) for i, own in enumerate(parts)]
    config = parse_section(
        TrainConfig,
        {
            "policy": setting.folder,
            "device": "cpu",
            "steps": setting.steps,
            "data": {
                "source": "python",
                "prompts_per_step": {"generate": 0, "understand": len(prompts), "edit": 0, "reason": 0},
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
    custom = CustomComponents({"train": PromptList(prompts)}, {"variety": reward()})
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
    return Timing(median_step(ends), statistics.mean(tokens))


def trl(setting: Setting, folder: Path) -> Timing:
    """Steps of TRL's trainer."""
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    columns: dict[str, list[Any]] = {"prompt": [[{"role": "user", "content": q}] for q in setting.questions]}
    if setting.side:
        columns["image"] = [to_pil(image) for image in setting.images()]
    rows = Dataset.from_dict(columns)
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
            per_device_train_batch_size=len(setting.questions) * GROUP_SIZE,
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
    return Timing(median_step(ends), statistics.mean(tokens))


# --- answers: TRL ---


def answers(side: int, new_tokens: int, rounds: int) -> Pair:
    """GRPO steps of a Qwen3-VL of 1.2 million parameters, by both trainers."""
    pair = Pair()
    with tempfile.TemporaryDirectory() as name, without_videos(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = create_vlm(
            "qwen3_vl", Path(name) / "model", width=128, depth=6, vocabulary=2048, max_pixels=max(side, 64) ** 2,
            positions=2048,
        )  # fmt: skip
        setting = Setting(str(model), side, new_tokens, ANSWER_STEPS)
        for n in range(rounds):
            pair.ours.append(ours(setting, Path(name) / str(n)).seconds)
            pair.peer.append(trl(setting, Path(name) / str(n)).seconds)
    return pair


# --- images: BAGEL's inferencer ---


def draw(side: int, folder: Path, rounds: int) -> Pair:
    """Images of a BAGEL of width 256 and 6 layers; 16 x 16 pixels are a token."""
    policy = make_policy(BagelSizes(width=256, depth=6, mlp_width=512, image_size=side))
    prompt = next(p for p in make_prompts(64) if p.task == "generate")
    sampling = Sampling(
        group_size=GROUP_SIZE, num_steps=STEPS, solver="euler", guidance_scale=4.0, guidance_renorm="global",
        timestep_shift=3.0, image_size=(side, side),
    )  # fmt: skip
    official = official_inferencer(policy, folder)
    text = next(part for part in prompt.parts if isinstance(part, str))
    asked = {"cfg_text_scale": 4.0, "cfg_img_scale": 1.0, "cfg_interval": [0.0, 1.0], "timestep_shift": 3.0}

    def peer() -> None:
        for _ in range(GROUP_SIZE):  # it makes one image a call
            official(text=text, num_timesteps=STEPS + 1, image_shapes=(side, side), **asked)

    return in_turn(lambda: policy.sample([prompt], sampling, [0]), peer, rounds)


def official_inferencer(policy: BagelPolicy, folder: Path) -> Any:
    """BAGEL's InterleaveInferencer around the weights of a policy. Any: a class of the folder."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def frequencies(config: Any, device: Any = None, **_: Any) -> tuple[torch.Tensor, float]:
        """What transformers 4 calls the default rotary embedding."""
        width = config.hidden_size // config.num_attention_heads
        return config.rope_theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width), 1.0

    ROPE_INIT_FUNCTIONS.setdefault("default", frequencies)
    sys.modules["flash_attn"] = flash = types.ModuleType("flash_attn")
    flash.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    flash.__dict__["flash_attn_varlen_func"] = varlen_attention
    sys.path.insert(0, str(folder))
    transformers.PretrainedConfig.pad_token_id = None  # which transformers 5 does not set
    official: Any = importlib.import_module("modeling.bagel")
    vae_module: Any = importlib.import_module("modeling.autoencoder")
    inferencer: Any = importlib.import_module("inferencer")
    for name in [name for name in sys.modules if name.startswith("modeling.") or name == "inferencer"]:
        if hasattr(sys.modules[name], "torch"):
            sys.modules[name].__dict__["torch"] = InFloat32()
        if hasattr(sys.modules[name], "tqdm"):
            sys.modules[name].__dict__["tqdm"] = lambda steps, **_: steps
    with tempfile.TemporaryDirectory() as name:
        policy.save(Path(name))
        llm = official.Qwen2Config.from_json_file(f"{name}/llm_config.json")
        llm.qk_norm, llm.tie_word_embeddings, llm.layer_module = True, False, "Qwen2MoTDecoderLayer"
        vit = official.SiglipVisionConfig.from_json_file(f"{name}/vit_config.json")
        vit.rope, vit.num_hidden_layers = False, policy.config.vit.depth
        weights, vae_weights = load_file(f"{name}/ema.safetensors"), load_file(f"{name}/ae.safetensors")
    own = policy.config.vae
    params = vae_module.AutoEncoderParams(
        resolution=256, in_channels=3, downsample=own.downsample, ch=own.width, out_ch=3, ch_mult=list(own.multipliers),
        num_res_blocks=own.res_blocks, z_channels=own.channels, scale_factor=own.scale, shift_factor=own.shift,
    )  # fmt: skip
    vae = vae_module.AutoEncoder(params)
    vae.load_state_dict(vae_weights)
    config = official.BagelConfig(
        llm_config=llm, vit_config=vit, vae_config=params, latent_patch_size=policy.config.latent_patch,
        max_latent_size=policy.config.latent_side,
        vit_max_num_patch_per_side=round(len(weights["vit_pos_embed.pos_embed"]) ** 0.5),
    )  # fmt: skip
    model = official.Bagel(official.Qwen2ForCausalLM(llm), official.SiglipVisionModel(vit), config)
    model.vit_model.vision_model.embeddings.convert_conv2d_to_linear(vit)
    model.load_state_dict(weights)
    tokenizer = policy.tokenizer
    ids = {
        "bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id,
        "start_of_image": tokenizer.image_start_id, "end_of_image": tokenizer.image_end_id,
    }  # fmt: skip
    return inferencer.InterleaveInferencer(model.eval(), vae.eval(), tokenizer, None, None, ids)


class InFloat32:
    """torch for code that casts to bfloat16 by itself, so that both sides compute in float32."""

    bfloat16 = torch.float32

    def autocast(self, *_: object, **__: object) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)  # Any: all of torch


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool = False,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention's function by torch's attention, sequence by sequence; a causal mask ends at the last key."""
    out = []
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        own, keys, values = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
        queries, places = own.shape[1], keys.shape[1]
        mask = torch.ones(queries, places, dtype=torch.bool).tril(places - queries) if causal else None
        attended = functional.scaled_dot_product_attention(
            own[None], keys[None], values[None], attn_mask=mask, enable_gqa=True
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out)


# --- sample and train: flow_grpo's script ---


def train(side: int, repository: Path, rounds: int) -> Pair:
    """Steps of a Stable Diffusion 3 of width 128 and 4 layers, by both trainers; 16 x 16 pixels are a token."""
    pair = Pair()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = PipelineSizes(width=128, depth=4, heads=4, text_width=128, vae_stride=8, image_size=side)
        create_pipeline("sd3-tiny", sizes, Path(name) / "model")
        setting = FlowSetting(
            str(Path(name) / "model"),
            side,
            ("a red circle above a blue square",),
            GROUP_SIZE,
            TRAIN_STEPS,
            ANSWER_STEPS,
        )
        for n in range(rounds):
            pair.ours.append(lvrpo_step(setting, Path(name) / str(n)))
            pair.peer.append(flow_grpo_step(setting, repository, Path(name) / str(n)))
    return pair


# --- the table ---


def in_turn(own: Callable[[], object], peer: Callable[[], object], rounds: int) -> Pair:
    """Processor seconds of each in turn, after one call of each."""
    pair = Pair()
    for n in range(rounds + 1):
        for call, into in ((own, pair.ours), (peer, pair.peer)):
            start = time.process_time()
            call()
            if n:
                into.append(time.process_time() - start)
    return pair


def rows_of(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Pair]]]:
    """The rows that were asked for; says in one line what cannot be run."""
    sides = [8 * math.isqrt(tokens) for tokens in options.image_tokens]
    missing = {
        "text": missing_packages("trl", "datasets"),
        "image": missing_packages("trl", "datasets"),
        "janus": missing_packages("transformers"),
        "draw": missing_packages("einops", "transformers") or missing_folder("--bagel", options.bagel, "inferencer.py"),
        "train": missing_packages("accelerate", "diffusers", "peft")
        or missing_folder("--flow-grpo", options.flow_grpo, SCRIPT),
    }
    for work in options.work:
        if missing[work]:
            print(f"{work}: not run: {missing[work]}", flush=True)
        elif work == "text":
            for new in options.new_tokens:
                yield f"text, {new} new tokens", partial(answers, 0, new, options.rounds)
        elif work == "image":
            for tokens, side in zip(options.image_tokens, sides, strict=True):
                yield f"image, {tokens} image tokens, 32 new ones", partial(answers, side, 32, options.rounds)
        elif work == "janus":
            for tokens, side in zip(options.image_tokens, sides, strict=True):
                name, rounds = f"janus, {tokens} image tokens", options.rounds
                yield f"{name}, one a call", lambda s=side, r=rounds: in_turn(*draw_group(s, GROUP_SIZE, GROUP_SIZE), r)
                yield f"{name}, one call", lambda s=side, r=rounds: in_turn(*draw_group(s, GROUP_SIZE, 1), r)
                yield f"{name}, update", lambda s=side, r=rounds: in_turn(*update_group(s, GROUP_SIZE), r)
        elif work == "train":
            for tokens, side in zip(options.image_tokens, sides, strict=True):
                yield f"train, {tokens} image tokens", partial(train, 2 * side, options.flow_grpo, options.rounds)
        else:
            for tokens, side in zip(options.image_tokens, sides, strict=True):
                yield f"draw, {tokens} image tokens", partial(draw, 2 * side, options.bagel, options.rounds)


def missing_packages(*names: str) -> str:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"pip install {' '.join(absent)}" if absent else ""


def missing_folder(option: str, folder: Path | None, holds: str) -> str:
    if folder is None:
        return f"give a clone of its repository ({option} DIR)"
    return "" if (folder / holds).exists() else f"{option} {folder}: holds no {holds}: give a clone of its repository"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--bagel", type=Path, metavar="DIR")
    parser.add_argument("--flow-grpo", type=Path, metavar="DIR")
    parser.add_argument("--image-tokens", type=int, nargs="+", default=[16, 256, 1024], help="squares of even numbers")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if odd := [n for n in options.image_tokens if n < 4 or math.isqrt(n) ** 2 != n or math.isqrt(n) % 2]:
        parser.error(f"--image-tokens {odd[0]}: must be the square of an even number, such as 256")
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    torch.set_num_threads(1)
    found = []
    print(f"{'work':42} {'lvrpo, s':>9} {'peer, s':>9} {'ratio':>6}  ratios of neighbors")
    for name, call in rows_of(options):
        pair = call()
        ratios = [peer / own for own, peer in zip(pair.ours, pair.peer, strict=True)]
        found.append({"work": name, **asdict(pair), "ratio": statistics.median(ratios)})
        own, peer, ratio = (statistics.median(values) for values in (pair.ours, pair.peer, ratios))
        print(f"{name:42} {own:9.3f} {peer:9.3f} {ratio:6.2f}  {min(ratios):.2f} to {max(ratios):.2f}", flush=True)
    if options.json is not None:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        options.json.write_text(json.dumps({**machine, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
