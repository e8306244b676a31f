"""The configuration of an alignment run: its sections, and the checks across sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lvrpo.config import Config, Natural
from lvrpo.data.base import DATASETS
from lvrpo.data.jsonl import JsonlConfig
from lvrpo.data.scenes import ScenesConfig
from lvrpo.data.tables import DatasetConfig
from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdapterConfig
from lvrpo.policies.base import Sampling, abilities
from lvrpo.rewards.config import RewardConfig, SuccessConfig
from lvrpo.training.advantages import AdvantageConfig, GDPOConfig, SummedConfig
from lvrpo.training.gradients import GradientAuditConfig, Mixing
from lvrpo.training.health import HealthConfig
from lvrpo.training.judge import JudgeConfig
from lvrpo.training.losses import FLOW_LOSSES, TOKEN_LOSSES, FlowLoss, TokenLoss
from lvrpo.training.losses.flow import ContrastConfig, FlowLossConfig, FreshNoiseConfig
from lvrpo.training.losses.flow_grpo import RecordedStepsConfig
from lvrpo.training.losses.grpo import GRPOConfig, PolicyGradientConfig
from lvrpo.training.losses.nft import NFTConfig
from lvrpo.training.microbatches import LimitsConfig
from lvrpo.training.optimizer import OptimizerConfig
from lvrpo.training.overoptimization import SUCCESS, OveroptimizationConfig
from lvrpo.training.rollout import RolloutConfig
from lvrpo.training.rollout_engine import DEFAULT_IMPORTANCE_CAP
from lvrpo.training.trackers import AnyTracker
from lvrpo.types import SEGMENT_KINDS, TASKS, SegmentKind, TaskKind

Count = Annotated[int, Field(le=100_000)]
"""A number of prompts or rows of a kind."""


ROW_SOURCES = ("jsonl", "datasets")
"""Sources of rows of the user, whose splits are named in the configuration."""


class DataConfig(Config):
    """Source of the prompts, and their number per task and step."""

    source: str = "scenes"
    """An entry of DATASETS, or my_package.module:Class, called with (options, split, seed)."""
    options: dict[str, Any] = Field(default={})
    """Options of a custom source. Any: defined by the class."""
    success: SuccessConfig | None = None
    """The metric of success of the outputs; null: the task's own, else the prompts' answers and facts."""
    scenes: ScenesConfig = ScenesConfig()
    jsonl: JsonlConfig = JsonlConfig()
    """The files of the source "jsonl"."""
    datasets: tuple[DatasetConfig, ...] = ()
    """The data sets of the source "datasets", whose rows are combined."""
    prompts_per_step: dict[TaskKind, Count] = Field(
        default={"generate": 28, "understand": 64, "edit": 12, "reason": 24}, min_length=1
    )
    """Prompts per step of each task; each is sampled ``rollout.group_size`` times."""

    def has_split(self, split: Literal["train", "validation", "test"]) -> bool:
        """Whether rows of the user are named for a split; False for other sources."""
        sets = {"jsonl": (self.jsonl,), "datasets": self.datasets}.get(self.source, ())
        return any(getattr(each, split) is not None for each in sets)  # the splits are three of their fields


class ValidationConfig(Config):
    """Validation on held-out prompts: selects the best weights and acts if a task regresses."""

    hints: ClassVar[Mapping[str, str]] = {
        "turn": "is called {section}.overoptimization",
        "max_rollbacks": "is gone: a run stops after three rollbacks",
        "rollback_lr": "is gone: a rollback halves the learning rates",
    }
    every: int = Field(default=20, ge=1)
    """Steps between validations; one more is run before the first step and after the last."""
    prompts: dict[TaskKind, Natural] = Field(
        default={"generate": 84, "understand": 240, "edit": 60, "reason": 60}, min_length=1
    )
    """Held-out prompts of each task."""
    rewards: tuple[RewardConfig, ...] = ()
    """Rewards for held-out prompts whose success is not defined; none: those of training."""
    action: Literal["rollback", "stop", "warn"] = "rollback"
    """When a task's score falls: rollback restores the best checkpoint and halves the learning rates, at most three
    times, stop ends the run, warn only reports."""
    overoptimization: OveroptimizationConfig | None = None
    """Detector of reward over-optimization; null: off."""


Dtype = Literal["float32", "bfloat16"]


class PrecisionConfig(Config):
    """Dtypes of the policy; adapter weights and latents are always float32."""

    weights: Dtype | None = None
    """None: float32; with an adapter the policy's default for the device."""
    compute: Dtype | None = None
    """bfloat16: autocast; None: the dtype of the weights."""


ROLLOUT_OF: Mapping[str, tuple[SegmentKind, ...]] = {
    **dict.fromkeys(("temperature", "max_new_tokens"), ("text",)),
    **dict.fromkeys(("timestep_shift", "sampler", "solver", "noise_level", "window", "shared_noise"), ("flow",)),
    **dict.fromkeys(("image_guidance_scale", "guidance_renorm", "guidance_interval", "logprob_reduction"), ("flow",)),
    "num_steps": ("flow", "masked"),
    "image_temperature": ("tokens", "masked"),
    **dict.fromkeys(("choice_temperature", "masked_likelihood", "block_length", "tokens_per_step"), ("masked",)),
    **dict.fromkeys(("guidance_scale", "guided_logprobs", "image_size"), ("flow", "tokens", "masked")),
}
"""The kinds of segments that a field of ``rollout`` affects."""


class TrainConfig(Config):
    """An alignment run."""

    hints: ClassVar[Mapping[str, str]] = {
        "average_decay": "is called ema_decay",
        "mini_updates": "is called num_minibatches",
        "guard": "is called validation",
        "control_every": "is called reference_eval_every",
        "control_group_size": "is gone: the reference samples two outputs per prompt",
        "reference_eval_group_size": "is gone: the reference samples two outputs per prompt",
    }

    allow_code: tuple[str, ...] = Field(default=(), exclude=True)
    """Packages that names such as ``my_package.module:Class`` may import; not saved in a run, so that a downloaded run
    cannot allow code."""
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its default folder is runs/NAME."""
    seed: int = Field(default=0, ge=0)
    """Seed of sampling, prompts and initial adapter weights."""
    policy: str = "tiny"
    """A folder, a run, or a built-in name."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu or cuda."""
    precision: PrecisionConfig = PrecisionConfig()
    adapter: AdapterConfig | None = None
    """LoRA adapter; None: full fine-tuning."""
    offload: bool = False
    """Keep float32 weights, moments, EMA and reference in host memory, sharded over the processes; the device holds
    gathered weights in the compute dtype during a phase (arXiv:2101.06840)."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of PyTorch in each process."""
    steps: int = Field(default=140, ge=1, le=10_000_000)
    """Rollouts; each is followed by ``num_minibatches`` optimizer steps."""
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: tuple[RewardConfig, ...] = Field(
        default=(
            RewardConfig(name="exact_answer"),
            RewardConfig(name="scene_facts", label="facts", options={"mode": "gated"}),
            RewardConfig(name="scene_facts", label="all_facts", options={"mode": "all"}),
        ),
        min_length=1,
    )
    advantages: AdvantageConfig = GDPOConfig()
    text: TokenLoss = GRPOConfig()
    flow: FlowLoss = NFTConfig()
    tokens: TokenLoss | None = None
    """Loss of autoregressive image tokens; required for policies that generate them, refused for others."""
    masked: TokenLoss | None = None
    """Loss of masked image tokens; required for policies that generate them, refused for others."""
    task_weights: dict[TaskKind, float] = Field(default_factory=dict)
    """Weight of a task in the loss (default 1)."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps per rollout; the groups of every task are split between them."""
    gradient_mixing: Mixing = "sum"
    """Combination of the tasks' gradients: sum; pcgrad: conflicting components are projected out (arXiv:2001.06782);
    norm_balanced: scaled to equal norms. The last two per expert, and with one lr_scale for text and flow."""
    gradient_audit: GradientAuditConfig = GradientAuditConfig()
    limits: LimitsConfig = LimitsConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema_decay: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the EMA weights, which are evaluated and saved."""
    validation: ValidationConfig = ValidationConfig()
    judge: JudgeConfig = JudgeConfig()
    health: HealthConfig = HealthConfig()
    reference_eval_every: int = Field(default=10, ge=1)
    """Steps between two evaluations of the reference on the training prompts, two outputs each, as a baseline of the
    reward curves."""
    checkpoint_every: int = Field(default=20, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Number of newest checkpoints to keep, in addition to the best."""
    samples_every: int = Field(default=20, ge=1)
    """Steps between sample grids in samples/."""
    trackers: tuple[AnyTracker, ...] = ()
    """Trackers that show the run, such as [{kind: tensorboard}, {kind: wandb, mode: offline}]."""

    @property
    def max_failed(self) -> dict[str, float]:
        """Per reward, and of success, the maximum share of failed scores over a run."""
        own = {r.title: self.health.max_failed if r.max_failed is None else r.max_failed for r in self.rewards}
        return {SUCCESS: self.health.max_failed, **own}

    def sections(self, segment_kinds: Sequence[SegmentKind]) -> dict[SegmentKind, TokenLoss | FlowLoss]:
        """The loss sections of a policy's kinds of segments, in the order of updates."""
        found: Mapping[SegmentKind, TokenLoss | FlowLoss | None] = {
            "text": self.text,
            "flow": self.flow,
            "tokens": self.tokens,
            "masked": self.masked,
        }
        default_cap = None if self.rollout.engine.kind == "policy" else DEFAULT_IMPORTANCE_CAP
        return {
            kind: s.with_importance_cap(default_cap) if isinstance(s, PolicyGradientConfig) else s
            for kind in SEGMENT_KINDS
            if kind in segment_kinds and (s := found[kind]) is not None
        }

    def phases(self, segment_kinds: Sequence[SegmentKind]) -> list[tuple[tuple[SegmentKind, ...], float]]:
        """The optimizer steps of an update: kinds of segments with a common ``lr_scale``, and that scale."""
        sections = self.sections(segment_kinds)
        scales = dict.fromkeys(section.lr_scale for section in sections.values())
        return [(tuple(kind for kind, s in sections.items() if s.lr_scale == scale), scale) for scale in scales]

    def sampling(self, step: int) -> Sampling:
        """The sampling parameters of a step."""
        return self.rollout.sampling(self.seed, step)

    def require_tasks(self, tasks: Sequence[TaskKind]) -> None:
        """Raises InputError for prompts of a task that the policy does not support."""
        for task, count in self.data.prompts_per_step.items():
            if count and task not in tasks:
                does = f"policy={self.policy} {abilities(tasks)}"
                raise InputError(f"data.prompts_per_step.{task}={count}: {does}: set it to 0")

    def require_policy_fit(self, segment_kinds: Sequence[SegmentKind], tasks: Sequence[TaskKind] = TASKS) -> None:
        """Raises InputError unless the sections are valid for a policy that generates these kinds of segments.

        Also for prompts of a task that is not among ``tasks``, those that the policy supports.
        """
        self.require_tasks(tasks)
        kinds = ", ".join(segment_kinds)
        for kind, default in (("text", GRPOConfig()), ("flow", NFTConfig()), ("tokens", None), ("masked", None)):
            if kind not in segment_kinds and getattr(self, kind) != default:  # a section
                raise InputError(f"{kind}: policy={self.policy} writes no such segments, only {kinds}: leave it out")
            if kind in segment_kinds and getattr(self, kind) is None:
                raise InputError(
                    f"{kind}: policy={self.policy} draws such segments, and nothing says how they are trained: add the "
                    f"section ({kind}={{}} for its defaults)"
                )
        for name, concerned in ROLLOUT_OF.items():
            value = getattr(self.rollout, name)  # a field of RolloutConfig
            if not set(concerned) & set(segment_kinds) and value != RolloutConfig.model_fields[name].default:
                shown = getattr(value, "kind", value)  # for sections
                raise InputError(
                    f"rollout.{name}={shown}: applies to {' and '.join(concerned)}, and policy={self.policy} generates "
                    f"{kinds}: leave it out"
                )
        try:
            self._check_kinds(segment_kinds)
        except ValueError as error:
            raise InputError(str(error)) from None

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        for check in (
            self._check_precision,
            self._check_adapter,
            self._check_offload,
            self._check_data,
            self._check_weights,
            self._check_overoptimization,
            self._check_rollout,
        ):
            check()
        if self.tokens is not None or self.masked is not None:
            self._check_guided_logprobs()
        draws = any(self.data.prompts_per_step.get(task) for task in ("generate", "edit"))
        by_flow = self.flow != NFTConfig() or (draws and self.rollout.guided_logprobs == "joint")
        if by_flow and self.tokens is None and self.masked is None:
            self._check_kinds(("text", "flow"))  # otherwise require_policy_fit checks them with the policy
        return self

    def _check_kinds(self, segment_kinds: Sequence[SegmentKind]) -> None:
        sections = self.sections(segment_kinds)
        trained = {kind: section for kind, section in sections.items() if section.weight}
        if not trained:
            weights = " and ".join(f"{kind}.weight=0" for kind in sections)
            raise ValueError(f"{weights}: nothing would be trained: give one a positive weight")
        for kind, section in trained.items() if self.rollout.sample_from == "reference" else ():
            table = FLOW_LOSSES if isinstance(section, FlowLossConfig) else TOKEN_LOSSES
            if not table[section.kind].off_policy:
                raise ValueError(
                    f"rollout.sample_from=reference: {kind}.kind={section.kind} learns from its own outputs only: use "
                    "dpo or best_of, or sample with rollout.sample_from=policy"
                )
        if self.gradient_mixing != "sum" and len({section.lr_scale for section in trained.values()}) > 1:
            rates = " and ".join(f"{kind}.lr_scale={section.lr_scale}" for kind, section in trained.items())
            raise ValueError(
                f"gradient_mixing={self.gradient_mixing}: with {rates} kinds of segments are stepped in turn, so their "
                f"gradients never meet: give {'both' if len(trained) == 2 else 'all'} one lr_scale, or use "
                "gradient_mixing=sum"
            )
        if "flow" in sections:
            self._check_flow()

    def _check_guided_logprobs(self) -> None:
        rollout = self.rollout
        if rollout.guided_logprobs == "joint":
            return
        mode = f"rollout.guided_logprobs={rollout.guided_logprobs}"
        if rollout.guidance_scale == 1:
            raise ValueError(f"{mode}: has no effect with rollout.guidance_scale=1: leave it out")
        exact = self.masked is None or rollout.masked_likelihood.kind == "path"
        if rollout.guided_logprobs == "none" and exact:
            raise ValueError(
                f"{mode}: would score another distribution than the guided one that is sampled: use joint or "
                "detach_uncond, or set rollout.guidance_scale to 1"
            )

    def _check_precision(self) -> None:
        precision = self.precision
        if precision.weights == "bfloat16" and self.adapter is None:
            raise ValueError(
                "precision.weights=bfloat16: weights that are trained have to be float32: set compute=bfloat16 "
                "instead, or train an adapter"
            )
        if precision.weights == "bfloat16" and precision.compute == "float32":
            raise ValueError("precision.compute=float32: has no effect on weights in bfloat16: leave it out")

    def _check_offload(self) -> None:
        if not self.offload:
            return
        for applies, what, remedy in (
            (self.adapter is not None, "adapter", "is small beside its base: leave offload out"),
            (self.optimizer.kind == "adamw_8bit", "optimizer.kind=adamw_8bit", "moments are on the host: use adamw"),
        ):
            if applies:
                raise ValueError(f"offload=true with {what}: {remedy}")

    def _check_data(self) -> None:
        counts = self.data.prompts_per_step
        if not any(counts.values()) or min(counts.values()) < 0:
            raise ValueError("data.prompts_per_step: give at least one task a positive number, and none a negative one")
        if self.num_minibatches > sum(counts.values()):
            raise ValueError(
                f"num_minibatches={self.num_minibatches}: a step has only {sum(counts.values())} prompts to deal"
            )
        if self.data.options and self.data.source in DATASETS:
            raise ValueError(
                f"data.options: is for a source of your own, and data.source={self.data.source}: leave it out"
            )
        if self.data.source == "jsonl" and self.data.jsonl.train is None:
            raise ValueError("data.source=jsonl: set data.jsonl.train to a file of rows")
        if self.data.source == "datasets" and not any(each.train for each in self.data.datasets):
            raise ValueError("data.source=datasets: no set of data.datasets has train: name a split or a file of rows")
        joint = self.advantages.joint if isinstance(self.advantages, SummedConfig) else None
        paired = set() if joint is None else {counts.get(task, 0) for task in joint}
        if joint is not None and (joint[0] == joint[1] or len(paired) > 1 or paired == {0}):
            raise ValueError(
                f"advantages.joint={list(joint)}: pairs groups one to one: name two tasks with as many prompts each in "
                "data.prompts_per_step"
            )

    def _check_weights(self) -> None:
        if any(weight < 0 for weight in self.task_weights.values()):
            raise ValueError("task_weights: weights must be 0 or more")
        trained: list[TaskKind] = [task for task, count in self.data.prompts_per_step.items() if count]
        if not any(self.task_weights.get(task, 1.0) for task in trained):
            raise ValueError("task_weights: every task of data.prompts_per_step has weight 0: nothing would be trained")
        if not any(r.weight for r in self.rewards):
            raise ValueError("rewards: every weight is 0, so nothing is trained: give one of them a weight above 0")
        for r in self.rewards:
            if r.title == SUCCESS:
                raise ValueError(
                    f"rewards.{SUCCESS}: metrics and validation.overoptimization.watch call verified success by this "
                    "name: give the reward another label"
                )
            if r.normalize is not None and self.advantages.kind == "win_rate":
                raise ValueError(
                    f"rewards.{r.title}.normalize={r.normalize}: advantages.kind=win_rate counts ranks, which no scale "
                    "changes: leave it out"
                )
        for task in trained:
            if not any(r.weight and (r.tasks is None or task in r.tasks) for r in self.rewards):
                raise ValueError(
                    f"data.prompts_per_step.{task}={self.data.prompts_per_step[task]}: every reward is for other tasks "
                    f"only, so all its scores would be masked: add {task!r} to rewards.tasks, or ask for 0 prompts"
                )
            points = {x for r in self.rewards if r.schedule is not None for x, _ in (*r.schedule.points, (0, 0.0))}
            for step in sorted(x for x in points if x < self.steps):  # a weight becomes 0 at a point of its schedule
                if not any(r.weight_at(step) and (r.tasks is None or task in r.tasks) for r in self.rewards):
                    raise ValueError(
                        f"rewards.schedule: at step {step} every reward of {task!r} has weight 0, so nothing would be "
                        "trained: keep one of them above 0"
                    )

    def _check_overoptimization(self) -> None:
        watched, rows = self.validation.overoptimization, {r.title: r for r in self.rewards}
        if watched is None:
            return
        names = ", ".join(rows)
        if watched.reward not in rows or not rows[watched.reward].weight:
            raise ValueError(
                f"validation.overoptimization.reward={watched.reward}: is no trained reward: there are {names}"
            )
        if watched.watch != SUCCESS and (watched.watch not in rows or rows[watched.watch].weight):
            raise ValueError(
                f"validation.overoptimization.watch={watched.watch}: is no reward of weight 0: add one to rewards, or "
                f"say {SUCCESS}"
            )

    def _check_adapter(self) -> None:
        if self.adapter is not None and set(self.adapter.experts) == {"generate"} and self.text.weight:
            raise ValueError(
                "adapter.experts=[generate]: text is written by the other expert, so text.weight="
                f"{self.text.weight} would train nothing: add understand, or set text.weight=0"
            )

    def _check_rollout(self) -> None:
        rollout = self.rollout
        try:
            rollout.sampling(self.seed, 0)
        except InputError as error:
            raise ValueError(str(error).replace("sampling.", "rollout.")) from None
        if rollout.sampler == "cps" and rollout.noise_level > 1:
            raise ValueError(f"rollout.noise_level={rollout.noise_level}: must be at most 1 for the sampler cps")
        after = rollout.window.steps_after
        if after is not None and rollout.sampler == "ode":
            raise ValueError(f"rollout.window.steps_after={after}: rollout.sampler=ode does not use it: leave it out")
        if after is not None and after >= rollout.num_steps:
            raise ValueError(
                f"rollout.window.steps_after={after}: must be less than rollout.num_steps={rollout.num_steps}"
            )
        low, high = rollout.guidance_interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"rollout.guidance_interval={[low, high]}: must be [low, high] with 0 <= low < high <= 1")
        if rollout.image_guidance_scale > 1 and rollout.guidance_scale == 1:
            raise ValueError(
                f"rollout.image_guidance_scale={rollout.image_guidance_scale}: has no effect while "
                "rollout.guidance_scale=1: set both, or neither"
            )
        if rollout.sample_from == "reference" and rollout.engine.kind != "policy":
            raise ValueError(
                f"rollout.engine.kind={rollout.engine.kind}: an engine has the trained weights, and with "
                "rollout.sample_from=reference the reference samples: leave one of them out"
            )
        if rollout.steps_ahead and (rollout.engine.kind == "policy" or rollout.max_resamples):
            raise ValueError(
                "rollout.steps_ahead=1: an engine samples the next step meanwhile: set rollout.engine.kind, and "
                "rollout.max_resamples to 0"
            )
        if rollout.engine.kind == "vllm" and (self.adapter is None or self.adapter.dora):
            raise ValueError(
                "rollout.engine.kind=vllm: takes new weights as a LoRA adapter only: set adapter (without dora), "
                "or use sglang"
            )
        if rollout.engine.kind == "custom" and isinstance(self.flow, RecordedStepsConfig):
            raise ValueError(
                f"flow.kind={self.flow.kind}: takes ratios of steps to log-probs of another program "
                "(rollout.engine.kind=custom), and those of images are not corrected: use flow.kind=nft or awm"
            )
        if rollout.sample_from == "reference" and rollout.max_resamples:
            raise ValueError("rollout.max_resamples needs fresh outputs: set rollout.sample_from to policy")

    def _check_flow(self) -> None:
        rollout, flow = self.rollout, self.flow
        drawn = any(count for task, count in self.data.prompts_per_step.items() if task != "understand")
        if not (drawn and flow.weight):
            return  # what the rest is about is not trained
        stochastic, window = rollout.sampler != "ode", rollout.window.kind
        for kind, fits, needs in (
            ("flow_grpo", stochastic, "rollout.sampler=flow_sde, dance_sde or cps"),
            ("dance_grpo", rollout.sampler == "dance_sde", "rollout.sampler=dance_sde"),
            (
                "mix_grpo",
                stochastic and window in ("sliding", "random", "decaying"),
                "rollout.sampler=flow_sde and rollout.window.kind=sliding, random or decaying",
            ),
        ):
            if flow.kind == kind and not fits:
                raise ValueError(f"flow.kind={kind} needs {needs}: set that, or extend {kind}.yaml")
        fresh = isinstance(flow, FreshNoiseConfig)
        if fresh and rollout.sampler != "ode":
            raise ValueError(f"flow.kind={flow.kind} trains on fresh noise: set rollout.sampler to ode")
        if rollout.guided_logprobs != "joint" and not isinstance(flow, RecordedStepsConfig):
            raise ValueError(
                f"rollout.guided_logprobs={rollout.guided_logprobs}: has no effect with flow.kind={flow.kind}, which "
                "trains no recorded steps: set rollout.guided_logprobs=joint, or flow.kind=flow_grpo"
            )
        self._check_guided_logprobs()
        plain = rollout.image_guidance_scale == 1 and rollout.guidance_renorm == "none"
        if fresh and not (plain and rollout.guidance_interval == (0.0, 1.0)):
            raise ValueError(
                f"flow.kind={flow.kind} trains velocities guided by rollout.guidance_scale alone: leave out "
                "rollout.image_guidance_scale, guidance_renorm and guidance_interval"
            )
        if isinstance(flow, ContrastConfig) and 2 * flow.top_bottom_k > rollout.group_size:
            raise ValueError(
                f"flow.top_bottom_k={flow.top_bottom_k}: best and worst must fit into "
                f"rollout.group_size={rollout.group_size}: set it to {rollout.group_size // 2} or less"
            )
        if flow.kind == "best_of" and flow.top_k >= rollout.group_size:
            raise ValueError(f"flow.top_k={flow.top_k}: the best of rollout.group_size={rollout.group_size} are fewer")
