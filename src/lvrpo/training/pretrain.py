"""Supervised pretraining on the built-in corpus, optionally with representation alignment (REPA, arXiv:2410.06940).

REPA aligns hidden states of the generation expert on a noisy image with features of the clean image from the
understanding side of a frozen copy of the initial policy; no external encoder is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from lvrpo.algorithms import repa_loss
from lvrpo.config import Config, Natural
from lvrpo.data.scenes import (
    VOCABULARY,
    CleanPrompts,
    CleanPromptsConfig,
    CorpusConfig,
    ScenePrompts,
    ScenesConfig,
    WebCorpus,
    web_corpus,
)
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy, Sampling, SupervisedPolicy
from lvrpo.policies.image_tokens import ImageTokenPolicy
from lvrpo.policies.loading import load_policy, pick_device, policy_folder, possible_tasks
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.tiny import TinyConfig, TinyPolicy
from lvrpo.reading import structure_errors
from lvrpo.rewards.success import successes
from lvrpo.sampling import derive_seed
from lvrpo.training.base_trainer import BaseTrainer, Observer, require_start, save_start
from lvrpo.training.checkpoint import (
    STATE,
    fingerprint,
    load_state,
    save_state,
    verify_checkpoint,
)
from lvrpo.training.memory import keep_freed_memory
from lvrpo.training.optimizer import OptimizerConfig, Optimizers, optimizer_moments, set_optimizer_moments, update_ema
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.trackers import AnyTracker, require_trackers, start_trackers
from lvrpo.types import Example, Image, Prompt, TaskKind

HEAD_WIDTH = 256
"""Hidden width of the projection head of representation alignment, which is not saved with the policy."""


class RepresentationConfig(Config):
    """Representation alignment."""

    hints: ClassVar[Mapping[str, str]] = {"head_width": "is gone: the projection head has a width of 256"}
    weight: float = Field(default=0.0, ge=0)
    """Weight of the REPA loss; 0: off. About 0.5 in the paper."""
    layer: int = Field(default=2, ge=1)
    """Layer of the generation expert whose hidden states are aligned ..."""
    target_layer: int = Field(default=0, ge=0)
    """... to those of this layer of the frozen teacher; 0: the output of its image encoder."""


class Representation(nn.Module):
    """The REPA projection head, its optimizer and the frozen teacher; called by ``MoTPolicy.supervised_losses``."""

    def __init__(self, config: RepresentationConfig, policy: MoTPolicy, lr: float, seed: int) -> None:
        super().__init__()
        depth = policy.transformer.config.depth
        if max(config.layer, config.target_layer) > depth:
            raise InputError(
                f"representation.layer={config.layer}, target_layer={config.target_layer}: the policy has {depth} "
                f"layers: use at most {depth}"
            )
        self.config = config
        self.layer = config.layer
        self.teacher = policy.make_reference()
        width = policy.transformer.config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Sequential(nn.Linear(width, HEAD_WIDTH), nn.SiLU(), nn.Linear(HEAD_WIDTH, width)).to(
                policy.device
            )
        self.lr = lr
        self.named = [(name, p) for name, p in self.head.named_parameters()]
        self.optimizer = torch.optim.AdamW([p for _, p in self.named], lr=lr, weight_decay=0.0)

    def forward(self, features: Tensor, images: Sequence[Image]) -> Tensor:
        """Hidden states (B, N, D) on noisy images, and the clean images, to a loss per image (B,)."""
        targets = self.teacher.image_features(images, self.config.target_layer)
        return repa_loss(self.head(features), targets)

    def step(self, rate: float) -> None:
        """Steps the head at ``rate`` times its learning rate, unless a gradient is not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
        if all(p.grad is None or bool(p.grad.isfinite().all()) for _, p in self.named):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """State for a checkpoint; the teacher is the initial policy of the run."""
        return {"head": dict(self.head.state_dict()), "optimizer": optimizer_moments([self.optimizer], self.named)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restores ``state``."""
        self.head.load_state_dict(dict(state["head"]))
        set_optimizer_moments([self.optimizer], self.named, state["optimizer"])


Kind = Literal["generate", "caption", "question", "edit", "reason"]


Count = Annotated[int, Field(le=100_000)]
"""A number of prompts or rows of a kind."""


class PretrainOptimizerConfig(OptimizerConfig):
    """``OptimizerConfig`` with defaults for training from scratch."""

    adamw_lr: float = Field(default=2e-3, gt=0)
    """Learning rate of parameters that are no matrices of layers."""
    muon_lr: float = Field(default=0.02, gt=0)
    """Learning rate of matrices of layers."""
    warmup_steps: int = Field(default=50, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    decay_start: float = Field(default=0.5, ge=0, le=1)
    """Share of the run after which the learning rate decays linearly."""
    final_lr: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end, as a share of the full one."""


class PretrainConfig(Config):
    """A supervised run."""

    hints: ClassVar[Mapping[str, str]] = {"average_decay": "is called ema_decay"}

    name: str = Field(default="tiny-base", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its default folder is runs/NAME."""
    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, batches and noise."""
    init: str | None = None
    """Initial policy (continued pretraining): a folder, a run or a built-in name; None: random weights."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""
    policy: TinyConfig = TinyConfig()
    rows: Literal["corpus", "prompts"] = "corpus"
    """corpus: a noisy web-like corpus; prompts: training prompts with their correct outputs, from an oracle."""
    corpus: CorpusConfig = CorpusConfig()
    prompts: CleanPromptsConfig = CleanPromptsConfig()
    """The rows of ``rows: prompts``; image size and questions per image are those of ``corpus``."""
    steps: int = Field(default=6000, ge=1, le=10_000_000)
    """Optimizer steps."""
    batch: dict[Kind, Count] = Field(
        default={"generate": 40, "caption": 12, "question": 64, "edit": 20, "reason": 16}, min_length=1
    )
    """Rows of each kind per step; consecutive questions share an image."""
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping the text of an image generation row, for classifier-free guidance. BAGEL uses the rates
    in its config.json instead of this one and the next."""
    picture_dropout: float = Field(default=0.05, ge=0, lt=1)
    """Probability of dropping the source image of an edit instead, for image guidance."""
    text_weight: float = Field(default=0.5, ge=0)
    """Weight of the text cross-entropy in the loss."""
    image_weight: float = Field(default=5.0, ge=0)
    """Weight of the flow-matching loss of images in the loss."""
    representation: RepresentationConfig = RepresentationConfig()
    optimizer: PretrainOptimizerConfig = PretrainOptimizerConfig()
    ema_decay: float = Field(default=0.998, ge=0, lt=1)
    """Decay of the EMA weights, which are saved (smaller at the start)."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of PyTorch in each process."""
    held_out_every: int = Field(default=500, ge=0)
    """Steps between two validations of the EMA weights on held-out prompts; 0: never."""
    held_out: dict[TaskKind, Natural] = Field(default={"generate": 210, "understand": 600, "edit": 150, "reason": 210})
    """Held-out prompts of each task, on which the result is measured."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""
    trackers: tuple[AnyTracker, ...] = ()
    """Trackers that show the run, such as [{kind: tensorboard}, {kind: wandb, mode: offline}]."""

    @model_validator(mode="after")
    def _rows_to_draw_from(self) -> Self:
        corpus = self.corpus
        rows: dict[str, int] = {
            "generate": corpus.scenes,
            "caption": corpus.scenes,
            "edit": corpus.edits,
            "reason": corpus.reasons,
            "question": corpus.scenes * corpus.questions_per_scene,
        }
        if self.rows == "prompts":
            counts = self.prompts.counts
            rows = {"question": counts.get("understand", 0), **counts}
        for kind, count in self.batch.items():
            run = corpus.questions_per_scene if kind == "question" else 1
            if count < 0 or (count and rows.get(kind, 0) < max(run, 1)):
                what = "the corpus has" if self.rows == "corpus" else "the prompts have"
                raise ValueError(f"batch.{kind}={count}: {what} no such rows; use 0, or give some")
        if not any(self.batch.values()):
            raise ValueError("batch: give at least one kind of row a positive number")
        if self.condition_dropout + self.picture_dropout > 1:
            raise ValueError(f"picture_dropout={self.picture_dropout}: with condition_dropout it has to be at most 1")
        if self.representation.weight and self.init is None:
            raise ValueError("representation.weight needs a understanding side that has learned to read: set init")
        return self


class SupervisedState:
    """The supervised training step and its mutable state."""

    def __init__(self, config: PretrainConfig, policy: SupervisedPolicy, corpus: WebCorpus | CleanPrompts) -> None:
        self.config = config
        self.policy = policy
        assert isinstance(policy, nn.Module)
        self.weights: nn.Module = policy
        self.average = average = policy.make_reference()
        assert isinstance(average, nn.Module)
        self.average_weights: nn.Module = average
        self.rows: dict[str, Sequence[Example]] = {kind: getattr(corpus, kind) for kind in config.batch}
        self.optimizers = Optimizers(policy, config.optimizer, config.steps)
        self.step = 0
        self.seconds = 0.0
        self.representation: Representation | None = None
        if config.representation.weight:
            seed = derive_seed(config.seed, "representation") % 2**32
            lr = config.optimizer.adamw_lr
            assert isinstance(policy, MoTPolicy)
            self.representation = Representation(config.representation, policy, lr, seed)
        self._orders: dict[tuple[str, int], np.ndarray] = {}

    def train_step(self) -> dict[str, float]:
        """One update, and its losses and gradient norms; everything random is a function of (seed, step)."""
        step = self.step
        generator = torch.Generator().manual_seed(derive_seed(self.config.seed, "supervised", step) % 2**32)
        losses = self.policy.supervised_losses(self.batch(step), generator, self.representation)
        loss = sum(
            weight * losses[name]
            for name, weight in (("text", self.config.text_weight), ("image", self.config.image_weight))
            if name in losses
        )
        assert isinstance(loss, torch.Tensor)
        if "representation" in losses:
            loss = loss + self.config.representation.weight * losses["representation"]
        loss.backward()
        norms = self.optimizers.step(step)
        if self.representation is not None:
            self.representation.step(self.optimizers.rate(step))
        self.step += 1
        update_ema(self.average_weights, self.weights, min(self.config.ema_decay, step / (step + 10)))
        row = {f"loss/{name}": float(value.detach()) for name, value in losses.items()}
        return row | {f"grad_norm/{expert}": norm for expert, norm in norms.items()}

    @property
    def best_steps(self) -> set[int]:
        """Empty: the last weights are the result."""
        return set()

    def write(self, folder: Path) -> None:
        """Writes the EMA policy in Hub layout, and the training state below it."""
        self.average.save(folder)
        (folder / STATE).mkdir()
        tree = {
            "step": self.step,
            "seconds": self.seconds,
            "policy": dict(self.weights.state_dict()),
            "average": dict(self.average_weights.state_dict()),
            "moments": self.optimizers.moments(),
        }
        if self.representation is not None:
            tree["representation"] = self.representation.state()
        save_state(folder / STATE, tree)

    def load(self, checkpoint: Path) -> None:
        """Restores a checkpoint; raises InputError if it is damaged."""
        verify_checkpoint(checkpoint)
        tree = load_state(checkpoint / STATE, finite=True)
        with structure_errors(str(checkpoint / STATE / "state.json"), "use another checkpoint"):
            self.weights.load_state_dict(dict(tree["policy"]))
            self.average_weights.load_state_dict(dict(tree["average"]))
            self.optimizers.set_moments(tree["moments"])
            if self.representation is not None:
                self.representation.load(tree["representation"])
            self.step, self.seconds = int(tree["step"]), float(tree["seconds"])

    def batch(self, step: int) -> list[Example]:
        """The rows of a step; each kind is shuffled separately in every epoch."""
        config = self.config
        rng = np.random.default_rng(derive_seed(config.seed, "condition dropout", step))
        out: list[Example] = []
        for kind, count in config.batch.items():
            if not count:
                continue
            rows = self.rows[kind]
            run = self._run_length(kind)
            units = len(rows) // run
            for j in range(step * count // run, (step + 1) * count // run):
                unit = int(self._order(kind, j // units)[j % units])
                out += rows[unit * run : (unit + 1) * run]
        if isinstance(self.policy, MoTPolicy) and self.policy.has_condition_dropout:
            return out
        return [self._with_dropout(e, rng) if e.prompt.output == ("image",) else e for e in out]

    def _with_dropout(self, example: Example, rng: np.random.Generator) -> Example:
        draw = rng.random()
        if draw < self.config.condition_dropout:
            return replace(example, dropped="text")
        if example.prompt.task == "edit" and draw < self.config.condition_dropout + self.config.picture_dropout:
            return replace(example, dropped="image")
        return example

    def _run_length(self, kind: str) -> int:
        return self.config.corpus.questions_per_scene if kind == "question" else 1

    def _order(self, kind: str, epoch: int) -> np.ndarray:
        key = (kind, epoch)
        if key not in self._orders:
            rng = np.random.default_rng(derive_seed(self.config.seed, "order", kind, epoch))
            self._orders = {k: v for k, v in self._orders.items() if k[0] != kind or k[1] == epoch - 1}
            self._orders[key] = rng.permutation(len(self.rows[kind]) // self._run_length(kind))
        return self._orders[key]


def supervised_rows(config: PretrainConfig) -> WebCorpus | CleanPrompts:
    """The supervised rows of a run."""
    if config.rows == "corpus":
        return web_corpus(config.corpus)
    return CleanPrompts.build(config.prompts, config.corpus.size, max(1, config.corpus.questions_per_scene))


def require_size(policy: SupervisedPolicy, config: PretrainConfig) -> None:
    """Raises InputError unless the default image size of a policy is that of the corpus."""
    size = config.corpus.size
    if isinstance(policy, MoTPolicy):
        height, width = (side * policy.pixels_per_token() for side in policy.encoders.default_grid(None))
    elif isinstance(policy, ImageTokenPolicy):
        height, width = policy.drawn_size(Sampling())
    else:
        height = width = getattr(policy, "drawn_side", size)  # optional in a class
    if (height, width) != (size, size):
        raise InputError(f"corpus.size={size}: this policy draws {width} x {height}: set corpus.size to that")


def initial_policy(config: PretrainConfig) -> SupervisedPolicy:
    """The policy that training starts from."""
    if config.init is None:
        return TinyPolicy.from_vocabulary(config.policy, VOCABULARY, config.seed).to(pick_device(config.device))
    require_tasks(config, possible_tasks(config.init))
    policy = load_policy(config.init, config.device, "float32")  # BAGEL's default on a GPU is bfloat16
    if not isinstance(policy, SupervisedPolicy):
        raise InputError(
            f"init={config.init}: holds a {type(policy).__name__}, which has no supervised losses: "
            "name a policy of lvrpo, a BAGEL, or one of image tokens"
        )
    if config.representation.weight and (not isinstance(policy, MoTPolicy) or policy.has_condition_dropout):
        raise InputError(
            f"representation.weight={config.representation.weight}: {type(policy).__name__} keeps no states for it: "
            "set it to 0"
        )
    require_size(policy, config)
    return policy


def require_tasks(config: PretrainConfig, tasks: Collection[TaskKind]) -> None:
    """Raises InputError for rows of a task that is not among those that the policy can be asked."""
    of_kind: Mapping[Kind, TaskKind] = {"caption": "understand", "question": "understand"}
    asked: list[tuple[str, str, int]] = [
        (f"batch.{kind}", of_kind.get(kind, kind), count)  # type: ignore[arg-type]  # the other kinds are tasks
        for kind, count in config.batch.items()
    ]
    asked += [(f"held_out.{task}", task, count) for task, count in config.held_out.items() if config.held_out_every]
    for name, task, count in asked:
        if count and task not in tasks:
            raise InputError(f"{name}={count}: init={config.init} does {', '.join(tasks)} alone: set it to 0")


@dataclass
class Pretrainer(BaseTrainer[PretrainConfig, SupervisedState]):
    """A supervised run."""

    command: ClassVar[str] = "pretrain"
    config: PretrainConfig
    run: RunDirectory
    state: SupervisedState
    held_out: Sequence[Prompt] = ()
    """Validation prompts of the EMA weights."""

    @classmethod
    def start(cls, config: PretrainConfig, folder: Path) -> Self:
        """Starts a run; all parts are resolved before the run directory is created."""
        require_trackers(config.trackers)
        torch.set_num_threads(config.threads)
        policy = initial_policy(config)
        state = SupervisedState(config, policy, supervised_rows(config))
        run = RunDirectory.create(folder, config)
        try:
            save_start(run, policy)
            origin = {config.init: fingerprint(policy_folder(config.init))} if config.init is not None else {}
            run.write_manifest(config, {"run": config.seed, "corpus": config.corpus.seed}, checkpoints=origin)
            return cls(config, run, state, held_out_prompts(config))
        except BaseException as error:  # interrupts too: the lock is released
            run.close_on_exit(error)
            raise

    @classmethod
    def resume(cls, folder: Path, config: PretrainConfig | None = None) -> Self:
        """Resumes from the last complete checkpoint; ``config``, if given, must be that of the run."""
        run = RunDirectory.open(folder)
        try:
            if config is not None:
                run.require_config(
                    config, "a resumed run keeps its settings: leave them as they were, or start a new run"
                )
            config = run.config(PretrainConfig)
            require_trackers(config.trackers)
            torch.set_num_threads(config.threads)
            policy = load_policy(require_start(run), config.device, "float32")
            state = SupervisedState(config, policy, supervised_rows(config))  # type: ignore[arg-type]  # what start saved
            trainer = cls(config, run, state, held_out_prompts(config))
            trainer.restore()
            run.write_manifest(config, {"run": config.seed, "corpus": config.corpus.seed})
            return trainer
        except BaseException:  # interrupts too: the lock is released
            run.close()
            raise

    def train(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Trains until the end or an interruption, with checkpoints; returns whether the run is finished."""
        config, state = self.config, self.state
        start_trackers(self.run, config.trackers)
        if pick_device(config.device).type == "cpu":
            keep_freed_memory()
        while state.step < config.steps:
            with self.logged_step(observe) as row:
                row |= state.train_step()
                if self.held_out and (state.step % config.held_out_every == 0 or state.step == config.steps):
                    row |= score_held_out(state.average, self.held_out, config.seed)
            stop = self.stop_requested(interrupted)
            self.save_if_due(last=stop or state.step == config.steps)
            if stop and state.step < config.steps:
                return False
        self.finish(config.steps)
        return True


def held_out_prompts(config: PretrainConfig) -> list[Prompt]:
    """Validation prompts of the built-in world; none where ``held_out_every`` is 0."""
    if not config.held_out_every:
        return []
    source = ScenePrompts(ScenesConfig(size=config.corpus.size), "validation", 0)
    return [prompt for task, count in config.held_out.items() for prompt in source.prompts(task, count)]


def score_held_out(policy: Policy, prompts: Sequence[Prompt], seed: int) -> dict[str, float]:
    """Success rate per task, with greedy text and unguided images."""
    seeds = [derive_seed(seed, "held out", prompt.id) for prompt in prompts]
    groups = policy.sample(prompts, Sampling(group_size=1, temperature=0.0, max_new_tokens=8), seeds)
    right: dict[str, list[float]] = {}
    for group, row in zip(groups, successes(groups), strict=True):
        right.setdefault(group.prompt.task, []).append(row[0])
    return {f"validation/{task}": sum(rows) / len(rows) for task, rows in right.items()}
