"""Preflight checks (the step-0 contract): invariants that must hold before the first update, on a small batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lvrpo.algorithms import k3, signal_mask, velocity_regularizer
from lvrpo.data.base import Task
from lvrpo.distributed import POLICY, is_main, relay_errors
from lvrpo.errors import RefusedRunError
from lvrpo.policies.base import FlowPolicy, RolloutPolicy, require_method
from lvrpo.rewards.config import ConfiguredReward
from lvrpo.rewards.table import score_groups
from lvrpo.sampling import derive_seed
from lvrpo.training.config import TrainConfig
from lvrpo.training.data_parallel import gather_groups
from lvrpo.training.policies import Policies, policy_module
from lvrpo.training.rollout_engine import EngineSampler
from lvrpo.training.run_directory import RunDirectory
from lvrpo.types import (
    SEGMENT_KINDS,
    FlowSegment,
    Group,
    RewardTable,
    ScoredSegment,
    Segment,
    SegmentKind,
    SegmentLogprobs,
    TextSegment,
    Trajectory,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Maximum difference of log-probs between rollout and a replay in another batch, by compute dtype.

In bfloat16 the log-prob of an unlikely token was measured to vary by 1.5e-2 with the batch, those of images by 1e-4,
which is small relative to the clip range. In float32 the last bit of an unlikely token's log-prob is about 1e-6;
different distributions differ by 1e-3 and more."""

ENGINE_DIVERGENCE = 0.05
"""Maximum mean divergence of a rollout engine from the policy, in nats per action (k3); truncated importance weights
correct small ones."""

NAMES: dict[SegmentKind, str] = {
    "text": "text",
    "flow": "image",
    "tokens": "image tokens",
    "masked": "masked image tokens",
}
"""Names of the kinds of segments in checks."""

GROUPS: dict[SegmentKind, str] = {"text": "texts", "flow": "images", "tokens": "images", "masked": "images"}
"""Names of their groups in messages."""


@dataclass(frozen=True)
class Check:
    """One measured invariant."""

    check: str
    value: float
    limit: float
    ok: bool
    detail: str
    """Cause and remedy of a violation."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def rollout_checks(
    policy: RolloutPolicy, groups: Sequence[Group], table: RewardTable, std_floor: float, may_fail: Collection[str] = ()
) -> list[Check]:
    """All checks on a rollout of ``policy``, which has not been updated since.

    ``may_fail``: rewards with their own ``max_failed``, which has been checked.
    """
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    checks = _replay_checks(policy, trajectories) + _group_checks(groups)
    failed = [
        f"{table.names[k]}: {reason}; if it may, say up to which share: max_failed of that reward"
        for (_, _, k), reason in table.reasons.items()
        if reason.startswith("failed") and table.names[k] not in may_fail
    ]
    total = table.mask.numel()
    checks.append(
        Check("scores that failed", len(failed) / total, 0.0, not failed, failed[0] if failed else "no reward failed")
    )
    trained = table.trained()
    signal = signal_mask(trained.scores, trained.mask, std_floor)
    checks.append(
        Check(
            "groups with signal",
            float(signal.float().mean()),
            0.0,
            bool(signal.any()),
            no_signal_reason(trained, std_floor),
        )
    )
    return checks


def weights_check(policies: Policies) -> Check:
    """Trained weights must be float32, also with a 16-bit compute dtype."""
    low = [name for name, p in policies.weights[POLICY].items() if p.dtype != torch.float32]
    return Check(
        "trainable weights not in float32", len(low), 0, not low, f"cast {low[0]} to float32" if low else "none"
    )


def no_signal_reason(table: RewardTable, std_floor: float, rows: Sequence[int] | None = None, of: str = "") -> str:
    """The reason why no group of a table (or of some rows) has signal, and the remedy; ``of``: describes the rows."""
    mask = table.mask if rows is None else table.mask[list(rows)]
    counts = mask.sum(dim=1)  # (P, K)
    if not bool((counts >= 2).any()) and bool(counts.any()):
        return (
            f"no group{of} had two valid scores to compare, {int(counts.max())} at most of {mask.shape[1]} members: "
            "raise rollout.group_size, or use a reward that fails less often"
        )
    return (
        f"no group{of} has a reward that spreads by more than advantages.std_floor={std_floor}: use easier prompts, "
        "other rewards, or a higher temperature"
    )


def _replay_checks(policy: RolloutPolicy, trajectories: Sequence[Trajectory]) -> list[Check]:
    """The replay law per kind of segment: replayed equal behavior log-probs, in the rollout's own and another batch."""
    dtype, device = policy.compute_dtype, next(policy_module(policy).parameters()).device
    limit = TOLERANCE[dtype]
    subset = list(range(1, len(trajectories), 2))[::-1]
    singles = _few_of_each_kind(trajectories) if dtype != torch.float32 else []
    with torch.no_grad():
        replayed = policy.logprobs(trajectories)
        other = policy.logprobs([trajectories[i] for i in subset])
        other += [policy.logprobs([trajectories[i]])[0] for i in singles]
    subset += singles
    at = "" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}"
    checks = []
    for kind, name in NAMES.items():
        log_ratio = _log_ratios(trajectories, replayed, kind)
        if not len(log_ratio):
            continue
        other_log_ratio = _log_ratios([trajectories[i] for i in subset], other, kind)
        same = float(log_ratio.abs().max())
        # a GPU may sum in another order in the same batch
        exact = 0.0 if dtype == torch.float32 and device.type == "cpu" else limit
        remedy = "sampling and training score different distributions: compare guidance, temperature, masks and dtype"
        checks.append(Check(f"replay, {name}, own batch: max |difference|{at}", same, exact, same <= exact, remedy))
        if len(other_log_ratio):
            value = float(other_log_ratio.abs().max())
            checks.append(
                Check(f"replay, {name}, other batch: max |difference|{at}", value, limit, value <= limit, remedy)
            )
        value, ratio_limit = abs(float(log_ratio.exp().mean()) - 1), max(1e-4, limit / 10)
        checks.append(Check(f"ratio, {name}: |mean - 1|", value, ratio_limit, value <= ratio_limit, remedy))
    return checks


def engine_checks(policy: RolloutPolicy, groups: Sequence[Group]) -> list[Check]:
    """Divergence of a rollout engine's behavior log-probs from those of the policy with the same weights."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    with torch.no_grad():
        replayed = policy.logprobs(trajectories)
    checks = []
    for kind, name in NAMES.items():
        log_ratio = _log_ratios(trajectories, replayed, kind)
        if len(log_ratio):
            divergence = float((log_ratio.exp() - 1 - log_ratio).mean())  # k3
            most = f"max |difference| {float(log_ratio.abs().max()):.3g}: compare its dtype, sampling and weights"
            within = divergence <= ENGINE_DIVERGENCE
            checks.append(Check(f"rollout engine, {name}: divergence", divergence, ENGINE_DIVERGENCE, within, most))
    return checks


def _few_of_each_kind(trajectories: Sequence[Trajectory]) -> list[int]:
    """Indices of up to two trajectories with each kind of segment."""
    kinds = [{segment.kind for segment in trajectory.segments} for trajectory in trajectories]
    chosen = [[i for i, found in enumerate(kinds) if kind in found][:2] for kind in SEGMENT_KINDS]
    return [i for indices in chosen for i in indices]


def _log_ratios(
    trajectories: Sequence[Trajectory], replayed: Sequence[Sequence[SegmentLogprobs]], kind: SegmentKind
) -> torch.Tensor:
    pairs = [
        _actions(segment, scored.logprobs.detach().cpu() - segment.behavior_logprobs.cpu())
        for trajectory, row in zip(trajectories, replayed, strict=True)
        for segment, scored in zip(trajectory.segments, row, strict=True)
        if segment.kind == kind
    ]
    return torch.cat(pairs) if pairs else torch.zeros(0)


def _actions(segment: Segment, values: torch.Tensor) -> torch.Tensor:
    """The per-action values of a segment without those of unscored tokens, (A,)."""
    return values[segment.scored.to(values.device)] if isinstance(segment, ScoredSegment) else values


def _group_checks(groups: Sequence[Group]) -> list[Check]:
    """Members of a group must share all settings that their log-probs depend on."""
    mismatched = 0
    for group in groups:
        flows = [s for t in group.trajectories for s in t.segments if isinstance(s, FlowSegment)]
        settings = {
            (
                *(s.sampler, s.trained_steps, tuple(s.timesteps.tolist()), s.noise_level, s.logprob_reduction),
                *(s.guidance_scale, s.image_guidance_scale, s.guidance_renorm, s.guidance_renorm_min),
                *(s.guidance_interval, s.guided_logprobs),
            )
            for s in flows
        }
        token_settings = {_token_settings(t.segments) for t in group.trajectories}
        mismatched += len(settings) > 1 or len(token_settings) > 1
    detail = "the members of a group must share window, grid, sampler, guidance, noise level and temperature"
    return [Check("groups whose members differ in settings", mismatched, 0, mismatched == 0, detail)]


def _token_settings(segments: Sequence[Segment]) -> tuple[object, ...]:
    """Settings of the text and image token segments of a trajectory."""
    return tuple(
        (
            *(s.kind, s.temperature),
            *(() if isinstance(s, TextSegment) else (s.guidance_scale, s.guided_logprobs)),
            *((s.likelihood, s.scored.shape[:-1]) if isinstance(s, ScoredSegment) else ()),
        )
        for s in segments
        if not isinstance(s, FlowSegment)
    )


def first_update_checks(
    policies: Policies, groups: Sequence[Group], table: RewardTable | None = None, std_floor: float = 0.0
) -> list[Check]:
    """After the first update: the weights must have changed, and the KL terms must have a gradient.

    ``table``: of the groups; if they have no signal, that is the reason of a missing gradient.
    """
    changed = policies.weights.differs_from("reference")
    remedy = "check learning rates, task weights and whether any group had signal"
    checks = [Check("weights changed by the first update", float(changed), 1.0, changed, remedy)]
    first = [group.trajectories[0] for group in groups]
    groups_of = policies.policy.parameter_groups()
    trains_text = bool(groups_of["understand"] or groups_of["shared"])
    for kind, name in NAMES.items():
        chosen = [t for t in first if any(s.kind == kind for s in t.segments)]
        chosen = (_of_equal_size(chosen) if kind == "flow" else chosen)[:8]
        if not chosen or (kind == "text" and not trains_text):  # an adapter of the generation expert only
            continue
        with policies.use("reference") as reference, torch.no_grad():
            anchor = _divergence_inputs(reference, chosen, kind)
        with policies.use("policy") as policy:
            norm, in_float32 = _gradient_norm(policy, anchor, chosen, kind), policy.compute_dtype == torch.float32
        if not norm and not in_float32:  # a small first step may vanish in a 16-bit compute dtype
            with policies.use_extrapolated() as policy:
                norm = _gradient_norm(policy, anchor, chosen, kind)
        detail = "" if norm > 0 else _no_gradient_reason(groups, kind, table, std_floor)
        checks.append(Check(f"gradient of the {name} divergence", norm, 0.0, norm > 0, detail))
    return checks


def _gradient_norm(
    policy: FlowPolicy, anchor: torch.Tensor, trajectories: Sequence[Trajectory], kind: SegmentKind
) -> float:
    """Gradient norm of the divergence from the outputs of the reference."""
    terms, module = _divergence_inputs(policy, trajectories, kind), policy_module(policy)
    (velocity_regularizer(terms, anchor) if kind == "flow" else k3(terms, anchor)).mean().backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm()) if gradients else 0.0
    module.zero_grad(set_to_none=True)
    return norm


def _no_gradient_reason(groups: Sequence[Group], kind: SegmentKind, table: RewardTable | None, std_floor: float) -> str:
    """The reason why the divergence of a kind of segments has no gradient."""
    rows = [p for p, group in enumerate(groups) if any(s.kind == kind for s in group.trajectories[0].segments)]
    if table is not None:
        trained = table.trained()
        if not bool(signal_mask(trained.scores[rows], trained.mask[rows], std_floor).any()):
            return no_signal_reason(trained, std_floor, rows, f" of {GROUPS[kind]}")
    return (
        "what is trained does not move these outputs (does the way to them end in a layer of zeros that is not "
        "trained?), or the divergence is computed without gradient, or from the reference alone"
    )


def _of_equal_size(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """The trajectories whose image has the size of the first one."""
    drawn = [(t, s.latent.shape) for t in trajectories if isinstance(s := t.segments[-1], FlowSegment)]
    return [trajectory for trajectory, shape in drawn if shape == drawn[0][1]]


def _divergence_inputs(policy: FlowPolicy, trajectories: Sequence[Trajectory], kind: SegmentKind) -> torch.Tensor:
    """The outputs that the divergence of a kind of segments compares: velocities at t = 0.5, or log-probs."""
    if kind == "flow":
        x_t = torch.stack([s.latent for t in trajectories if isinstance(s := t.segments[-1], FlowSegment)])
        return require_method(policy, "velocity").velocity(
            trajectories, x_t, torch.full((len(x_t),), 0.5, device=x_t.device)
        )
    replayed = zip(trajectories, policy.logprobs(trajectories), strict=True)
    pairs = [pair for t, row in replayed for pair in zip(t.segments, row, strict=True)]
    return torch.cat([_actions(s, scored.logprobs) for s, scored in pairs if s.kind == kind])


def require(checks: Sequence[Check]) -> None:
    """Raises RefusedRunError for the first failed check, on all ranks: scores of an endpoint differ between them."""
    with relay_errors():
        for check in checks:
            if not check.ok:
                measured = f"{check.check} is {check.value:.3g}, limit {check.limit:.3g}"
                raise RefusedRunError(f"step-0 contract: {measured}: {check.detail}")


def preflight_checks(
    config: TrainConfig,
    policies: Policies,
    source: Task,
    rewards: Sequence[ConfiguredReward],
    engine: EngineSampler | None = None,
) -> list[Check]:
    """The step-0 contract on a few prompts of every task, with an SDE sampler so that images have log-probs.

    ``engine``: if given, its log-probs are compared with those of the policy.
    """
    prompts = [
        source.prompt(task, i) for task, count in config.data.prompts_per_step.items() for i in range(min(count, 8))
    ]
    sampling = config.sampling(0)
    if sampling.sampler == "ode":
        sampling = replace(sampling, sampler="flow_sde", window=tuple(range(min(2, sampling.num_steps - 1))))
    seeds = [derive_seed(config.seed, "contract", prompt.id) for prompt in prompts]
    with policies.use("policy") as policy:
        groups = policy.sample(prompts, sampling, seeds)
        if engine is not None:
            engine.sync_weights(policy)
    with policies.use("judge") as judge:
        table = score_groups(rewards, groups, judge)
    may_fail = [source.config.title for source in rewards if source.config.max_failed is not None]
    with policies.use("policy") as policy:
        checks = rollout_checks(policy, groups, table, config.advantages.std_floor, may_fail)
        if engine is not None:
            checks += engine_checks(policy, engine.sample(prompts, sampling, seeds))
    return [*checks, weights_check(policies)]


def check_before_first_step(
    run: RunDirectory,
    config: TrainConfig,
    policies: Policies,
    source: Task,
    rewards: Sequence[ConfiguredReward],
    engine: EngineSampler | None = None,
) -> None:
    """Runs the step-0 contract and writes contract.json; raises RefusedRunError for the first failed check."""
    checks = preflight_checks(config, policies, source, rewards, engine)
    run.write_json("contract.json", [check.as_dict() for check in checks])
    require(checks)


def check_first_update(
    run: RunDirectory, policies: Policies, groups: Sequence[Group], table: RewardTable, std_floor: float
) -> None:
    """Adds the checks of the first update to contract.json; raises RefusedRunError for the first failed check."""
    first = gather_groups(groups, range(len(groups)), members=1)
    checks = first_update_checks(policies, first, table, std_floor)
    if is_main():
        before = run.read_json("contract.json", list[dict[str, Any]])
        run.write_json("contract.json", [*before, *(check.as_dict() for check in checks)])
    require(checks)
