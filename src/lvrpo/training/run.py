"""Alignment and pretraining as runs on the disk: parts are resolved, the run directory opened, the loop called."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from lvrpo.data.scenes import ScenePrompts, ScenesConfig
from lvrpo.data.sources import DATASETS, PromptSource
from lvrpo.errors import InputError
from lvrpo.policies import BUILT_IN, POLICIES
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import DTYPES, FINAL, load_policy, model_type, pick_device, policy_folder
from lvrpo.policies.mot.adapter import add_adapter, has_adapter, peft_library
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.registry import resolve
from lvrpo.rewards.success import scorable, successes
from lvrpo.rewards.table import RewardSource, build_rewards
from lvrpo.sampling import derive_seed
from lvrpo.training import score_record
from lvrpo.training.checkpoint import (
    atomic_folder,
    checkpoint_writer,
    fingerprint,
    latest_checkpoint,
    load_state,
    prune_checkpoints,
    save_state,
    seal_checkpoint,
    verify_checkpoint,
)
from lvrpo.training.config import TrainConfig
from lvrpo.training.guard import Guard
from lvrpo.training.host_memory import return_freed_memory
from lvrpo.training.judge import HeldOut, held_out_rows, require_asked
from lvrpo.training.loop import align
from lvrpo.training.memory import MemoryEstimate, estimate_memory, require_memory, worth_a_look
from lvrpo.training.objective import Policies
from lvrpo.training.offload import Shards
from lvrpo.training.optimizer import copy_weights, eight_bit_library
from lvrpo.training.pretrain import PretrainConfig, Supervised, fresh_policy, supervised_rows
from lvrpo.training.rollout import prompts_of_step
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import STATE, RunState
from lvrpo.training.team import ALONE, Leader, Setup, Team
from lvrpo.training.wire import SOLO, Wire
from lvrpo.types import Example, Prompt

Observer = Callable[[Mapping[str, Any]], None]

LOOKED_AT = 32
"""Prompts of a task that are shown to the rewards before a run starts."""

DRAWINGS = 64
"""Held-out drawings that decide on a new judge."""

START = "start"
"""Folder of a run: the policy that it started from, which stays the reference of a resumed run."""


# --- parts of an alignment run ---


def open_source(config: TrainConfig, split: str, seed: int) -> PromptSource:
    """One split of the source of prompts; raises InputError if it lacks a task that a step needs."""
    section = {"scenes": config.data.scenes, "jsonl": config.data.jsonl}.get(config.data.source)
    return resolve("data source", config.data.source, DATASETS)(section, split, seed)


def training_source(config: TrainConfig) -> PromptSource:
    """The prompts to align on."""
    source = open_source(config, "train", config.seed)
    for task, count in config.data.prompts_per_step.items():
        if count and task not in source.tasks:
            raise InputError(
                f"data.prompts_per_step.{task}={count}: {config.data.source} has no rows of task '{task}': set it to 0"
            )
    return source


def scoring_rewards(config: TrainConfig, source: PromptSource) -> list[RewardSource]:
    """The rewards; raises InputError if none that is trained on scores the prompts of a task that a step needs."""
    rewards = build_rewards(config.rewards)
    require_asked(config.judge, rewards)
    for task, count in config.data.prompts_per_step.items():
        prompts = source.prompts(task, min(count, LOOKED_AT)) if count else []
        if prompts and not any(r.config.weight and r.scores(prompt) for r in rewards for prompt in prompts):
            raise InputError(
                f"data.prompts_per_step.{task}={count}: no reward scores these prompts, all would be masked: add one "
                "that does to rewards, or ask for 0"
            )
    return rewards


def guard_prompts(config: TrainConfig) -> dict[Any, list[Prompt]]:
    """Held-out prompts of every trained task that can be told right from wrong; none without validation rows."""
    if config.data.source == "jsonl" and config.data.jsonl.validation is None:
        return {}
    source = open_source(config, "validation", 0)
    trained = {task for task, count in config.data.prompts_per_step.items() if count}
    prompts = {
        task: [p for p in source.prompts(task, count) if scorable(p)]
        for task, count in config.guard.prompts.items()
        if count and task in trained and task in source.tasks
    }
    return {task: list({p.id: p for p in rows}.values()) for task, rows in prompts.items()}


def held_out_drawings(config: TrainConfig) -> list[Example]:
    """Up to ``DRAWINGS`` drawings with their descriptions that nothing is trained on; none without validation rows."""
    if config.data.source == "jsonl" and config.data.jsonl.validation is None:
        return []
    source = open_source(config, "validation", 0)
    found: dict[str, Example] = {}
    for i in range(DRAWINGS if "generate" in source.tasks else 0):
        with suppress(InputError):  # a row without a target
            example = source.example("generate", i)
            found.setdefault(example.prompt.id, example)
    return list(found.values())


def judge_rows(config: TrainConfig, rewards: Sequence[RewardSource], guard: Guard) -> HeldOut:
    """What decides on a new judge; raises InputError where there is too little."""
    return held_out_rows(config.judge, rewards, guard.prompts, lambda: held_out_drawings(config))


@dataclass
class Alignment:
    """An alignment run, ready to start or to go on."""

    config: TrainConfig
    run: RunDirectory
    state: RunState
    source: PromptSource
    rewards: Sequence[RewardSource]
    guard: Guard
    held_out: HeldOut
    """What decides on a new judge."""
    team: Team = ALONE
    """Who shares the work."""
    wire: Wire = SOLO
    """To whom else there is."""
    base: str | None = None
    """The MODEL below the run's adapter, where it is not the one that its files name."""

    def __post_init__(self) -> None:
        if self.team is ALONE:
            self.team = Team(self.state.shards)

    @classmethod
    def start(cls, config: TrainConfig, folder: Path, wire: Wire = SOLO) -> Self:
        """Resolves every part before it creates the run directory: wrong input leaves no trace."""
        torch.set_num_threads(config.threads)
        source = training_source(config)
        rewards = scoring_rewards(config, source)
        guard = Guard(guard_prompts(config), config)
        held_out = judge_rows(config, rewards, guard)
        require_room(config, source, guard)
        policy, base = open_policy(config)
        run = RunDirectory.create(folder, config)
        try:
            state = begin(run, config, policy, base, wire)
            return cls(config, run, state, source, rewards, guard, held_out, wire=wire)
        except BaseException:
            run.close()
            raise

    @classmethod
    def resume(
        cls, folder: Path, config: TrainConfig | None = None, base: str | None = None, wire: Wire = SOLO
    ) -> Self:
        """Goes on from the last whole checkpoint; ``config``, where given, must be that of the run.

        ``base``: where the base of the run's adapter lies now.
        """
        run = RunDirectory.open(folder)
        try:
            if config is not None:
                run.require_config(config)
            if run.read_summary() is not None:
                raise InputError(f"{folder}: has finished: see lvrpo report {folder}, or start another run")
            config = run.config(TrainConfig)
            torch.set_num_threads(config.threads)
            source, rewards = training_source(config), build_rewards(config.rewards)
            guard = Guard(guard_prompts(config), config)
            held_out = judge_rows(config, rewards, guard)
            state = go_on(run, config, base, wire)
        except BaseException:
            run.close()
            raise
        return cls(config, run, state, source, rewards, guard, held_out, base=base, wire=wire)

    @property
    def finished(self) -> bool:
        """Whether the loop has nothing left to do."""
        return (self.run.path / FINAL).is_file()

    def go(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Calls the loop; returns whether it came to its end, and names the guard's best checkpoint if so."""
        if self.finished:
            return True
        parts = (self.config, self.run, self.state, self.source, self.rewards, self.guard)
        align(*parts, observe, interrupted, self.held_out, self.team)
        if interrupted() and self.state.step < self.config.steps:
            return False
        best = self.state.guard.best_step
        self.run.write_json(FINAL, {"checkpoint": f"checkpoints/{self.run.checkpoint_dir(best).name}", "step": best})
        return True

    def led(self) -> Leader:
        """Takes the lead of the processes at the wire; a context manager that lets them go."""
        run = self.run.path.resolve()
        last = latest_checkpoint(run)
        setup = Setup(self.config, str(run / START), self.base, None if last is None else str(last))
        leader = Leader(self.wire, setup, self.state.policies, self.state.shards)
        self.team = leader
        return leader

    @property
    def policies(self) -> Policies:
        """To sample and judge with: everybody helps."""
        return self.team.shared(self.state.policies)

    def result(self) -> Policy:
        """The weights that the guard found best; on several processes, or offloaded, they take the average's place."""
        if self.team.size == 1 and self.state.shards is None:
            return loaded(self.run.path, self.config, self.base)
        self.state.load_average(self.run.checkpoint_dir(self.state.guard.best_step))
        self.team.moved("average")
        return self.policies.average


def memory_of(
    config: TrainConfig, source: PromptSource, guard: Guard, device: torch.device | None = None
) -> MemoryEstimate | None:
    """What a run will need, at the sizes of its first step; nothing is loaded. None: it cannot be foretold.

    ``device`` stands for the configuration's; it need not be there.
    """
    require_extras(config)
    held_out = [prompt for prompts in guard.prompts.values() for prompt in prompts]
    return estimate_memory(config, prompts_of_step(source, config, 0), held_out, device)


def require_room(config: TrainConfig, source: PromptSource, guard: Guard) -> None:
    """Raises InputError, with what to change, if a large model would not fit; small ones are not looked at."""
    device = pick_device(config.device)
    if worth_a_look(policy_folder(config.policy), device):
        require_memory(memory_of(config, source, guard), device, f"policy={config.policy}")


def require_extras(config: TrainConfig) -> None:
    """Raises InputError, before anything is loaded, if a package that the configuration needs is not installed."""
    if config.adapter is not None:
        peft_library()
    if config.optimizer.kind == "adamw_8bit":
        eight_bit_library()


def open_policy(config: TrainConfig) -> tuple[Policy, Path]:
    """The policy that a run starts from, with its adapter on it, and the folder of what it was made of."""
    require_extras(config)
    base = policy_folder(config.policy)
    if has_adapter(base):
        raise InputError(
            f"policy={config.policy}: is an adapter: make one model of it with `lvrpo export` and start there"
        )
    declared = getattr(resolve("model type", model_type(base), POLICIES), "writes", None)
    if isinstance(declared, tuple):  # by the class, so known before anything is loaded
        config.require_fit(declared)
    if config.offload and config.precision.compute == "bfloat16" and model_type(base) != BagelPolicy.model_type:
        raise InputError(
            f"precision.compute=bfloat16 with offload=true: policy={config.policy} is loaded in float32 alone: "
            "leave one of them out"
        )
    policy = load_policy(base, config.device, config.weights_dtype)
    config.require_fit(policy.writes)
    if config.adapter is not None:
        if not isinstance(policy, MoTPolicy):
            raise InputError(f"adapter: {config.policy} is of a kind that takes none: leave the section out")
        is_name = config.policy in BUILT_IN or not Path(config.policy).exists()  # built in, or a Hub id
        name = config.policy if is_name else str(base.resolve())
        add_adapter(policy, config.adapter, name, derive_seed(config.seed, "adapter"))
    return as_configured(policy, config), base


def as_configured(policy: Policy, config: TrainConfig) -> Policy:
    """The policy, told in which dtype to multiply and how much goes through it at once."""
    if config.precision.compute is not None:
        if not isinstance(policy, MoTPolicy):
            raise InputError("precision.compute: this policy computes in the dtype of its weights: leave it out")
        policy.compute_in(DTYPES[config.precision.compute])
    config.limits.apply(policy)
    return policy


def begin(run: RunDirectory, config: TrainConfig, policy: Policy, base: Path, wire: Wire = SOLO) -> RunState:
    """A fresh state; the weights it starts from are kept in the run, the manifest says what they are."""
    keep_start(run, policy)
    run.write_manifest(config, {"run": config.seed}, data_fingerprints(config), {config.policy: fingerprint(base)})
    return RunState.start(policy, config, wire)


def go_on(run: RunDirectory, config: TrainConfig, base: str | None = None, wire: Wire = SOLO) -> RunState:
    """The state of the last whole checkpoint; metrics and scores that came after it are dropped."""
    verify_checkpoint(run.path / START)
    state = RunState.start(loaded(run.path / START, config, base), config, wire)
    last = latest_checkpoint(run.path)
    if last is not None:
        state.load(last, everybody=False)
    run.truncate_metrics(state.step if last is not None else -1)
    score_record.truncate(run, state.step if last is not None else -1)
    run.write_manifest(config, {"run": config.seed}, data_fingerprints(config))
    return state


def loaded(model: Path, config: TrainConfig, base: str | None) -> Policy:
    """A policy that the run wrote, set up as configured; ``base``: as ``load_policy`` takes it."""
    return as_configured(load_policy(model, config.device, config.weights_dtype, base), config)


def helping_policies(setup: Setup, wire: Wire) -> tuple[Policies, Shards | None]:
    """The policies of a process that helps a run, and what it keeps of offloaded ones."""
    torch.set_num_threads(setup.config.threads)
    state = RunState.start(loaded(Path(setup.start), setup.config, setup.base), setup.config, wire)
    if state.shards is not None and setup.checkpoint is not None:
        state.shards.load_own(Path(setup.checkpoint) / STATE)
    return state.policies, state.shards


def keep_start(run: RunDirectory, policy: Policy) -> None:
    """Writes the starting weights into the run, sealed."""
    shutil.rmtree(run.path / START, ignore_errors=True)
    with atomic_folder(run.path / START) as folder:
        policy.save(folder)
        seal_checkpoint(folder)


def data_fingerprints(config: TrainConfig) -> dict[str, Any]:
    """The user's files; the built-in world is a function of its configuration."""
    if config.data.source != "jsonl":
        return {}
    splits = {name: getattr(config.data.jsonl, name) for name in ("train", "validation", "test")}  # its three fields
    return {name: fingerprint(path) for name, path in splits.items() if path is not None}


# --- pretraining ---


@dataclass
class Pretraining:
    """A supervised run, ready to start or to go on."""

    config: PretrainConfig
    run: RunDirectory
    trainer: Supervised
    seconds: float = 0.0
    """Training seconds so far, over all resumptions."""
    held_out: list[Prompt] = field(default_factory=list)

    @classmethod
    def start(cls, config: PretrainConfig, folder: Path) -> Self:
        """Resolves every part before it creates the run directory."""
        torch.set_num_threads(config.threads)
        policy = fresh_policy(config)
        trainer = Supervised(config, policy, supervised_rows(config))
        run = RunDirectory.create(folder, config)
        try:
            keep_start(run, policy)
            origin = {config.init: fingerprint(policy_folder(config.init))} if config.init is not None else {}
            run.write_manifest(config, {"run": config.seed, "corpus": config.corpus.seed}, checkpoints=origin)
            return cls(config, run, trainer, held_out=held_out_prompts(config))
        except BaseException:
            run.close()
            raise

    @classmethod
    def resume(cls, folder: Path, config: PretrainConfig | None = None) -> Self:
        """Goes on from the last whole checkpoint; ``config``, where given, must be that of the run."""
        run = RunDirectory.open(folder)
        try:
            if config is not None:
                run.require_config(config)
            config = run.config(PretrainConfig)
            torch.set_num_threads(config.threads)
            verify_checkpoint(run.path / START)
            policy = load_policy(run.path / START, config.device, "float32")
            trainer = Supervised(config, policy, supervised_rows(config))  # type: ignore[arg-type]  # what start saved
            this = cls(config, run, trainer, held_out=held_out_prompts(config))
            this._load()
            run.write_manifest(config, {"run": config.seed, "corpus": config.corpus.seed})
            return this
        except BaseException:
            run.close()
            raise

    @property
    def finished(self) -> bool:
        """Whether every step is done."""
        return (self.run.path / FINAL).is_file()

    def go(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Steps until the end or an interruption, with checkpoints; returns whether it came to its end."""
        config, trainer = self.config, self.trainer
        while trainer.step_number < config.steps:
            started = time.perf_counter()
            report = trainer.step()
            self.seconds += time.perf_counter() - started
            step = trainer.step_number
            row: dict[str, Any] = {"step": step, **{f"loss/{name}": loss for name, loss in report.losses.items()}}
            row |= {f"grad_norm/{expert}": norm for expert, norm in report.grad_norms.items()}
            if self.held_out and (step % config.held_out_every == 0 or step == config.steps):
                row |= score_held_out(trainer.average, self.held_out, config.seed)
            row |= {"seconds": self.seconds, "seconds_left": self.seconds / step * (config.steps - step)}
            self.run.append_metrics(row)
            observe(row)
            return_freed_memory()
            if step % config.checkpoint_every == 0 or step == config.steps or interrupted():
                self._save()
            if interrupted() and step < config.steps:
                return False
        last = self.run.checkpoint_dir(config.steps).name
        self.run.write_json(FINAL, {"checkpoint": f"checkpoints/{last}", "step": config.steps})
        return True

    def _save(self) -> None:
        trainer = self.trainer
        with checkpoint_writer(self.run.checkpoint_dir(trainer.step_number)) as folder:
            trainer.average.save(folder)
            (folder / STATE).mkdir()
            tree = {
                "step": trainer.step_number,
                "seconds": self.seconds,
                "policy": dict(trainer.policy.state_dict()),
                "average": dict(trainer.average.state_dict()),
                "optimizers": trainer.optimizers.state(),
            }
            if trainer.representation is not None:
                tree["representation"] = trainer.representation.state()
            save_state(folder / STATE, tree)
        prune_checkpoints(self.run.path, self.config.keep_checkpoints)

    def _load(self) -> None:
        last = latest_checkpoint(self.run.path)
        if last is not None:
            verify_checkpoint(last)
            tree = load_state(last / STATE)
            copy_weights(self.trainer.policy, tree["policy"])
            copy_weights(self.trainer.average, tree["average"])
            self.trainer.optimizers.load_state(tree["optimizers"])
            if self.trainer.representation is not None:
                self.trainer.representation.load(tree["representation"])
            self.trainer.step_number, self.seconds = tree["step"], tree["seconds"]
        self.run.truncate_metrics(self.trainer.step_number if last is not None else -1)


def held_out_prompts(config: PretrainConfig) -> list[Prompt]:
    """Validation prompts of the built-in world; none where ``held_out_every`` is 0."""
    if not config.held_out_every:
        return []
    source = ScenePrompts(ScenesConfig(size=config.corpus.size), "validation", 0)
    return [prompt for task, count in config.held_out.items() for prompt in source.prompts(task, count)]


def score_held_out(policy: Policy, prompts: Sequence[Prompt], seed: int) -> dict[str, float]:
    """Share of right outputs per task, greedy text and unguided drawings."""
    assert isinstance(policy, nn.Module)
    seeds = [derive_seed(seed, "held out", prompt.id) for prompt in prompts]
    groups = policy.sample(prompts, Sampling(group_size=1, temperature=0.0, max_new_tokens=8), seeds)
    right: dict[str, list[float]] = {}
    for group, row in zip(groups, successes(groups), strict=True):
        right.setdefault(group.prompt.task, []).append(row[0])
    return {f"guard/{task}": sum(rows) / len(rows) for task, rows in right.items()}
