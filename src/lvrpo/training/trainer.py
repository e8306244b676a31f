"""The trainer: data -> rollout -> rewards -> advantages -> loss -> step, in that order."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch

from lvrpo.algorithms import old_policy_decay
from lvrpo.data.base import Task
from lvrpo.distributed import gather, relay_errors, world_size
from lvrpo.errors import ContractError
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import START, pick_device
from lvrpo.registry import allow_code
from lvrpo.rewards.config import ConfiguredReward
from lvrpo.rewards.table import MOST_FAILED
from lvrpo.sampling import derive_seed
from lvrpo.training import rollout_log
from lvrpo.training.advantages import segment_advantages, trajectory_advantages, trajectory_rewards
from lvrpo.training.base_trainer import BaseTrainer, Observer, require_start, save_start
from lvrpo.training.checkpoint import fingerprint
from lvrpo.training.components import NO_CUSTOM_COMPONENTS, Components, CustomComponents, open_components
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import group_successes, sample_local, score_local
from lvrpo.training.gradients import GradientsByTask
from lvrpo.training.judge import judge_drift
from lvrpo.training.leakage import require_disjoint_splits
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import Advantages, Metrics, Objective
from lvrpo.training.losses.flow import FreshNoiseConfig
from lvrpo.training.losses.grpo import PolicyGradientConfig
from lvrpo.training.losses.tokens import recompute_behavior_logprobs
from lvrpo.training.memory import keep_freed_memory
from lvrpo.training.microbatches import by_kind, microbatches, minibatches, reduction_rounds, with_reference_outputs
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.policies import Policies
from lvrpo.training.preflight import check_before_first_step, check_first_update
from lvrpo.training.reward_metrics import reward_means
from lvrpo.training.rollout import Rollouts, prompt_seeds, prompts_of_step, resample
from lvrpo.training.rollout_engine import EngineSampler, open_engine
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.samples import write_samples
from lvrpo.training.setup import (
    data_fingerprints,
    extend_run,
    load_run_policy,
    open_policy,
    require_enough_memory,
    require_judge,
    require_same_rows,
    resumed_config,
)
from lvrpo.training.state import TrainState
from lvrpo.training.trackers import require_trackers, start_trackers
from lvrpo.training.validation import Validator, apply_validation, check_overoptimization
from lvrpo.types import Group, Prompt, RewardTable, SegmentKind

REFERENCE_GROUP_SIZE = 2
"""Outputs per prompt that the reference samples as a baseline."""
MAX_BAD_GRADIENTS = 3
"""Steps with a non-finite gradient are skipped; after this many in a row the run stops."""


@dataclass
class Trainer(BaseTrainer[TrainConfig, TrainState]):
    """An alignment run."""

    command: ClassVar[str] = "train"
    config: TrainConfig
    run: RunDirectory
    state: TrainState
    components: Components
    """Prompts, rewards, validation."""
    base: str | None = None
    """The base MODEL of the run's adapter, to override the one that its files name."""
    objectives: Sequence[Objective] = field(init=False)
    """One per kind of segment that the policy generates."""

    def __post_init__(self) -> None:
        self.objectives = objectives_of(self.config, self.state.policies.policy.segment_kinds)

    # --- opening a run ---

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        folder: Path,
        custom: CustomComponents = NO_CUSTOM_COMPONENTS,
        files: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Starts a run; input is validated before the run directory is created.

        ``custom``: components that a Python caller passes. ``files``: additional JSON files of the run directory, by
        name, which resuming needs; written first. Any: JSON.
        """
        allow_code(config.allow_code)
        torch.set_num_threads(config.threads)
        with relay_errors():
            components = open_components(config, custom)
            splits = require_disjoint_splits(config, None if custom.sources else components.rows)
            require_judge(config, components)
            require_enough_memory(config, components)
            policy, base = open_policy(config)
            components.require_readable(policy)
            components.require_possible(policy, config)
        run = RunDirectory.create(folder, config)
        try:
            for name, content in files.items():
                run.write_json(name, content)
            save_start(run, policy)
            data = {**data_fingerprints(config, components), "splits": splits}
            run.write_manifest(config, {"run": config.seed}, data, {config.policy: fingerprint(base)})
            return cls(config, run, TrainState.start(policy, config), components)
        except BaseException as error:  # interrupts too: the lock is released
            run.close_on_exit(error)
            raise

    @classmethod
    def resume(
        cls,
        folder: Path,
        config: TrainConfig | None = None,
        base: str | None = None,
        custom: CustomComponents = NO_CUSTOM_COMPONENTS,
    ) -> Self:
        """Resumes from the last complete checkpoint; ``config`` may differ from that of the run by more ``steps`` only.

        An extended run follows the learning rate schedule of its new length from its current step on. ``base``: new
        location of the base model of the run's adapter.
        """
        run = RunDirectory.open(folder)
        try:
            config, extended = resumed_config(run, config)
            require_trackers(config.trackers)
            with relay_errors():
                components = open_components(config, custom)
                data = data_fingerprints(config, components)
                require_same_rows(run, data)
                policy = load_run_policy(require_start(run), config, base)
            trainer = cls(config, run, TrainState.start(policy, config), components, base)
            trainer.restore()
            if extended:  # the results of the shorter run stay where it cannot go on
                extend_run(run, config, data)
            rollout_log.truncate(run, trainer.state.step or -1)
            run.write_manifest(config, {"run": config.seed}, data)
        except BaseException:  # interrupts too: the lock is released
            run.close()
            raise
        return trainer

    @property
    def validator(self) -> Validator:
        """Scores held-out prompts."""
        return self.components.validator

    @property
    def source(self) -> Task:
        """The training prompts."""
        return self.components.source

    @property
    def rewards(self) -> Sequence[ConfiguredReward]:
        """The rewards of the training prompts."""
        return self.components.rewards

    # --- training ---

    def train(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Trains until ``config.steps``, early stopping by validation, or an interruption (after a checkpoint).

        Returns whether the run is finished; the best checkpoint of validation is then its result.
        """
        start_trackers(self.run, self.config.trackers)
        if self.finished:
            return True
        config, run, state, policies = self.config, self.run, self.state, self.state.policies
        if pick_device(config.device).type == "cpu":
            keep_freed_memory()
        with open_engine(config, policies.policy, run.path / START, self.base) as engine:
            if state.step == 0:
                self._before_first_step(engine)
            rollouts = Rollouts(policies, config, engine, self.rewards, state.ahead)
            while (step := state.step) < config.steps and not self._stopped:
                with self.logged_step(observe) as row:
                    validates = (step + 1) % config.validation.every == 0 or step + 1 == config.steps
                    with self.checkpoint_on_error():  # the state is still that of the last step
                        with relay_errors():
                            prompts = prompts_of_step(self.source, config, step)
                        groups = rollouts.groups(prompts, step)
                        if state.ahead is not None and step + 1 < config.steps:
                            with relay_errors():
                                coming = prompts_of_step(self.source, config, step + 1)
                            rollouts.start(coming, step + 1)
                        with policies.use("judge") as judge:
                            table = score_local(self.rewards, groups, judge, step, MOST_FAILED)
                        if config.judge.drift_due(step + 1, validates):
                            row |= judge_drift(self.rewards, groups, table, policies)
                        trained, scores = groups, table
                        if config.rollout.max_resamples:
                            args = (rollouts, self.source, self.rewards, groups, table, step)
                            trained, scores, counts = resample(*args)
                            row |= counts
                    advantages = segment_advantages(scores, trained, config.advantages)
                    lr_scale = state.validation.lr_scale
                    row |= train_step(
                        policies, self.objectives, state.optimizers, trained, advantages, config, step, lr_scale
                    ).means()
                    self._require_finite_gradients(row, step)
                    flow = config.flow
                    if policies.has("old") and isinstance(flow, FreshNoiseConfig):
                        decay = old_policy_decay(step, rate=flow.old_decay_rate, ceiling=flow.old_decay_ceiling)
                        policies.weights.lerp("old", decay)
                    policies.weights.lerp("ema", min(config.ema_decay, step / (step + 10)))
                    state.step += 1
                    if step == 0:
                        self.wait_for_checkpoint()  # a run that is refused is deleted
                        check_first_update(run, policies, trained, scores, config.advantages.std_floor)
                    successes = group_successes(groups, self.components.scorer)
                    row |= reward_means("reward", table, successes)
                    if state.judge is not None:
                        row |= state.judge.update(state.step, policies, self.components.judge_rows)
                    trained_successes = (
                        successes if trained is groups else group_successes(trained, self.components.scorer)
                    )
                    self._record(trained, scores, trained_successes, advantages)
                    row["lr_scale"] = state.optimizers[0].rate(step) * lr_scale
                    if step % config.reference_eval_every == 0:
                        row |= self._evaluate_reference(prompts, step)
                    if state.step % config.samples_every == 0 or state.step == config.steps:
                        write_samples(run, state.step, groups, table, successes)
                    if state.overoptimization is not None:
                        state.overoptimization.add(state.step, groups, table, successes)
                    if validates:
                        self.wait_for_checkpoint()  # a rollback may load it
                        report = self.validator.validate(policies, state.validation, state.step)
                        if apply_validation(config, run, state, report, row) or check_overoptimization(
                            config, run, state, self.validator, row
                        ):
                            state.validation.stopped = config.steps
                stop = self.stop_requested(interrupted)
                self.save_if_due(last=self._stopped or stop or state.step == config.steps)
                if stop and not self._stopped and state.step < config.steps:
                    return False
        self.finish(state.validation.best_step)
        return True

    @property
    def _stopped(self) -> bool:
        """Whether validation stopped the run early."""
        return self.state.validation.stopped == self.config.steps

    def _record(
        self, groups: Sequence[Group], table: RewardTable, successes: Mapping[int, list[float]], advantages: Advantages
    ) -> None:
        """Writes the scores and advantages of a step."""
        judged = trajectory_rewards(table, groups, self.config.advantages)
        by_trajectory = trajectory_advantages(advantages, groups)
        rollout_log.write_step(self.run, self.state.step, groups, table, successes, by_trajectory, judged)

    def _before_first_step(self, engine: EngineSampler | None) -> None:
        """Preflight checks, validation of the initial weights, and the checkpoint of step 0."""
        state, policies = self.state, self.state.policies
        check_before_first_step(self.run, self.config, policies, self.source, self.rewards, engine)
        report = self.validator.validate(policies, state.validation, 0)
        rollout_log.write_validation(self.run, 0, report.scores, self.config.validation.every)
        self.run.append_metrics({"step": 0, **report.row()})
        self.save()

    def _require_finite_gradients(self, metrics: Mapping[str, Any], step: int) -> None:
        norms = [value for name, value in metrics.items() if name.startswith("grad_norm/")]
        self.state.bad_gradients = 0 if all(map(math.isfinite, norms)) else self.state.bad_gradients + 1
        if self.state.bad_gradients >= MAX_BAD_GRADIENTS:
            raise ContractError(
                f"gradients were not finite in {MAX_BAD_GRADIENTS} steps in a row up to step {step + 1}: lower the "
                "learning rates, or resume from an earlier checkpoint"
            )

    def _evaluate_reference(self, prompts: Sequence[Prompt], step: int) -> dict[str, float | str]:
        policies = self.state.policies
        control = reference_rollout(policies, prompts, self.config, step)
        with policies.use("judge") as judge:
            table = score_local(self.rewards, control, judge, step)
        successes = group_successes(control, self.components.scorer)
        rollout_log.write_control(
            self.run, self.state.step, control, table, successes, self.config.reference_eval_every
        )
        return reward_means("control", table, successes)

    def result(self) -> Policy:
        """The policy of the best checkpoint."""
        return load_run_policy(self.run.path, self.config, self.base)

    def load_result(self) -> None:
        """Loads the EMA weights of the best checkpoint."""
        self.state.load_ema(self.run.checkpoint_dir(self.state.validation.best_step))


def train_step(
    policies: Policies,
    objectives: Sequence[Objective],
    optimizers: Sequence[Optimizers],
    groups: Sequence[Group],
    advantages: Advantages,
    config: TrainConfig,
    step: int,
    lr_scale: float = 1.0,
) -> Metrics:
    """The optimizer steps of one rollout: one per minibatch and phase (``TrainConfig.phases``).

    ``groups``: those of all ranks, with their ``advantages``; each rank backpropagates its own. ``optimizers``: one per
    phase. Gradients are summed over tasks and kinds of segments, or combined by ``config.gradient_mixing``.
    """
    metrics, segment_kinds = Metrics(), policies.policy.segment_kinds
    rescored: list[SegmentKind] = [
        kind
        for kind, section in config.sections(segment_kinds).items()
        if isinstance(section, PolicyGradientConfig) and section.importance_cap is not None
    ]
    if rescored:
        with policies.use("policy") as policy:
            groups = recompute_behavior_logprobs(policy, groups, rescored)
    objective_of = by_kind(objectives)
    audited = bool(config.gradient_audit.every) and step % config.gradient_audit.every == 0
    for part, A in minibatches(groups, advantages, config.num_minibatches):
        by_task = GradientsByTask(policies.policy) if audited or config.gradient_mixing != "sum" else None
        per_microbatch = by_task is not None or policies.reduces_per_microbatch
        for (kinds, lr), optimizer in zip(config.phases(segment_kinds), optimizers, strict=True):
            trained = [objective for objective in objectives if objective.kind in kinds]
            batches = microbatches(policies.policy, trained, part, A, config, step, metrics)
            batches = with_reference_outputs(policies, trained, batches)
            logged = metrics if world_size() == 1 else Metrics()
            with policies.use("policy") as policy:
                for task, round_batches in reduction_rounds(batches, per_microbatch):
                    with relay_errors():
                        for batch in round_batches:
                            output = objective_of[batch.kind].loss(policy, batch)
                            (batch.weight * output.loss).backward()
                            logged.add_all(output.metrics, batch.share)
                    policies.reduce_gradients()
                    if by_task is not None and task is not None:
                        by_task.store(task)
            for other in gather(logged.fetch()) if logged is not metrics else ():
                metrics.include(other)
            if by_task is not None:
                by_task.write_mixed(config.gradient_mixing, derive_seed(config.seed, "gradient mixing", step))
            for expert, norm in optimizer.step(step, lr * lr_scale).items():
                metrics.add(f"grad_norm/{expert}", norm)
        if by_task is not None and audited:
            by_task.report(metrics)
    return metrics


def reference_rollout(policies: Policies, prompts: Sequence[Prompt], config: TrainConfig, step: int) -> list[Group]:
    """Groups of the reference on the same prompts, as a baseline for prompts of changing difficulty."""
    sampling = replace(config.sampling(step), group_size=REFERENCE_GROUP_SIZE)
    seeds = prompt_seeds(prompts, config.seed, "rollout", step)
    with policies.use("reference") as reference:
        return sample_local(reference, prompts, sampling, seeds)
