"""The weights of a run: one policy, and the sets that take the place of its weights while something else is asked."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
"""A step of 1e-7 is then seen in bfloat16."""


def policy_module(policy: object) -> nn.Module:
    """A policy as the module that it is."""
    assert isinstance(policy, nn.Module)
    return policy


def weights_dtype(config: TrainConfig, folder: Path) -> str | None:
    """At which the policy in a folder is loaded: where its weights are divided among ranks, at what they compute in."""
    divided = config.offload or world_size() > 1
    if (
        divided
        and config.adapter is None
        and config.precision.compute is not None
        and model_type(folder) == BagelPolicy.model_type
    ):
        return config.precision.compute
    return config.precision.weights or ("float32" if config.adapter is None else None)


def shard_dtype(policy: Policy, config: TrainConfig) -> torch.dtype | None:
    """What weights that are divided among ranks compute in; None: float32, or what autocast makes of that."""
    low = config.precision.compute == "bfloat16" and config.adapter is None
    return torch.bfloat16 if low and isinstance(policy, BagelPolicy) else None


class Policies:
    """One policy and its sets of weights; on several ranks each keeps its share of every set.

    - ``policy``: trained; samples text.
    - ``old``: a short moving average of it, which samples drawings and anchors DiffusionNFT; the policy itself where
      nobody asks for it.
    - ``reference``: where the run began: the anchor of every divergence, the control, and the judge unless that has a
      set of its own.
    - ``ema``: a longer moving average: evaluated and saved.
    - ``judge``, ``judge_ema``: of a judge that is renewed.
    """

    def __init__(
        self,
        policy: Policy,
        sets: Collection[SetName] = ("old",),
        *,
        compute_dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        """All sets begin as the policy's weights. ``sets``: those beside policy, reference and ema.

        ``compute_dtype``, ``offload``: as ``lvrpo.distributed.shard`` takes them. Optimizers are made afterwards.
        """
        self.policy, self.module = policy, policy_module(policy)
        layers = list(policy.transformer.layers) if isinstance(policy, MoTPolicy) else None
        loaded = shard(self.module, compute_dtype, offload, layers)
        self.weights = WeightSets(self.module)
        self.weights.add_reference("reference", loaded)
        for name in ("ema", *sets):
            self.weights.add(name)
        self.reduces_per_microbatch = self.sharded and compute_dtype not in (None, torch.float32)
        """Whether gradients are summed in 16 bits on a rank: then few of them are."""

    @property
    def sharded(self) -> bool:
        """Whether the weights are divided among the ranks, or wait in host memory."""
        return is_sharded(self.module)

    def has(self, name: SetName) -> bool:
        """Whether a set has weights of its own."""
        return name == POLICY or name in self.weights.sets or name in self.weights.base_only_sets

    @contextmanager
    def use(self, name: SetName) -> Iterator[Policy]:
        """The policy with a set's weights, whole on every rank; one set at a time, entered and left by all ranks.

        Inside, ranks work by themselves, and an error of one is raised on all.
        """
        with self.weights.use(self._kept(name)), whole_weights(self.module):
            yield self.policy

    @contextmanager
    def use_extrapolated(self) -> Iterator[Policy]:
        """The policy, ``EXTRAPOLATION`` times as far from the reference: a step too small for 16 bits is seen."""
        with self.weights.use_extrapolated("reference", EXTRAPOLATION), whole_weights(self.module):
            yield self.policy

    def reduce_gradients(self) -> None:
        """Sums the gradients of all ranks, inside ``use("policy")``; called by all."""
        reduce_gradients(self.module)

    def _kept(self, name: SetName) -> str:
        """The set that stands for another, where that has no weights of its own."""
        if self.has(name):
            return name
        return {"old": POLICY, "judge": "reference"}[name]
