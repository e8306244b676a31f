"""The training loop: data -> rollout -> rewards -> advantages -> loss -> step, in that order."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from lvrpo.algorithms import old_policy_decay
from lvrpo.data.sources import PromptSource
from lvrpo.errors import ContractError
from lvrpo.policies.base import Sampling
from lvrpo.rewards.success import scorable, successes
from lvrpo.rewards.table import MOST_FAILED, RewardSource, score_groups
from lvrpo.sampling import derive_seed
from lvrpo.training import contract, samples, score_record
from lvrpo.training.advantages import judged_of_whole, of_whole, segment_advantages
from lvrpo.training.checkpoint import prune_checkpoints
from lvrpo.training.config import TrainConfig
from lvrpo.training.failures import failed_scores, saved_if_it_fails
from lvrpo.training.guard import Guard, guarded, turned
from lvrpo.training.host_memory import return_freed_memory
from lvrpo.training.judge import NOTHING_HELD_OUT, HeldOut, judge_drift
from lvrpo.training.objective import Policies
from lvrpo.training.rollout import Rollouts, prompt_seeds, prompts_of_step, refill
from lvrpo.training.run_directory import RunDirectory
from lvrpo.training.state import RunState
from lvrpo.training.team import ALONE, Team
from lvrpo.training.update import take_steps
from lvrpo.types import Group, Prompt, RewardTable

Observer = Callable[[Mapping[str, Any]], None]
"""Called with the metrics row of every step."""


MAX_BAD_GRADIENTS = 3
"""A step whose gradient is not finite leaves the weights alone; after so many in a row the run stops."""


def align(
    config: TrainConfig,
    run: RunDirectory,
    state: RunState,
    source: PromptSource,
    rewards: Sequence[RewardSource],
    guard: Guard,
    observe: Observer = lambda row: None,
    interrupted: Callable[[], bool] = lambda: False,
    held_out: HeldOut = NOTHING_HELD_OUT,
    team: Team = ALONE,
) -> RunState:
    """Runs until ``config.steps``, an interruption (a checkpoint is then written) or the guard's stop.

    ``held_out``: what decides on a new judge, where the configuration asks for one. ``team``: who shares the work.
    """
    policies = team.shared(state.policies)  # to sample and judge; what is trained and saved is the state's
    if state.step == 0:
        _check_contract(config, run, state, source, rewards)
        report = guard.look(policies.average, state.guard, 0, policies.reference)
        score_record.write_look(run, 0, report.scores, config.guard.every)
        run.append_metrics({"step": 0, **report.row()})
        state.save(run)
    stopped = False
    sampled = Rollouts(policies, config)
    while state.step < config.steps and not stopped:
        started = time.perf_counter()
        step = state.step
        row: dict[str, Any] = {"step": step + 1}

        looks = (step + 1) % config.guard.every == 0 or step + 1 == config.steps
        with saved_if_it_fails(run, state):  # nothing has changed yet since the last step
            prompts = prompts_of_step(source, config, step)
            groups = sampled.groups(prompts, step)
            table = score_groups(rewards, groups, policies.judge, step, MOST_FAILED)
            if config.judge.drift_due(step + 1, looks):
                row |= judge_drift(rewards, groups, table, policies.judge, policies.live)
            trained, scores = groups, table
            if config.rollout.refill_budget:
                trained, scores, counts = refill(policies, source, rewards, groups, table, config, step)
                row |= counts
        advantages = segment_advantages(scores, trained, config.advantages)
        metrics = take_steps(
            state.policies, state.optimizers, trained, advantages, config, step, state.guard.lr_scale, team
        ).means()
        norms = [value for name, value in metrics.items() if name.startswith("grad_norm/")]
        state.bad_gradients = 0 if all(map(math.isfinite, norms)) else state.bad_gradients + 1
        if state.bad_gradients >= MAX_BAD_GRADIENTS:
            raise ContractError(
                f"gradients were not finite in {MAX_BAD_GRADIENTS} steps in a row up to step {step + 1}: lower the "
                "learning rates, or resume from an earlier checkpoint"
            )
        if state.policies.old is not state.policies.live:
            decay = old_policy_decay(step, rate=config.flow.old_decay_rate, ceiling=config.flow.old_decay_ceiling)
            state.average("old", decay)
        decay = min(config.average_decay, step / (step + 10))
        state.average("average", decay)
        state.step += 1

        if step == 0:
            _check_first_update(run, state, trained, scores, config.advantages.std_floor)
        row |= metrics
        row |= reward_means("reward", table, groups)
        if state.judge is not None:
            row |= state.judge.after_step(state.step, state.policies.live, state.policies.average, held_out)
        team.moved()
        judged = judged_of_whole(scores, trained, config.advantages)
        score_record.write_step(run, state.step, trained, scores, of_whole(advantages, trained), judged)
        row["lr_scale"] = state.optimizers[0].rate(step) * state.guard.lr_scale
        if step % config.control_every == 0:
            control = control_rollout(policies, prompts, config, step)
            control_table = score_groups(rewards, control, policies.judge, step)
            row |= reward_means("control", control_table, control)
            score_record.write_control(run, state.step, control, control_table, config.control_every)
        if state.step % config.samples_every == 0 or state.step == config.steps:
            samples.write(run, state.step, groups, table)
        if state.turn is not None:
            state.turn.add(state.step, groups, table)
        if looks:
            report = guard.look(policies.average, state.guard, state.step, policies.reference)
            stopped = guarded(config, run, state, report, row) or turned(config, run, state, guard, row)
            team.moved()
        state.seconds += time.perf_counter() - started
        row |= {"seconds": state.seconds, "seconds_left": state.seconds / state.step * (config.steps - state.step)}
        run.append_metrics(row)
        observe(row)
        return_freed_memory()
        last = stopped or interrupted() or state.step == config.steps
        if state.step % config.checkpoint_every == 0 or last or state.step in state.best_steps:
            state.save(run)
            prune_checkpoints(run.path, config.keep_checkpoints, keep=state.best_steps)
        if interrupted():
            break
    return state


def control_rollout(policies: Policies, prompts: Sequence[Prompt], config: TrainConfig, step: int) -> list[Group]:
    """The reference on the very same prompts, since prompts drift in difficulty."""
    sampling = replace(config.sampling(step), group_size=config.control_group_size)
    seeds = prompt_seeds(prompts, config.seed, "rollout", step)
    return policies.reference.sample(prompts, sampling, seeds)


def reward_means(prefix: str, table: RewardTable, groups: Sequence[Group]) -> dict[str, float | str]:
    """Mean and failures of every reward per task, and the share of outputs that are right as a whole."""
    out: dict[str, float | str] = {}
    judged = [p for p, group in enumerate(groups) if scorable(group.prompt)]
    right = dict(zip(judged, successes([groups[p] for p in judged]), strict=True))
    for task in dict.fromkeys(table.tasks):
        rows = [p for p, name in enumerate(table.tasks) if name == task]
        known = [right[p] for p in rows if p in right]
        if known:
            out[f"{prefix}/{task}/success"] = float(torch.tensor(known).mean())
        for k, name in enumerate(table.names):
            valid = table.mask[rows, :, k]
            if valid.any():
                out[f"{prefix}/{task}/{name}"] = float(table.scores[rows, :, k][valid].mean())
            if name in table.cut and valid.any():
                out[f"{prefix}_cut/{task}/{name}"] = float(table.cut[name][rows][valid].float().mean())
            if name in table.noise and (share := noise_share(table, k, rows)) is not None:
                out[f"{prefix}_noise/{task}/{name}"] = share
            out |= failed_scores(prefix, table, rows, k)
    return out


def noise_share(table: RewardTable, k: int, rows: Sequence[int]) -> float | None:
    """The share of a reward's variance inside groups that its own estimate is responsible for; None where unknown."""
    noise, mask = table.noise[table.names[k]][rows], table.mask[rows, :, k]
    whole = mask.all(dim=1) & noise.isfinite().all(dim=1)
    if not whole.any():
        return None
    spread = table.scores[rows, :, k][whole].var(dim=1, correction=0).sum()
    return float(noise[whole].mean(dim=1).sum() / spread) if spread > 0 else None


def contract_checks(
    config: TrainConfig, policies: Policies, source: PromptSource, rewards: Sequence[RewardSource]
) -> list[contract.Check]:
    """The step-0 contract on a few prompts of every task, with stochastic steps so that drawings have log-probs too."""
    prompts = [
        source.prompt(task, i) for task, count in config.data.prompts_per_step.items() for i in range(min(count, 8))
    ]
    sampling = config.sampling(0)
    if sampling.sampler == "ode":
        sampling = replace(sampling, sampler="flow_sde", window=tuple(range(min(2, sampling.num_steps - 1))))
    seeds = [derive_seed(config.seed, "contract", prompt.id) for prompt in prompts]
    groups = policies.live.sample(prompts, sampling, seeds)
    table = score_groups(rewards, groups, policies.judge)
    may_fail = [source.config.title for source in rewards if source.config.max_failed is not None]
    return contract.step_zero_contract(policies.live, groups, table, config.advantages.std_floor, may_fail)


def _check_contract(
    config: TrainConfig, run: RunDirectory, state: RunState, source: PromptSource, rewards: Sequence[RewardSource]
) -> None:
    checks = contract_checks(config, state.policies, source, rewards)
    run.write_json("contract.json", [check.as_dict() for check in checks])
    contract.require(checks)


def _check_first_update(
    run: RunDirectory, state: RunState, groups: Sequence[Group], table: RewardTable, std_floor: float
) -> None:
    checks = contract.first_update_checks(state.policies.live, state.policies.reference, groups, table, std_floor)
    run.write_json(
        "contract.json", [*run.read_json("contract.json", list[dict[str, Any]]), *(check.as_dict() for check in checks)]
    )
    contract.require(checks)


def evaluation_sampling(config: TrainConfig, temperature: float = 0.0, guidance_scale: float = 1.0) -> Sampling:
    """One output per prompt, with the rollout's number of steps."""
    rollout_config = config.rollout
    return Sampling(
        group_size=1,
        temperature=temperature,
        max_new_tokens=rollout_config.max_new_tokens,
        num_steps=rollout_config.num_steps,
        timestep_shift=rollout_config.timestep_shift,
        solver=rollout_config.solver,
        guidance_scale=guidance_scale,
        image_size=rollout_config.image_size,
        image_temperature=rollout_config.image_temperature,
        choice_temperature=rollout_config.choice_temperature,
    )
