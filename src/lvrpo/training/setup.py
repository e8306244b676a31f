"""Setup of a run: the policy with its adapter and precision, the memory check, the configuration of a resumed run."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from lvrpo.config import dump_config
from lvrpo.distributed import is_main, on_main, world_size
from lvrpo.errors import InputError
from lvrpo.policies import BUILT_IN
from lvrpo.policies.adapter import AdaptablePolicy, add_adapter, has_adapter, peft_library, require_moved
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import (
    DTYPES,
    FINAL,
    load_policy,
    model_type,
    pick_device,
    policy_class,
    policy_folder,
    possible_tasks,
)
from lvrpo.reading import path_exists
from lvrpo.registry import allow_code
from lvrpo.rewards import REWARDS
from lvrpo.rewards.base import SIDES
from lvrpo.sampling import derive_seed
from lvrpo.training.checkpoint import fingerprint, latest_checkpoint
from lvrpo.training.components import Components
from lvrpo.training.config import TrainConfig
from lvrpo.training.memory import MemoryEstimate, NotEstimatedError, is_large_model, require_memory
from lvrpo.training.memory_estimate import estimate_memory
from lvrpo.training.optimizer import eight_bit_library
from lvrpo.training.policies import weights_dtype
from lvrpo.training.rollout import RolloutConfig, prompts_of_step
from lvrpo.training.run_directory import CONFIG, MANIFEST, SUMMARY, RunDirectory
from lvrpo.training.trackers import require_trackers


@runtime_checkable
class HasComputeDtype(Protocol):
    """A policy whose matrices may be multiplied in another dtype than that of its weights."""

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Multiplies in this dtype from now on."""
        ...


def open_policy(config: TrainConfig) -> tuple[Policy, Path]:
    """The initial policy of a run, with a new adapter if configured, and the folder it was loaded from."""
    require_extras(config)
    base = policy_folder(config.policy)
    if has_adapter(base):
        raise InputError(
            f"policy={config.policy}: is an adapter: make one model of it with `lvrpo export` and start there"
        )
    declared, tasks = getattr(policy_class(base), "segment_kinds", None), possible_tasks(base)
    if isinstance(declared, tuple):  # declared by the class, so it can be checked before loading
        config.require_policy_fit(declared, tasks)
    if config.offload and config.precision.compute == "bfloat16" and model_type(base) != BagelPolicy.model_type:
        raise InputError(
            f"precision.compute=bfloat16 with offload=true: policy={config.policy} is loaded in float32 alone: "
            "leave one of them out"
        )
    policy = load_policy(base, config.device, weights_dtype(config, base))
    config.require_policy_fit(policy.segment_kinds, tasks)
    if not getattr(policy, "masked_text", False):  # optional
        _require_no_masked_text(config)
    if config.adapter is not None:
        if not isinstance(policy, AdaptablePolicy):
            raise InputError(f"adapter: {config.policy} does not support adapters: leave the section out")
        is_name = config.policy in BUILT_IN or not Path(config.policy).exists()  # built in, or a Hub id
        name = config.policy if is_name else str(base.resolve())
        require_moved(policy, config.adapter, [k for k, s in config.sections(policy.segment_kinds).items() if s.weight])
        add_adapter(policy, config.adapter, name, derive_seed(config.seed, "adapter"))
    if (check := getattr(policy, "check_sampling", None)) is not None:  # optional
        check(config.sampling(0))
    return configure_policy(policy, config), base


def _require_no_masked_text(config: TrainConfig) -> None:
    """Raises InputError for settings of masked texts."""
    for name in ("block_length", "tokens_per_step"):
        value = getattr(config.rollout, name)  # a field of RolloutConfig
        if value != RolloutConfig.model_fields[name].default:
            raise InputError(
                f"rollout.{name}={value}: applies to policies that write by masked decoding; policy={config.policy} "
                "writes token after token: leave it out"
            )


def configure_policy(policy: Policy, config: TrainConfig) -> Policy:
    """Sets the compute dtype and the batch limits of a policy; returns it."""
    if config.precision.compute is not None:
        if not isinstance(policy, HasComputeDtype):
            raise InputError("precision.compute: this policy computes in the dtype of its weights: leave it out")
        policy.set_compute_dtype(DTYPES[config.precision.compute])
    config.limits.apply(policy)
    return policy


def load_run_policy(model: Path, config: TrainConfig, base: str | None) -> Policy:
    """Loads and configures a policy that the run wrote; ``base``: as in ``load_policy``."""
    folder = policy_folder(model)
    return configure_policy(load_policy(folder, config.device, weights_dtype(config, folder), base), config)


def estimate_run_memory(
    config: TrainConfig, components: Components, device: torch.device | None = None
) -> MemoryEstimate:
    """Memory estimate at the sizes of the first step, without loading weights.

    ``device`` overrides that of the configuration; it need not exist. Raises InputError for a row that the policy
    cannot read, NotEstimatedError where there is no estimate for the policy.
    """
    require_extras(config)
    held_out = [prompt for prompts in components.validator.prompts.values() for prompt in prompts]
    prompts = prompts_of_step(components.source, config, 0)
    return estimate_memory(config, prompts, held_out, device, components.require_readable)


def require_judge(config: TrainConfig, components: Components) -> None:
    """Raises InputError for a reward that asks a side of the run's judge that the class of its policy does not have."""
    folder = policy_folder(config.policy)
    if has_adapter(folder):
        return
    able = getattr(policy_class(folder), "judging_sides", SIDES)  # optional in a class
    for source in components.rewards:
        for side in source.sides if source.config.name in REWARDS else ():  # an own class may not say what it asks
            if side not in able:
                asked = "understanding" if side == "read" else "generation"
                raise InputError(
                    f"rewards.{source.config.title}: asks the {asked} side of the policy's initial weights, and "
                    f"policy={config.policy} has none: give the row a model of its own (judge: MODEL), or use another "
                    "reward, such as vlm_endpoint or ocr"
                )


def require_enough_memory(config: TrainConfig, components: Components) -> None:
    """Raises InputError, with a remedy, if a large model would not fit into memory; small models are not checked."""
    device = pick_device(config.device)
    if is_large_model(policy_folder(config.policy), device):
        with suppress(NotEstimatedError):
            require_memory(estimate_run_memory(config, components), device, f"policy={config.policy}")


def require_extras(config: TrainConfig) -> None:
    """Raises InputError if a package, or the key of a tracker, that the configuration needs is missing."""
    require_trackers(config.trackers)
    if config.adapter is not None:
        peft_library()
    if config.optimizer.kind == "adamw_8bit":
        eight_bit_library()
        if world_size() > 1:
            raise InputError(
                f"optimizer.kind=adamw_8bit on {world_size()} processes: moments are divided among them: use adamw"
            )


def resumed_config(run: RunDirectory, requested: TrainConfig | None) -> tuple[TrainConfig, bool]:
    """The configuration of a resumed run, and whether its number of steps has increased.

    ``requested``: None, or the configuration of the run, with more ``steps`` or not. Raises InputError if it differs
    otherwise, or if the run has finished and no more steps are requested.
    """
    saved = on_main(lambda: _saved_config(run, requested))
    steps = saved.steps if requested is None else requested.steps
    allowed = () if requested is None else requested.allow_code
    allow_code(allowed)
    torch.set_num_threads(saved.threads)
    return saved.model_copy(update={"allow_code": allowed, "steps": steps}), steps != saved.steps


def _saved_config(run: RunDirectory, requested: TrainConfig | None) -> TrainConfig:
    if requested is not None:
        remedy = "a resumed run keeps its settings, only steps may grow: leave them as they were, or start a new run"
        run.require_config(requested, remedy, allow=("steps",))
    saved = run.config(TrainConfig)
    if requested is not None and requested.steps < saved.steps:
        raise InputError(
            f"steps={requested.steps}: {run.path} has {saved.steps}, and a run can only be made longer: give more"
        )
    if requested is not None and requested.steps > saved.steps:
        if run.read_summary() is not None and latest_checkpoint(run.path) is None:
            raise InputError(
                f"steps={requested.steps}: {run.path} has no checkpoints left to continue from: restore them, or "
                "start another run"
            )
        if (run.path / "baseline").exists():
            raise InputError(
                f"steps={requested.steps}: {run.path} is compared with a baseline of as much compute: start another "
                "run instead"
            )
    elif run.read_summary() is not None:
        raise InputError(
            f"{run.path}: has finished: see lvrpo report {run.path}, start another run, or make it longer with "
            f"lvrpo train --resume {run.path} steps={saved.steps * 2}"
        )
    return saved


def extend_run(run: RunDirectory, config: TrainConfig, data: Mapping[str, Any]) -> None:
    """Writes the new number of steps into the run directory and deletes the results of the shorter run.

    ``data``: as from ``data_fingerprints``. Any: JSON.
    """
    for name in (FINAL, SUMMARY, "eval/after.json") if is_main() else ():
        (run.path / name).unlink(missing_ok=True)
    run.write_manifest(config, {"run": config.seed}, data)  # first, as it holds the config's hash
    run.write_text(CONFIG, dump_config(config))


def data_fingerprints(config: TrainConfig, components: Components) -> dict[str, Any]:
    """Fingerprints of the rows of the user by split, with the bytes of their images, and of their files; else empty.

    Images are read whole, as the comparison of splits reads them: sizes and times of files miss changes, or differ
    on another machine.
    """
    if config.data.source == "jsonl":
        return {
            split: {**fingerprint(Path(rows.name)), "rows_sha256": rows.fingerprint()}
            for split, rows in components.rows.items()
        }
    return {split: {"rows": len(rows), "sha256": rows.fingerprint()} for split, rows in components.rows.items()}


def require_same_rows(run: RunDirectory, found: Mapping[str, Any]) -> None:
    """Raises InputError where files of rows, or rows of data sets, are not those that the run was started with."""
    if not path_exists(run.path / MANIFEST):
        return
    began = run.read_json(MANIFEST).get("data", {})
    for split, now in found.items():
        before = began.get(split)
        if not isinstance(before, dict):
            continue
        then, images = before.get("rows"), now.get("rows_sha256")
        if now["sha256"] != before.get("sha256"):
            why = f"{then} then, {now['rows']} now" if then != now.get("rows") else "edited"
        elif images != before.get("rows_sha256", images):  # runs of earlier versions have none
            why = "an image has other bytes"
        else:
            continue
        source = "datasets" if "rows" in now else "jsonl"
        raise InputError(
            f"data.{source}.{split}: the rows are not those that {run.path} was started with ({why}): restore them, or "
            "start another run"
        )
