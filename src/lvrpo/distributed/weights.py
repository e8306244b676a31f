"""Several sets of weights of one module: the policy's own, and others that take their place for a while.

Old policy, EMA and reference are tensors with the placement of the policy's parameters, so each rank holds its shard
of each. There is one module; what computes with another set says so::

    with weights.use("ema"), whole_weights(module):
        groups = module.sample(prompts, sampling, seeds)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lvrpo.distributed.collectives import gather
from lvrpo.distributed.sharding import local

POLICY = "policy"
"""The name of the weights that are trained."""


class WeightSets:
    """The trainable weights of a module under several names. With an adapter these are the adapter's alone."""

    def __init__(self, module: nn.Module) -> None:
        """``module``: already sharded, where it is to be."""
        self.module = module
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.sets: dict[str, dict[str, torch.Tensor]] = {}
        self.switched_off: set[str] = set()
        """The sets that are the base without its adapter, and no tensors."""
        self.here = POLICY
        """Which set the module computes with."""

    def add(self, name: str, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
        """A copy of the policy's present weights, float32 or as they are; ``dtypes``: by parameter, what to keep."""
        wanted = {} if dtypes is None else dtypes
        self.sets[name] = {key: p.detach().clone().to(wanted.get(key, p.dtype)) for key, p in self.parameters.items()}

    def add_reference(self, name: str, dtypes: Mapping[str, torch.dtype]) -> None:
        """The weights that the run began with: the adapter switched off where there is one, else ``add``.

        ``dtypes``: what ``shard`` returned, so that weights loaded in bfloat16 are kept in it, without a loss.
        """
        if _adapted(self.module):
            self.switched_off.add(name)
        else:
            self.add(name, dtypes)

    def __getitem__(self, name: str) -> Mapping[str, torch.Tensor]:
        """The tensors of a set by parameter, sharded as the parameters are; not while another set is in place."""
        assert self.here == POLICY, f"{self.here} is in place"
        return self.parameters if name == POLICY else self.sets[name]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Puts a set in the place of the policy's weights, and these back at the end; no collectives.

        Entered before the weights are whole. The set and the policy change places: nothing is copied with one process,
        no memory is taken but where the set has another dtype (then a shard of the policy's). An optimizer does not
        step inside.
        """
        if name == self.here:
            yield
            return
        assert self.here == POLICY, f"{self.here} is in place"
        if name in self.switched_off:
            with self._in_place(name), without_adapter(self.module):
                yield
            return
        kept = self.sets[name]
        if any(kept[key].dtype != p.dtype for key, p in self.parameters.items()):
            with self._copied(name, kept):
                yield
            return
        with self._in_place(name):
            _exchange(self.parameters, kept)
            try:
                yield
            finally:
                _exchange(self.parameters, kept)

    @contextmanager
    def use_extrapolated(self, start: str, by: float) -> Iterator[None]:
        """``start + by * (policy - start)``, parameter by parameter in float32, in the place of the policy's weights.

        ``by`` above 1: the policy farther from the start than it is, so that a step too small for a 16-bit
        ``compute_dtype`` is seen. It takes the memory of a shard of the policy's while it lasts. With an adapter: its
        own changes ``by`` times as large are not asked for, the policy itself is used.
        """
        if start in self.switched_off:
            yield
            return
        with torch.no_grad():
            far = {key: local(self.sets[start][key]).float().lerp(local(p), by) for key, p in self.parameters.items()}
        with self._copied(f"{start} extrapolated", far):
            yield

    @torch.no_grad()
    def lerp(self, name: str, decay: float) -> None:
        """``set <- decay * set + (1 - decay) * policy`` on the shards: an exponential moving average (EMA)."""
        for key, fast in self[POLICY].items():
            slow = local(self.sets[name][key])
            if decay == 0:
                slow.copy_(local(fast.detach()))
            else:
                slow.lerp_(local(fast.detach()), 1 - decay)

    @torch.no_grad()
    def copy(self, name: str, source: str) -> None:
        """``set <- source``, in place: of the policy, optimizers keep their parameters."""
        for key, tensor in self[name].items():
            local(tensor.detach()).copy_(local(self[source][key].detach()))

    def moved_from(self, name: str) -> bool:
        """Whether the policy's weights are others than a set's on any rank; of an adapter, whether it does anything."""
        pairs = [] if name in self.switched_off else [(p, self[name][key]) for key, p in self.parameters.items()]
        moved = any(not torch.equal(local(p.detach()), local(other).to(p.dtype)) for p, other in pairs)
        if name in self.switched_off:  # a fresh adapter's second matrices are zero
            moved = any(bool(local(p.detach()).any()) for key, p in self.parameters.items() if ".lora_B" in key)
        return any(gather(moved))

    @contextmanager
    def _in_place(self, name: str) -> Iterator[None]:
        self.here = name
        try:
            yield
        finally:
            self.here = POLICY

    @contextmanager
    def _copied(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        policy = {key: local(p.detach()).clone() for key, p in self.parameters.items()}
        with self._in_place(name):
            _copy(self.parameters, tensors)
            try:
                yield
            finally:
                _copy(self.parameters, policy)


@torch.no_grad()
def _exchange(parameters: Mapping[str, nn.Parameter], others: dict[str, torch.Tensor]) -> None:
    for key, parameter in parameters.items():
        if isinstance(parameter, DTensor):  # FSDP holds on to the memory of its shards
            own, other = local(parameter.detach()), local(others[key])
            before = own.clone()
            own.copy_(other)
            other.copy_(before)
        else:
            others[key], parameter.data = parameter.data, others[key]


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], others: Mapping[str, torch.Tensor]) -> None:
    for key, parameter in parameters.items():
        local(parameter.detach()).copy_(local(others[key]))


def _adapted(module: nn.Module) -> dict[str, nn.Module]:
    """The layers below an adapter, by the name of the adapted one; peft calls them so."""
    layers = {name: getattr(layer, "base_layer", None) for name, layer in module.named_modules()}
    return {name: layer for name, layer in layers.items() if isinstance(layer, nn.Module)}


@contextmanager
def without_adapter(module: nn.Module) -> Iterator[None]:
    """Inside, adapted layers are the plain ones below them: bit for bit the base model. No collectives."""
    adapted = {name: module.get_submodule(name) for name in _adapted(module)}
    for name, base in _adapted(module).items():
        module.set_submodule(name, base)
    try:
        yield
    finally:
        for name, layer in adapted.items():
            module.set_submodule(name, layer)
