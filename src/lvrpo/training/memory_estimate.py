"""Memory estimate of a run before anything is loaded.

Persistent memory (weights, moments, copies) is computed from shapes. Transient memory is measured by running the phases
of a step on fake tensors at the sizes of the run's prompts and tracking the live bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdaptablePolicy, has_adapter, inject_adapter
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import DTYPES, pick_device, policy_class, policy_folder
from lvrpo.policies.mot.attention import forget_packings
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.training.config import TrainConfig
from lvrpo.training.memory import MemoryEstimate, NotEstimatedError
from lvrpo.training.policies import policy_module, weights_dtype
from lvrpo.training.step_memory import tensor_bytes
from lvrpo.training.step_memory_mot import MoTStepMemory
from lvrpo.training.step_memory_traced import TracedStepMemory
from lvrpo.types import Prompt


def estimate_memory(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt] = (),
    device: torch.device | None = None,
    check: Callable[[Policy], object] = lambda policy: None,
) -> MemoryEstimate:
    """The memory of a run on its device, from the json and tokenizer files in the policy's folder.

    ``prompts``: those of a step; ``validation``: the held-out ones. Texts are assumed to have the maximum length. The
    CPU implementation is measured, also for a GPU, whose attention may be batched differently. ``device`` overrides
    that of the configuration; it need not exist. ``check``: called with the policy without weights, to refuse rows that
    it cannot read.
    Raises InputError for an adapter, NotEstimatedError for a class without ``EstimablePolicy.from_config`` and for a
    model that cannot run without values.
    """
    folder = policy_folder(config.policy)
    if has_adapter(folder):
        raise InputError(f"policy={config.policy}: is an adapter: make one model of it with `lvrpo export` first")
    kind = policy_class(folder)
    if not hasattr(kind, "from_config"):  # optional in a class
        raise NotEstimatedError(
            f"policy={config.policy}: its memory is not estimated, as its class {kind.__name__} has no from_config "
            "(docs/guides/your_model.md)"
        )
    device = device or pick_device(config.device)
    dtype = DTYPES.get(weights_dtype(config, folder) or "")
    forget_packings()
    try:
        with torch.random.fork_rng(devices=[]):
            if issubclass(kind, MoTPolicy):
                with torch.device("meta"):
                    policy = kind.from_config(folder, device, dtype)
            else:
                policy = kind.from_config(folder, device, dtype)
            check(policy)
            return estimate_policy(policy, config, prompts, validation, device)
    finally:
        forget_packings()


def estimate_policy(
    policy: Policy,
    config: TrainConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt] = (),
    device: torch.device | None = None,
) -> MemoryEstimate:
    """``estimate_memory`` of a policy on the meta device, which is modified."""
    module = policy_module(policy)
    whole = tensor_bytes(module.state_dict(keep_vars=True).values())
    if config.adapter is not None and isinstance(module, AdaptablePolicy):
        with torch.device("meta"):
            inject_adapter(module, config.adapter)
    kind = (device or pick_device(config.device)).type
    forget_packings()
    try:
        if isinstance(module, MoTPolicy):
            return MoTStepMemory(module, config, whole, kind).estimate(prompts, validation)
        return _estimate_traced(module, config, whole, prompts, validation, kind)
    finally:
        forget_packings()


def _estimate_traced(
    module: nn.Module,
    config: TrainConfig,
    whole: int,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt],
    device: str,
) -> MemoryEstimate:
    try:
        return TracedStepMemory(module, config, whole, device).estimate(prompts, validation)
    except InputError:
        raise
    except Exception as error:  # any model of another package may need the values of tensors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise NotEstimatedError(
            f"policy={config.policy}: its memory is not estimated, as it does not run without values ({reason})"
        ) from error
