"""What a run needs before it starts: the policy with its adapter and precision, room in memory, its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from lvrpo.config import dump_config
from lvrpo.distributed import is_main, on_main, world_size
from lvrpo.errors import InputError
from lvrpo.policies import BUILT_IN
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
from lvrpo.policies.mot.adapter import add_adapter, has_adapter, peft_library, require_moved
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.registry import allow_code
from lvrpo.sampling import derive_seed
from lvrpo.training.checkpoint import fingerprint
from lvrpo.training.config import TrainConfig
from lvrpo.training.memory import MemoryEstimate, is_large_model, require_memory
from lvrpo.training.memory_estimate import estimate_memory
from lvrpo.training.optimizer import eight_bit_library
from lvrpo.training.policies import weights_dtype
from lvrpo.training.rollout import prompts_of_step
from lvrpo.training.run_directory import CONFIG, SUMMARY, RunDirectory
from lvrpo.training.sources import Parts


@runtime_checkable
class HasComputeDtype(Protocol):
    """A policy whose matrices may be multiplied in another dtype than that of its weights."""

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Multiplies in this dtype from now on."""
        ...


def open_policy(config: TrainConfig) -> tuple[Policy, Path]:
    """The policy that a run starts from, with its adapter on it, and the folder of what it was made of."""
    require_extras(config)
    base = policy_folder(config.policy)
    if has_adapter(base):
        raise InputError(
            f"policy={config.policy}: is an adapter: make one model of it with `lvrpo export` and start there"
        )
    declared, tasks = getattr(policy_class(base), "segment_kinds", None), possible_tasks(base)
    if isinstance(declared, tuple):  # by the class, so known before anything is loaded
        config.require_fit(declared, tasks)
    if config.offload and config.precision.compute == "bfloat16" and model_type(base) != BagelPolicy.model_type:
        raise InputError(
            f"precision.compute=bfloat16 with offload=true: policy={config.policy} is loaded in float32 alone: "
            "leave one of them out"
        )
    policy = load_policy(base, config.device, weights_dtype(config, base))
    config.require_fit(policy.segment_kinds, tasks)
    if config.adapter is not None:
        if not isinstance(policy, MoTPolicy):
            raise InputError(f"adapter: {config.policy} is of a kind that takes none: leave the section out")
        is_name = config.policy in BUILT_IN or not Path(config.policy).exists()  # built in, or a Hub id
        name = config.policy if is_name else str(base.resolve())
        require_moved(policy, config.adapter, [k for k, s in config.sections(policy.segment_kinds).items() if s.weight])
        add_adapter(policy, config.adapter, name, derive_seed(config.seed, "adapter"))
    if isinstance(policy, MoTPolicy) and config.rollout.image_size is not None:
        policy.encoders.default_grid(config.rollout.image_size)  # raises InputError for a size that it does not draw
    return as_configured(policy, config), base


def as_configured(policy: Policy, config: TrainConfig) -> Policy:
    """The policy, told in which dtype to multiply and how much goes through it at once."""
    if config.precision.compute is not None:
        if not isinstance(policy, HasComputeDtype):
            raise InputError("precision.compute: this policy computes in the dtype of its weights: leave it out")
        policy.set_compute_dtype(DTYPES[config.precision.compute])
    config.limits.apply(policy)
    return policy


def loaded_policy(model: Path, config: TrainConfig, base: str | None) -> Policy:
    """A policy that the run wrote, set up as configured; ``base``: as ``load_policy`` takes it."""
    folder = policy_folder(model)
    return as_configured(load_policy(folder, config.device, weights_dtype(config, folder), base), config)


def memory_of(config: TrainConfig, parts: Parts, device: torch.device | None = None) -> MemoryEstimate | None:
    """What a run will need, at the sizes of its first step; nothing is loaded. None: it cannot be estimated.

    ``device`` stands for the configuration's; it need not be there. Raises InputError for a row that cannot be read.
    """
    require_extras(config)
    held_out = [prompt for prompts in parts.validator.prompts.values() for prompt in prompts]
    prompts = prompts_of_step(parts.source, config, 0)
    return estimate_memory(config, prompts, held_out, device, parts.require_readable)


def require_room(config: TrainConfig, parts: Parts) -> None:
    """Raises InputError, with what to change, if a large model would not fit; small ones are not looked at."""
    device = pick_device(config.device)
    if is_large_model(policy_folder(config.policy), device):
        require_memory(memory_of(config, parts), device, f"policy={config.policy}")


def require_extras(config: TrainConfig) -> None:
    """Raises InputError, before anything is loaded, if a package that the configuration needs is not installed."""
    if config.adapter is not None:
        peft_library()
    if config.optimizer.kind == "adamw_8bit":
        eight_bit_library()
        if world_size() > 1:
            raise InputError(
                f"optimizer.kind=adamw_8bit on {world_size()} processes: moments are divided among them: use adamw"
            )


def config_of_resumed(run: RunDirectory, asked: TrainConfig | None) -> tuple[TrainConfig, bool]:
    """The configuration that a run goes on with, and whether it is of more steps than before.

    ``asked``: None, or that of the run but for ``steps``. Raises InputError where it is another, and where the run has
    finished and no more steps are asked for.
    """
    held = on_main(lambda: _held_config(run, asked))
    steps = held.steps if asked is None else asked.steps
    allowed = () if asked is None else asked.allow_code
    allow_code(allowed)
    torch.set_num_threads(held.threads)
    return held.model_copy(update={"allow_code": allowed, "steps": steps}), steps != held.steps


def _held_config(run: RunDirectory, asked: TrainConfig | None) -> TrainConfig:
    if asked is not None:
        run.require_config(asked, allow=("steps",))
    held = run.config(TrainConfig)
    if asked is not None and asked.steps != held.steps:
        require_longer(run, held.steps, asked.steps)
    elif run.read_summary() is not None:
        raise InputError(
            f"{run.path}: has finished: see lvrpo report {run.path}, start another run, or make it longer with "
            f"lvrpo train --resume {run.path} steps={held.steps * 2}"
        )
    return held


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
    for name in (FINAL, SUMMARY, "eval/after.json") if is_main() else ():
        (run.path / name).unlink(missing_ok=True)
    run.write_manifest(config, {"run": config.seed}, data_fingerprints(config))  # first: it vouches for the next
    run.write_text(CONFIG, dump_config(config))


def data_fingerprints(config: TrainConfig) -> dict[str, Any]:
    """The user's files; the built-in world is a function of its configuration."""
    if config.data.source != "jsonl":
        return {}
    splits = {name: getattr(config.data.jsonl, name) for name in ("train", "validation", "test")}  # its three fields
    return {name: fingerprint(path) for name, path in splits.items() if path is not None}
