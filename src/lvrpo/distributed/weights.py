"""Several sets of weights of one module: the policy's own, and others that temporarily replace them.

Old policy, EMA and reference are tensors with the placement of the policy's parameters, so each rank holds its shard
of each. There is one module; to compute with another set::

    with weights.use("ema"), whole_weights(module):
        groups = module.sample(prompts, sampling, seeds)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import _foreach_copy_, _foreach_lerp_, nn  # pyright: ignore[reportPrivateImportUsage]  # of torch.optim
from torch.distributed.tensor import DTensor

from lvrpo.distributed.collectives import gather
from lvrpo.distributed.sharding import local

POLICY = "policy"
"""The name of the weights that are trained."""


class WeightSets:
    """Named sets of the trainable weights of a module; with an adapter, of the adapter's weights only."""

    def __init__(self, module: nn.Module) -> None:
        """``module``: after ``shard``."""
        self.module = module
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.sets: dict[str, dict[str, torch.Tensor]] = {}
        self.base_only_sets: set[str] = set()
        """Sets without tensors: the base model with its adapter disabled."""
        self.active = POLICY
        """The set that the module computes with."""

    def add(self, name: str, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """Adds a copy of the policy's current weights; ``dtypes``: dtype by parameter (default: the policy's)."""
        dtypes = dtypes or {}
        self.sets[name] = {key: p.detach().clone().to(dtypes.get(key, p.dtype)) for key, p in self.parameters.items()}

    def add_reference(self, name: str, dtypes: Mapping[str, torch.dtype]) -> None:
        """Adds the initial weights: the base model with the adapter disabled if there is one, else a copy (``add``).

        ``dtypes``: as returned by ``shard``, so that weights loaded in bfloat16 are kept in bfloat16 without loss.
        """
        if _base_layers(self.module):
            self.base_only_sets.add(name)
        else:
            self.add(name, dtypes)

    def __getitem__(self, name: str) -> Mapping[str, torch.Tensor]:
        """The tensors of a set by parameter name, sharded like the parameters; only while the policy is active."""
        assert self.active == POLICY, f"{self.active} is active"
        return self.parameters if name == POLICY else self.sets[name]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Replaces the policy's weights by a set, and restores them on exit; no collectives.

        Enter it before ``whole_weights``. Set and policy are swapped, without a copy with one process and without extra
        memory unless the dtypes differ (then one shard of the policy). Do not step an optimizer inside.
        """
        if name == self.active:
            yield
            return
        assert self.active == POLICY, f"{self.active} is active"
        if name in self.base_only_sets:
            with self._activate(name), without_adapter(self.module):
                yield
            return
        tensors = self.sets[name]
        if any(tensors[key].dtype != p.dtype for key, p in self.parameters.items()):
            with self._substitute(name, tensors):
                yield
            return
        with self._activate(name):
            _swap(self.parameters, tensors)
            try:
                yield
            finally:
                _swap(self.parameters, tensors)

    @contextmanager
    def use_extrapolated(self, origin: str, factor: float) -> Iterator[None]:
        """Replaces the policy's weights by ``origin + factor * (policy - origin)``, computed in float32.

        A ``factor`` above 1 makes a step visible that is too small for a 16-bit ``compute_dtype``. Takes the memory of
        one shard of the policy. If the origin is the base model of an adapter, the policy itself is used.
        """
        if origin in self.base_only_sets:
            yield
            return
        start = self.sets[origin]
        with torch.no_grad():
            tensors = {key: local(start[key]).float().lerp(local(p), factor) for key, p in self.parameters.items()}
        with self._substitute(f"{origin} extrapolated", tensors):
            yield

    @torch.no_grad()
    def lerp(self, name: str, decay: float) -> None:
        """``set <- decay * set + (1 - decay) * policy`` on the shards: an exponential moving average (EMA)."""
        slow = [local(tensor) for tensor in self.sets[name].values()]
        fast = [local(self[POLICY][key]) for key in self.sets[name]]
        if decay == 0:
            _foreach_copy_(slow, fast)
        else:
            _foreach_lerp_(slow, fast, 1 - decay)

    @torch.no_grad()
    def copy(self, name: str, source: str) -> None:
        """``set <- source``, in place."""
        for key, tensor in self[name].items():
            local(tensor.detach()).copy_(local(self[source][key].detach()))

    def differs_from(self, name: str) -> bool:
        """Whether the policy's weights differ from a set's on any rank; with an adapter, whether it is not zero."""
        if name in self.base_only_sets:  # LoRA initializes its B matrices to zero
            differs = any(bool(local(p.detach()).any()) for key, p in self.parameters.items() if ".lora_B" in key)
        else:
            pairs = [(p, self[name][key]) for key, p in self.parameters.items()]
            differs = any(not torch.equal(local(p.detach()), local(other).to(p.dtype)) for p, other in pairs)
        return any(gather(differs))

    @contextmanager
    def _activate(self, name: str) -> Iterator[None]:
        self.active = name
        try:
            yield
        finally:
            self.active = POLICY

    @contextmanager
    def _substitute(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        policy = {key: local(p.detach()).clone() for key, p in self.parameters.items()}
        with self._activate(name):
            _copy(self.parameters, tensors)
            try:
                yield
            finally:
                _copy(self.parameters, policy)


@torch.no_grad()
def _swap(parameters: Mapping[str, nn.Parameter], others: dict[str, torch.Tensor]) -> None:
    for key, parameter in parameters.items():
        if isinstance(parameter, DTensor):  # FSDP keeps references to the memory of its shards
            shard, other = local(parameter.detach()), local(others[key])
            previous = shard.clone()
            shard.copy_(other)
            other.copy_(previous)
        else:
            others[key], parameter.data = parameter.data, others[key]


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], others: Mapping[str, torch.Tensor]) -> None:
    for key, parameter in parameters.items():
        local(parameter.detach()).copy_(local(others[key]))


def _base_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The base layers of an adapter by the name of the adapted layer (peft's attribute ``base_layer``)."""
    layers = {name: getattr(layer, "base_layer", None) for name, layer in module.named_modules()}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """Inside, the base layers replace the adapted ones: bitwise the base model. No collectives."""
    adapted = {name: module.get_submodule(name) for name in _base_layers(module)}
    for name, base in _base_layers(module).items():
        module.set_submodule(name, base)
    try:
        yield
    finally:
        for name, layer in adapted.items():
            module.set_submodule(name, layer)
