"""Alignment and pretraining as runs on the disk: parts are resolved, the run directory opened, the loop called."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import nn

from lvrpo.config import dump_config
from lvrpo.data.scenes import ScenePrompts, ScenesConfig
from lvrpo.data.sources import PromptSource
from lvrpo.errors import InputError
from lvrpo.policies import BUILT_IN
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.loading import DTYPES, FINAL, load_policy, model_type, pick_device, policy_class, policy_folder
from lvrpo.policies.mot.adapter import add_adapter, has_adapter, peft_library, require_moved
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.reading import is_there
from lvrpo.registry import allow_code
from lvrpo.rewards.success import successes
from lvrpo.rewards.table import RewardSource
from lvrpo.sampling import derive_seed
from lvrpo.training import score_record
from lvrpo.training.checkpoint import (
    atomic_folder,
    checkpoint_step,
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
from lvrpo.training.loop import align
from lvrpo.training.memory import MemoryEstimate, estimate_memory, require_memory, worth_a_look
from lvrpo.training.objective import Policies
from lvrpo.training.offload import Shards
from lvrpo.training.optimizer import copy_weights, eight_bit_library
from lvrpo.training.pretrain import PretrainConfig, Supervised, fresh_policy, supervised_rows
from lvrpo.training.rollout import prompts_of_step
from lvrpo.training.run_directory import CONFIG, SUMMARY, RunDirectory
from lvrpo.training.sources import NOTHING_GIVEN, Given, Parts, open_parts
from lvrpo.training.splits import require_apart
from lvrpo.training.state import STATE, RunState
from lvrpo.training.team import ALONE, Leader, Setup, Team
from lvrpo.training.wire import SOLO, Wire
from lvrpo.typed_json import shaped
from lvrpo.types import Prompt

Observer = Callable[[Mapping[str, Any]], None]

START = "start"
"""Folder of a run: the policy that it started from, which stays the reference of a resumed run."""


@dataclass
class Alignment:
    """An alignment run, ready to start or to go on."""

    config: TrainConfig
    run: RunDirectory
    state: RunState
    parts: Parts
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
    def start(
        cls,
        config: TrainConfig,
        folder: Path,
        wire: Wire = SOLO,
        given: Given = NOTHING_GIVEN,
        files: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Resolves every part before it creates the run directory: wrong input leaves no trace.

        ``given``: parts that a caller in Python hands over. ``files``: what else a run is resumed by, JSON by name; it
        is written before there is anything to resume. Any: JSON.
        """
        allow_code(config.allow_code)
        torch.set_num_threads(config.threads)
        parts = open_parts(config, given)
        splits = require_apart(config)
        require_room(config, parts)
        policy, base = open_policy(config)
        parts.require_readable(policy)
        run = RunDirectory.create(folder, config)
        try:
            for name, content in files.items():
                run.write_json(name, content)
            state = begin(run, config, policy, base, wire, splits)
            return cls(config, run, state, parts, wire=wire)
        except BaseException as error:
            run.leave(error)
            raise

    @classmethod
    def resume(
        cls,
        folder: Path,
        config: TrainConfig | None = None,
        base: str | None = None,
        wire: Wire = SOLO,
        given: Given = NOTHING_GIVEN,
    ) -> Self:
        """Goes on from the last whole checkpoint; ``config``, where given, is that of the run, or asks for more steps.

        A run that is made longer follows the schedule of its new length from where it stands: the learning rates of
        steps that are done stay. ``base``: where the base of the run's adapter lies now.
        """
        run = RunDirectory.open(folder)
        try:
            if config is not None:
                run.require_config(config, allow=("steps",))
            held = run.config(TrainConfig)
            longer = config is not None and config.steps != held.steps
            if longer and config is not None:
                require_longer(run, held.steps, config.steps)
            elif run.read_summary() is not None:
                raise InputError(
                    f"{folder}: has finished: see lvrpo report {folder}, start another run, or make it longer with "
                    f"lvrpo train --resume {folder} steps={held.steps * 2}"
                )
            allowed = () if config is None else config.allow_code
            allow_code(allowed)
            steps = config.steps if config is not None else held.steps
            config = held.model_copy(update={"allow_code": allowed, "steps": steps})
            torch.set_num_threads(config.threads)
            parts = open_parts(config, given)
            if longer:
                lengthen(run, config)
            state = go_on(run, config, base, wire)
        except BaseException:
            run.close()
            raise
        return cls(config, run, state, parts, base=base, wire=wire)

    @property
    def guard(self) -> Guard:
        """What watches held-out rows."""
        return self.parts.guard

    @property
    def source(self) -> PromptSource:
        """The prompts that are trained on."""
        return self.parts.source

    @property
    def rewards(self) -> Sequence[RewardSource]:
        """What scores them."""
        return self.parts.rewards

    @property
    def finished(self) -> bool:
        """Whether the loop has nothing left to do."""
        return is_there(self.run.path / FINAL)

    def go(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Calls the loop; returns whether it came to its end, and names the guard's best checkpoint if so."""
        if self.finished:
            return True
        parts = (self.config, self.run, self.state, self.source, self.rewards, self.guard)
        align(*parts, observe, interrupted, self.parts.judge_rows, self.team)
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


def require_longer(run: RunDirectory, held: int, asked: int) -> None:
    """Raises InputError where a run of ``held`` steps cannot go on to ``asked``."""
    if asked < held:
        raise InputError(f"steps={asked}: {run.path} has {held}, and a run can only be made longer: give more")
    if (run.path / "baseline").exists():
        raise InputError(
            f"steps={asked}: {run.path} is compared with a baseline of as much compute: start another run instead"
        )


def lengthen(run: RunDirectory, config: TrainConfig) -> None:
    """Writes the new number of steps into the run, and takes away what its old end left."""
    for name in (FINAL, SUMMARY, "eval/after.json"):
        (run.path / name).unlink(missing_ok=True)
    run.write_manifest(config, {"run": config.seed}, data_fingerprints(config))  # first: it vouches for the next
    run.write_text(CONFIG, dump_config(config))


def memory_of(config: TrainConfig, parts: Parts, device: torch.device | None = None) -> MemoryEstimate | None:
    """What a run will need, at the sizes of its first step; nothing is loaded. None: it cannot be foretold.

    ``device`` stands for the configuration's; it need not be there. Raises InputError for a row that cannot be read.
    """
    require_extras(config)
    held_out = [prompt for prompts in parts.guard.prompts.values() for prompt in prompts]
    prompts = prompts_of_step(parts.source, config, 0)
    return estimate_memory(config, prompts, held_out, device, parts.require_readable)


def require_room(config: TrainConfig, parts: Parts) -> None:
    """Raises InputError, with what to change, if a large model would not fit; small ones are not looked at."""
    device = pick_device(config.device)
    if worth_a_look(policy_folder(config.policy), device):
        require_memory(memory_of(config, parts), device, f"policy={config.policy}")


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
    declared = getattr(policy_class(base), "writes", None)
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
        require_moved(policy, config.adapter, [k for k, s in config.sections(policy.writes).items() if s.weight])
        add_adapter(policy, config.adapter, name, derive_seed(config.seed, "adapter"))
    if isinstance(policy, MoTPolicy) and config.rollout.image_size is not None:
        policy.towers.free_grid(config.rollout.image_size)  # raises InputError for a size that it does not draw
    return as_configured(policy, config), base


def as_configured(policy: Policy, config: TrainConfig) -> Policy:
    """The policy, told in which dtype to multiply and how much goes through it at once."""
    if config.precision.compute is not None:
        if not isinstance(policy, MoTPolicy):
            raise InputError("precision.compute: this policy computes in the dtype of its weights: leave it out")
        policy.compute_in(DTYPES[config.precision.compute])
    config.limits.apply(policy)
    return policy


def begin(
    run: RunDirectory,
    config: TrainConfig,
    policy: Policy,
    base: Path,
    wire: Wire = SOLO,
    splits: Mapping[str, Any] | None = None,
) -> RunState:
    """A fresh state; the weights it starts from are kept in the run, the manifest says what they are.

    ``splits``: what ``require_apart`` found. Any: JSON.
    """
    keep_start(run, policy)
    data = {**data_fingerprints(config), **({} if splits is None else {"splits": splits})}
    run.write_manifest(config, {"run": config.seed}, data, {config.policy: fingerprint(base)})
    return RunState.start(policy, config, wire)


def go_on(run: RunDirectory, config: TrainConfig, base: str | None = None, wire: Wire = SOLO) -> RunState:
    """The state of the last whole checkpoint; metrics and scores that came after it are dropped.

    That of step 0 is made anew, with what is looked at before the first step.
    """
    verify_checkpoint(run.path / START)
    state = RunState.start(loaded(run.path / START, config, base), config, wire)
    last = latest_checkpoint(run.path)
    if last is not None and checkpoint_step(last):
        state.load(last, everybody=False)
    prune_checkpoints(run.path, config.keep_checkpoints, keep=state.best_steps)  # what a kill left beside the last
    run.truncate_metrics(state.step or -1)
    score_record.truncate(run, state.step or -1)
    run.write_manifest(config, {"run": config.seed}, data_fingerprints(config))
    return state


def loaded(model: Path, config: TrainConfig, base: str | None) -> Policy:
    """A policy that the run wrote, set up as configured; ``base``: as ``load_policy`` takes it."""
    return as_configured(load_policy(model, config.device, config.weights_dtype, base), config)


def helping_policies(setup: Setup, wire: Wire) -> tuple[Policies, Shards | None]:
    """The policies of a process that helps a run, and what it keeps of offloaded ones."""
    torch.set_num_threads(setup.config.threads)
    allow_code(setup.config.allow_code)
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
        except BaseException as error:
            run.leave(error)
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
        return is_there(self.run.path / FINAL)

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
            tree = load_state(last / STATE, finite=True)
            with shaped(str(last / STATE / "state.json"), "use another checkpoint"):
                copy_weights(self.trainer.policy, tree["policy"])
                copy_weights(self.trainer.average, tree["average"])
                self.trainer.optimizers.load_state(tree["optimizers"])
                if self.trainer.representation is not None:
                    self.trainer.representation.load(tree["representation"])
                self.trainer.step_number, self.seconds = int(tree["step"]), float(tree["seconds"])
            prune_checkpoints(self.run.path, self.config.keep_checkpoints)
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
