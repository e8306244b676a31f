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
from lvrpo.data.base import PromptSource
from lvrpo.distributed import gather, relay_errors, world_size
from lvrpo.errors import ContractError
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import START
from lvrpo.registry import allow_code
from lvrpo.rewards.row import RewardSource
from lvrpo.rewards.table import MOST_FAILED
from lvrpo.sampling import derive_seed
from lvrpo.training import rollout_log
from lvrpo.training.advantages import segment_advantages, trajectory_advantages, trajectory_rewards
from lvrpo.training.base_trainer import BaseTrainer, Observer, keep_start, require_start
from lvrpo.training.checkpoint import fingerprint
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import group_successes, sample_local, score_local
from lvrpo.training.gradients import TaskGradients
from lvrpo.training.judge import judge_drift
from lvrpo.training.losses import objectives_of
from lvrpo.training.losses.base import Advantages, Metrics, Objective
from lvrpo.training.losses.flow import FreshNoiseConfig
from lvrpo.training.losses.grpo import PolicyGradientConfig
from lvrpo.training.losses.tokens import recompute_behavior_logprobs
from lvrpo.training.microbatches import by_kind, microbatches, minibatches, rounds, with_reference_outputs
from lvrpo.training.optimizer import Optimizers
from lvrpo.training.policies import Policies
from lvrpo.training.preflight import check_before_first_step, check_first_update
from lvrpo.training.reward_metrics import reward_means
from lvrpo.training.rollout import Rollouts, prompt_seeds, prompts_of_step, resample
from lvrpo.training.rollout_engine import Sampler, open_engine
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.setup import (
    config_of_resumed,
    data_fingerprints,
    lengthen,
    loaded_policy,
    open_policy,
    require_room,
)
from lvrpo.training.sources import NO_CUSTOM_PARTS, CustomParts, Parts, open_parts
from lvrpo.training.splits import require_disjoint_splits
from lvrpo.training.state import TrainState
from lvrpo.training.validation import Validator, apply_validation, check_overoptimization
from lvrpo.types import Group, Prompt, RewardTable, SegmentKind

MAX_BAD_GRADIENTS = 3
"""A step whose gradient is not finite leaves the weights alone; after so many in a row the run stops."""


@dataclass
class Trainer(BaseTrainer[TrainConfig, TrainState]):
    """An alignment run, ready to start or to go on."""

    command: ClassVar[str] = "train"
    config: TrainConfig
    run: RunDirectory
    state: TrainState
    parts: Parts
    """Prompts, rewards, validation."""
    base: str | None = None
    """The MODEL below the run's adapter, where it is not the one that its files name."""
    objectives: Sequence[Objective] = field(init=False)
    """What trains each kind of segment that the policy writes."""

    def __post_init__(self) -> None:
        self.objectives = objectives_of(self.config, self.state.policies.policy.segment_kinds)

    # --- opening a run ---

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        folder: Path,
        given: CustomParts = NO_CUSTOM_PARTS,
        files: Mapping[str, Any] = MappingProxyType({}),
    ) -> Self:
        """Resolves every part before it creates the run directory: wrong input leaves no trace.

        ``given``: parts that a caller in Python hands over. ``files``: what else a run is resumed by, JSON by name; it
        is written before there is anything to resume. Any: JSON.
        """
        allow_code(config.allow_code)
        torch.set_num_threads(config.threads)
        with relay_errors():
            parts = open_parts(config, given)
            splits = require_disjoint_splits(config)
            require_room(config, parts)
            policy, base = open_policy(config)
            parts.require_readable(policy)
        run = RunDirectory.create(folder, config)
        try:
            for name, content in files.items():
                run.write_json(name, content)
            keep_start(run, policy)
            data = {**data_fingerprints(config), "splits": splits}
            run.write_manifest(config, {"run": config.seed}, data, {config.policy: fingerprint(base)})
            return cls(config, run, TrainState.start(policy, config), parts)
        except BaseException as error:
            run.leave(error)
            raise

    @classmethod
    def resume(
        cls,
        folder: Path,
        config: TrainConfig | None = None,
        base: str | None = None,
        given: CustomParts = NO_CUSTOM_PARTS,
    ) -> Self:
        """Goes on from the last whole checkpoint; ``config``, where given, is that of the run, or asks for more steps.

        A run that is made longer follows the schedule of its new length from where it stands: the learning rates of
        steps that are done stay. ``base``: where the base of the run's adapter lies now.
        """
        run = RunDirectory.open(folder)
        try:
            config, longer = config_of_resumed(run, config)
            with relay_errors():
                parts = open_parts(config, given)
                policy = loaded_policy(require_start(run), config, base)
            if longer:
                lengthen(run, config)
            trainer = cls(config, run, TrainState.start(policy, config), parts, base)
            trainer.restore()
            rollout_log.truncate(run, trainer.state.step or -1)
            run.write_manifest(config, {"run": config.seed}, data_fingerprints(config))
        except BaseException:
            run.close()
            raise
        return trainer

    @property
    def validator(self) -> Validator:
        """What watches held-out rows."""
        return self.parts.validator

    @property
    def source(self) -> PromptSource:
        """The prompts that are trained on."""
        return self.parts.source

    @property
    def rewards(self) -> Sequence[RewardSource]:
        """What scores them."""
        return self.parts.rewards

    # --- training ---

    def train(self, observe: Observer = lambda row: None, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Steps until ``config.steps``, an interruption (a checkpoint is then written) or validation's stop.

        Returns whether it came to its end, and names validation's best checkpoint if so.
        """
        if self.finished:
            return True
        config, run, state, policies = self.config, self.run, self.state, self.state.policies
        with open_engine(config, run.path / START, self.base) as engine:
            if state.step == 0:
                self._before_first_step(engine)
            rollouts, stopped = Rollouts(policies, config, engine), False
            while (step := state.step) < config.steps and not stopped:
                with self.logged_step(observe) as row:
                    looks = (step + 1) % config.validation.every == 0 or step + 1 == config.steps
                    with self.saved_if_it_fails():  # nothing has changed yet since the last step
                        with relay_errors():
                            prompts = prompts_of_step(self.source, config, step)
                        groups = rollouts.groups(prompts, step)
                        with policies.use("judge") as judge:
                            table = score_local(self.rewards, groups, judge, step, MOST_FAILED)
                        if config.judge.drift_due(step + 1, looks):
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
                        check_first_update(run, policies, trained, scores, config.advantages.std_floor)
                    right = group_successes(groups)
                    row |= reward_means("reward", table, right)
                    if state.judge is not None:
                        row |= state.judge.after_step(state.step, policies, self.parts.judge_rows)
                    of_trained = right if trained is groups else group_successes(trained)
                    self._record(trained, scores, of_trained, advantages)
                    row["lr_scale"] = state.optimizers[0].rate(step) * lr_scale
                    if step % config.reference_eval_every == 0:
                        row |= self._control(prompts, step)
                    if state.step % config.samples_every == 0 or state.step == config.steps:
                        rollout_log.write_samples(run, state.step, groups, table, right)
                    if state.overoptimization is not None:
                        state.overoptimization.add(state.step, groups, table, right)
                    if looks:
                        self.wait_for_checkpoint()  # it may be rolled back to
                        report = self.validator.validate(policies, state.validation, state.step)
                        stopped = apply_validation(config, run, state, report, row) or check_overoptimization(
                            config, run, state, self.validator, row
                        )
                stop = self.asked_to_stop(interrupted)
                self.save_if_due(last=stopped or stop or state.step == config.steps)
                if stop and state.step < config.steps:
                    return False
        self.finish(state.validation.best_step)
        return True

    def _record(
        self, groups: Sequence[Group], table: RewardTable, right: Mapping[int, list[float]], advantages: Advantages
    ) -> None:
        """Writes the scores and advantages of a step."""
        judged = trajectory_rewards(table, groups, self.config.advantages)
        whole = trajectory_advantages(advantages, groups)
        rollout_log.write_step(self.run, self.state.step, groups, table, right, whole, judged)

    def _before_first_step(self, engine: Sampler | None) -> None:
        """The checks of step 0, and what validation sees before anything is trained."""
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

    def _control(self, prompts: Sequence[Prompt], step: int) -> dict[str, float | str]:
        policies = self.state.policies
        control = control_rollout(policies, prompts, self.config, step)
        with policies.use("judge") as judge:
            table = score_local(self.rewards, control, judge, step)
        right = group_successes(control)
        rollout_log.write_control(self.run, self.state.step, control, table, right, self.config.reference_eval_every)
        return reward_means("control", table, right)

    def result(self) -> Policy:
        """The weights that validation found best, read from their checkpoint."""
        return loaded_policy(self.run.path, self.config, self.base)

    def load_result(self) -> None:
        """The averaged weights become those that validation found best."""
        self.state.load_average(self.run.checkpoint_dir(self.state.validation.best_step))


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
    """The optimizer steps of one rollout: one, unless ``num_minibatches`` or different ``lr_scale`` ask for more.

    ``groups``: those of all ranks, of which a rank differentiates its own, with their ``advantages``. ``optimizers``:
    one per phase (``TrainConfig.phases``). Every task and kind of segment adds its gradient, which
    ``config.gradient_mixing`` may weigh against those of other tasks.
    """
    metrics, writes = Metrics(), policies.policy.segment_kinds
    rescored: list[SegmentKind] = [
        kind
        for kind, section in config.sections(writes).items()
        if isinstance(section, PolicyGradientConfig) and section.importance_cap is not None
    ]
    if rescored:
        with policies.use("policy") as policy:
            groups = recompute_behavior_logprobs(policy, groups, rescored)
    objective_of = by_kind(objectives)
    audited = bool(config.gradient_audit.every) and step % config.gradient_audit.every == 0
    for part, A in minibatches(groups, advantages, config.num_minibatches):
        by_task = TaskGradients(policies.policy) if audited or config.gradient_mixing != "sum" else None
        each = by_task is not None or policies.reduces_per_microbatch
        for (kinds, lr), optimizer in zip(config.phases(writes), optimizers, strict=True):
            trained = [objective for objective in objectives if objective.kind in kinds]
            batches = microbatches(policies.policy, trained, part, A, config, step, metrics)
            batches = with_reference_outputs(policies, trained, batches)
            logged = metrics if world_size() == 1 else Metrics()
            with policies.use("policy") as policy:
                for task, together in rounds(batches, each):
                    with relay_errors():
                        for batch in together:
                            output = objective_of[batch.kind].loss(policy, batch)
                            (batch.weight * output.loss).backward()
                            logged.add_all(output.metrics, batch.share)
                    policies.reduce_gradients()
                    if by_task is not None and task is not None:
                        by_task.take(task)
            for other in gather(logged) if logged is not metrics else ():
                metrics.include(other)
            if by_task is not None:
                by_task.give_back(config.gradient_mixing, derive_seed(config.seed, "gradient mixing", step))
            for expert, norm in optimizer.step(step, lr * lr_scale).items():
                metrics.add(f"grad_norm/{expert}", norm)
        if by_task is not None and audited:
            by_task.report(metrics)
    return metrics


def control_rollout(policies: Policies, prompts: Sequence[Prompt], config: TrainConfig, step: int) -> list[Group]:
    """The reference on the very same prompts, since prompts drift in difficulty."""
    sampling = replace(config.sampling(step), group_size=config.reference_eval_group_size)
    seeds = prompt_seeds(prompts, config.seed, "rollout", step)
    with policies.use("reference") as reference:
        return sample_local(reference, prompts, sampling, seeds)
