"""The weight sets of a run: one policy module, whose weights are swapped for those of old policy, reference or EMA."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from lvrpo.distributed import POLICY, WeightSets, is_sharded, reduce_gradients, shard, whole_weights, world_size
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import model_type
from lvrpo.policies.mot.policy import MoTPolicy

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

SetName = Literal["policy", "old", "reference", "ema", "judge", "judge_ema"]
EXTRAPOLATION = 2.0**14
"""Makes a step of 1e-7 visible in bfloat16."""
CHECKSUM_CHUNK = 2**16
"""64-bit words per operation of a checksum."""


def policy_module(policy: object) -> nn.Module:
    """A policy typed as ``nn.Module``."""
    assert isinstance(policy, nn.Module)
    return policy


def weights_checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """A non-cryptographic checksum of names, dtypes, shapes and data; equal on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)} ".encode())
    return digest.hexdigest()


def _checksum(tensor: torch.Tensor) -> int:
    """Sum of the 64-bit words times position-dependent odd numbers, modulo 2^64, on the tensor's device."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(data) % 8:
        data = torch.cat([data, data.new_zeros(-len(data) % 8)])
    words = data.view(torch.int64)
    odd = torch.arange(min(CHECKSUM_CHUNK, len(words)), device=words.device) * 2 + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)  # int64 wraps around
    for i, chunk in enumerate(words.split(CHECKSUM_CHUNK)):
        total += (chunk * odd[: len(chunk)]).sum() + 2 * CHECKSUM_CHUNK * i * chunk.sum()
    return int(total)


def weights_dtype(config: TrainConfig, folder: Path) -> str | None:
    """The dtype in which a policy is loaded; None: the policy's default. Sharded BAGEL weights: the compute dtype."""
    sharded = config.offload or world_size() > 1
    if (
        sharded
        and config.adapter is None
        and config.precision.compute is not None
        and model_type(folder) == BagelPolicy.model_type
    ):
        return config.precision.compute
    return config.precision.weights or ("float32" if config.adapter is None else None)


def shard_dtype(policy: Policy, config: TrainConfig) -> torch.dtype | None:
    """The dtype of gathered weights (``lvrpo.distributed.shard``); None: float32, with autocast if configured."""
    low = config.precision.compute == "bfloat16" and config.adapter is None
    return torch.bfloat16 if low and isinstance(policy, BagelPolicy) else None


class Policies:
    """One policy and its (sharded) weight sets.

    - ``policy``: the trained weights; sample text.
    - ``old``: a fast EMA, which samples images and is the old policy of DiffusionNFT; the policy itself if not used.
    - ``reference``: the initial weights: reference of KL terms, baseline, and judge unless that has its own set.
    - ``ema``: a slow EMA, which is evaluated and saved.
    - ``judge``, ``judge_ema``: of a judge that is refreshed.
    """

    def __init__(
        self,
        policy: Policy,
        sets: Collection[SetName] = ("old",),
        *,
        compute_dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        """Shards the policy and initializes all sets with its weights. ``sets``: besides policy, reference and ema.

        ``compute_dtype``, ``offload``: as in ``lvrpo.distributed.shard``. Create optimizers afterwards.
        """
        self.policy, self.module = policy, policy_module(policy)
        layers = list(policy.transformer.layers) if isinstance(policy, MoTPolicy) else None
        loaded = shard(self.module, compute_dtype, offload, layers)
        self.weights = WeightSets(self.module)
        self.weights.add_reference("reference", loaded)
        for name in ("ema", *sets):
            self.weights.add(name)
        self.reduces_per_microbatch = self.sharded and compute_dtype not in (None, torch.float32)
        """Whether gradients are reduced after every microbatch, as accumulation on a rank is in 16 bits."""

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over ranks or offloaded to host memory."""
        return is_sharded(self.module)

    def has(self, name: SetName) -> bool:
        """Whether a set has its own weights."""
        return name == POLICY or name in self.weights.sets or name in self.weights.base_only_sets

    @contextmanager
    def use(self, name: SetName) -> Iterator[Policy]:
        """The policy with a set's weights, gathered on every rank; one set at a time, entered and left by all ranks.

        Inside there are no collectives; an error of one rank is raised on all.
        """
        with self.weights.use(self._resolve_set(name)), whole_weights(self.module):
            yield self.policy

    @contextmanager
    def use_extrapolated(self) -> Iterator[Policy]:
        """The policy at ``EXTRAPOLATION`` times its distance from the reference (``WeightSets.use_extrapolated``)."""
        with self.weights.use_extrapolated("reference", EXTRAPOLATION), whole_weights(self.module):
            yield self.policy

    def reduce_gradients(self) -> None:
        """Sums the gradients of all ranks; collective, inside ``use("policy")``."""
        reduce_gradients(self.module)

    def _resolve_set(self, name: SetName) -> str:
        """The set that is used for ``name``, which may have no weights of its own."""
        if self.has(name):
            return name
        return {"old": POLICY, "judge": "reference"}[name]
