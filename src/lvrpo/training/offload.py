"""A card holds one policy at a time; the rest of a run is in host memory, divided among the processes.

Every process has one module, at the precision that it computes in, and keeps some tensors of every policy of the run on
the host: in float32 those that move, with the moments of the live ones; those of the reference as they were loaded.
``unshard`` makes the module one of the policies. The gradients of all processes are summed into the owners of the live
tensors, who step them. What a card needs does not depend on how many processes there are; what the host of each needs
is divided by them.

After ZeRO (arXiv:1910.02054, its second stage) and ZeRO-Offload (arXiv:2101.06840), by whole tensors: Muon sees
matrices, and a checkpoint has every tensor in one place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lvrpo.distributed import broadcast, gather, on_main, rank, reduce, relay_errors, world_size
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy, StandIn
from lvrpo.training.checkpoint import load_state, save_state, seal_checkpoint, verify_checkpoint
from lvrpo.training.methods import asks_for_old, objectives_of
from lvrpo.training.microbatches import backward, by_kind
from lvrpo.training.objective import FROZEN, FrozenPolicy, Metrics, Microbatch, policy_module
from lvrpo.training.optimizer import Norms, Optimizers, Part, average_tensors
from lvrpo.types import SegmentKind

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

PART = "part_"
"""Folders of a checkpoint's state: what each process kept."""
FARTHER, FARTHER_BY = "farther", 2.0**14
"""The live policy, so many times as far from the reference: a step of 1e-7 is then seen in bfloat16."""
KNOWN_ANYWAY = frozenset(
    (
        *("writes", "image_size", "compute_dtype", "device", "version", "words", "config"),
        *("tokens", "limit_tokens", "checkpoint_gradients", "timestep_shift", "default_sampling", "pixels_per_token"),
    )
)
"""What a policy can be asked whichever weights it has."""


def owners(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Which of so many processes keeps each tensor: the largest first, to whoever has least."""
    loads, found = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = loads.index(min(loads))
        loads[found[name]] += sizes[name]
    return found


class Shards:
    """What one rank keeps of a run, and the module that is one of its policies at a time.

    All ranks call the same methods in the same order.
    """

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        """All policies begin as the given one."""
        module = policy_module(policy)
        self.policy = policy
        self.objectives = by_kind(objectives_of(config, policy.writes))
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.owner = owners({name: p.numel() for name, p in self.parameters.items()}, world_size())
        own = {name: p for name, p in self.parameters.items() if self.owner[name] == rank()}
        self.live = {name: nn.Parameter(_on_host(p, torch.float32)) for name, p in own.items()}
        names = ("average", "old") if asks_for_old(config, policy.writes) else ("average",)
        self.kept: dict[str, Mapping[str, torch.Tensor]] = {
            "live": self.live,
            "reference": {name: _on_host(p, p.dtype) for name, p in own.items()},
            **{other: {name: _on_host(p, torch.float32) for name, p in own.items()} for other in names},
        }
        name_of = {id(p): name for name, p in self.parameters.items()}
        groups = {
            expert: [name for p in parameters if (name := name_of[id(p)]) in own]
            for expert, parameters in policy.parameter_groups().items()
        }
        self.optimizers = [
            Optimizers(Part(self.live, groups), config.optimizer, config.steps) for _ in config.phases(policy.writes)
        ]
        self.here: str | None = "reference"
        """Which policy the module is; None: one that is no more."""

    @property
    def moving(self) -> dict[str, Mapping[str, torch.Tensor]]:
        """The kept tensors of the policies whose weights change."""
        return {name: kept for name, kept in self.kept.items() if name != "reference"}

    # ---------------------------------------------------------------- the module
    @torch.no_grad()
    def unshard(self, name: str) -> Policy:
        """The module of every rank becomes one of the policies."""
        if self.here != name:
            self.here = None
            with relay_errors():
                self._copy_own(name)
            for key, parameter in self.parameters.items():
                broadcast(parameter.detach(), self.owner[key])
            self.here = name
        return self.policy

    @torch.no_grad()
    def _copy_own(self, name: str) -> None:
        for key, live in self.live.items():
            start = self.kept["reference"][key]
            tensor = start.float().lerp(live, FARTHER_BY) if name == FARTHER else self.kept[name][key]
            self.parameters[key].copy_(tensor)

    def moved(self, name: str) -> None:
        """Weights of this policy are others than before."""
        if self.here in (name, FARTHER):
            self.here = None

    # ---------------------------------------------------------------- training
    def differentiate(self, batches: Sequence[Microbatch]) -> Metrics:
        """The gradients of everybody's microbatches, summed into the owners, and what everybody logged.

        First what the frozen policies say, one after the other, then the live one, as many passes as the busiest
        process has: a card holds one set of weights and the gradients of one pass.
        """
        metrics = Metrics()
        frozen: list[dict[FrozenPolicy, torch.Tensor]] = [{} for _ in batches]
        of_ranks: list[list[SegmentKind]] = gather([batch.kind for batch in batches])
        asked = {name for kinds in of_ranks for kind in kinds for name in self.objectives[kind].compared_with}
        for name in FROZEN:
            if name not in asked:
                continue
            self.unshard(name)
            with relay_errors():
                self._ask(name, batches, frozen)
        self.unshard("live")
        for i in range(max(gather(len(batches)))):
            own = list(zip(batches, frozen, strict=True))[i : i + 1]
            with relay_errors():
                for batch, terms in own:
                    self._backward(batch, metrics, terms)
            self._reduce_gradients()
        total = Metrics()
        for logged in gather(metrics):
            total.include(logged)
        return total

    @torch.no_grad()
    def _ask(
        self, name: FrozenPolicy, batches: Sequence[Microbatch], frozen: Sequence[dict[FrozenPolicy, torch.Tensor]]
    ) -> None:
        for batch, terms in zip(batches, frozen, strict=True):
            objective = self.objectives[batch.kind]
            if name in objective.compared_with:
                terms[name] = objective.frozen_terms(name, self.policy, batch).cpu()  # there are many microbatches

    def _backward(self, batch: Microbatch, metrics: Metrics, terms: Mapping[FrozenPolicy, torch.Tensor]) -> None:
        device = next(iter(self.parameters.values())).device
        frozen: dict[FrozenPolicy, torch.Tensor] = {name: term.to(device) for name, term in terms.items()}
        backward(self.objectives[batch.kind], self.policy, batch, frozen, metrics)

    @torch.no_grad()
    def _reduce_gradients(self) -> None:
        known = [parameter.grad is not None for parameter in self.parameters.values()]
        everybody = gather(known)
        for (name, parameter), *anybody in zip(self.parameters.items(), *everybody, strict=True):
            if not any(anybody):
                continue
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = None
            if world_size() == 1:
                gradient = gradient.cpu()  # it is smaller than what it becomes
            gradient = gradient.float()
            reduce(gradient, self.owner[name])
            if name in self.live:
                kept, gradient = self.live[name], gradient.cpu()
                kept.grad = gradient if kept.grad is None else kept.grad.add_(gradient)

    def step(self, phase: int, step: int, scale: float) -> Norms:
        """Everybody steps what it keeps; the norms of whole experts, as ``Optimizers.step``."""
        norms = self.optimizers[phase].step(step, scale, self._norms_of_all)
        self.moved("live")
        return norms

    def _norms_of_all(self, own: Norms) -> Norms:
        if world_size() == 1:
            return own
        parts = gather(own)
        experts = dict.fromkeys(chain(*parts))
        return {expert: math.sqrt(sum(part[expert] ** 2 for part in parts if expert in part)) for expert in experts}

    @torch.no_grad()
    def average(self, target: str, source: str, decay: float) -> None:
        """Everybody's target <- decay * target + (1 - decay) * source."""
        pairs = [(slow, self.kept[source][name]) for name, slow in self.kept[target].items()]
        average_tensors(pairs, decay)
        self.moved(target)

    def changed(self) -> bool:
        """Whether the live weights of anybody are others than the reference's."""
        start = self.kept["reference"]
        own = any(not torch.equal(p, start[name].float()) for name, p in self.live.items())
        return any(gather(own))

    # ---------------------------------------------------------------- checkpoints
    def write(self, name: str, folder: Path) -> None:
        """One of the policies as a folder that ``load_policy`` reads, as exact as it is kept; of the first process."""
        tensors = self.gather(name)
        on_main(lambda: self._write(tensors, folder))

    def _write(self, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
        before = {key: parameter.data for key, parameter in self.parameters.items()}
        try:
            for key, parameter in self.parameters.items():
                parameter.data = tensors[key]
            self.policy.save(folder)
        finally:
            for key, parameter in self.parameters.items():
                parameter.data = before[key]

    @torch.no_grad()
    def gather(self, name: str) -> dict[str, torch.Tensor]:
        """Everybody's tensors of a policy in the first process, on its host."""
        found: dict[str, torch.Tensor] = {}
        for key, parameter in self.parameters.items():
            own = self.kept[name].get(key)
            if world_size() > 1:
                sent = torch.empty_like(parameter, dtype=torch.float32)
                if own is not None:
                    sent.copy_(own)
                broadcast(sent, self.owner[key])
                own = sent.cpu() if own is None and rank() == 0 else own
            if own is not None and rank() == 0:
                found[key] = own
        return found

    def save(self, folder: Path) -> None:
        """Everybody writes what it keeps into a folder of its own below."""
        with relay_errors():
            self._save(folder / f"{PART}{rank():03d}")

    def _save(self, folder: Path) -> None:
        folder.mkdir()
        policies = {name: {key: t.detach() for key, t in kept.items()} for name, kept in self.moving.items()}
        save_state(folder, {"policies": policies, "moments": [o.moments() for o in self.optimizers]})
        seal_checkpoint(folder)  # which takes longer than writing, and here everybody does it at once

    def load(self, folder: Path, policies: Collection[str] = ()) -> None:
        """Everybody reads what it keeps, whoever wrote it; ``policies``: of these alone, and no moments."""
        with relay_errors():
            self._load(folder, policies)

    @torch.no_grad()
    def _load(self, folder: Path, policies: Collection[str]) -> None:
        wanted, moments = set(self.live), [dict[str, Any]() for _ in self.optimizers]
        parts = sorted(folder.glob(f"{PART}*"), key=lambda part: part.name != f"{PART}{rank():03d}")
        for part in parts:
            if not wanted:
                break
            verify_checkpoint(part)
            tree = load_state(part, finite=True)
            found = wanted & set(tree["policies"]["live"])
            for name in policies or self.moving:
                for key in found:
                    self.kept[name][key].copy_(tree["policies"][name][key])
            for own, saved in zip(moments, tree["moments"], strict=True):
                own.update({key: saved[key] for key in found if key in saved})
            wanted -= found
        if wanted:
            raise InputError(f"{folder}: the checkpoint lacks {min(wanted)}: resume with the configuration of the run")
        self.here = None
        if policies:
            return
        for optimizers, own in zip(self.optimizers, moments, strict=True):
            optimizers.load_moments(own)


class Offloaded(StandIn):
    """A policy whose weights come to the card when it is asked for what depends on them; of the first process."""

    def __init__(self, shards: Shards, name: str) -> None:
        self.shards, self.name = shards, name
        self.constant = name == "reference"

    def policy(self) -> Policy:
        shards = self.shards
        return shards.unshard(self.name)

    def farther(self) -> Offloaded:
        """The live policy, ``FARTHER_BY`` times as far from the reference as it is."""
        return Offloaded(self.shards, FARTHER)

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self.shards.policy if attribute in KNOWN_ANYWAY else self.policy(), attribute)


class OffloadedOptimizers:
    """Those of all processes, for the first one."""

    def __init__(self, shards: Shards, phase: int) -> None:
        self.shards, self.phase = shards, phase

    def rate(self, step: int) -> float:
        """As ``Optimizers.rate``."""
        return self.shards.optimizers[self.phase].rate(step)

    def step(self, step: int, scale: float = 1.0) -> Norms:
        """As ``Optimizers.step``."""
        return self.shards.step(self.phase, step, scale)


def _on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.detach().to("cpu", dtype, copy=True)
