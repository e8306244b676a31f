"""A policy's weights divided among the ranks (FSDP2), whole while a rank works by itself.

Trainable parameters are kept as float32 shards, one FSDP unit per transformer layer and one for the rest; frozen ones
(a tower, the base below an adapter) stay whole on every rank in the dtype they were loaded in. Rollout and replay call
a policy through methods of many names, as often as each rank likes, so nothing is gathered in a forward pass: weights
are made whole once, ranks work without collectives, and one reduce-scatter per unit then sums the gradients.

After ZeRO stage 3 (arXiv:1910.02054) and FSDP (arXiv:2304.11277). With one process and no offload a module is left as
it is.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from lvrpo.distributed.collectives import communicating, device, gather, rank, relay_errors, sum_over_ranks, world_size

# --- sharding ---


def shard(
    module: nn.Module,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
    layers: Sequence[nn.Module] | None = None,
) -> dict[str, torch.dtype]:
    """Divides the trainable parameters of a module among the ranks, in place; all ranks hold the same weights before.

    ``compute_dtype``: of whole weights and their gradients (None: float32); gradients are summed in float32.
    ``offload``: shards, gradients and optimizer states in host memory, also with one process. ``layers``: the FSDP
    units beside the module itself (None: the entries of every outermost ``nn.ModuleList``).

    Returns the dtype that each trainable parameter was loaded in. Parameters of before are no longer the module's:
    optimizers are made afterwards.
    """
    loaded = {name: p.dtype for name, p in module.named_parameters() if p.requires_grad}
    if world_size() == 1 and not offload:
        return loaded
    frozen = {p for p in module.parameters() if not p.requires_grad}
    precision = MixedPrecisionPolicy(
        param_dtype=None if compute_dtype == torch.float32 else compute_dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    host = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    mesh = _mesh()
    chosen = transformer_layers(module) if layers is None else layers
    for unit in (*(layer for layer in chosen if any(p.requires_grad for p in layer.parameters())), module):
        for parameter in unit.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.float()
        with _no_new_hooks(unit):
            fully_shard(
                unit,
                mesh=mesh,
                reshard_after_forward=False,
                mp_policy=precision,
                offload_policy=host,
                ignored_params=frozen,
            )
    for unit in _units(module):
        unit.set_gradient_divide_factor(1.0)  # a sum over ranks, not their mean
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
    root = _root(module)
    root.set_reshard_after_backward(False)
    root.set_requires_gradient_sync(False)
    # FSDP reduces at the end of a backward pass through its root: this method is a forward pass of no cost
    module._pass_through = types.MethodType(_pass_through, module)  # pyright: ignore[reportArgumentType]  # no tensor
    register_fsdp_forward_method(module, "_pass_through")
    return loaded


def transformer_layers(module: nn.Module) -> list[nn.Module]:
    """The entries of every outermost ``nn.ModuleList`` of a module."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in transformer_layers(child)]


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard`` divided this module."""
    return isinstance(module, FSDPModule)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, as a view; a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _no_new_hooks(module: nn.Module) -> Iterator[None]:
    """Takes the forward hooks off again that FSDP puts on: a layer that is called inside ``whole_weights`` is whole.

    They would gather in ranks that call it, and move gradients aside in backward passes that are a rank's own.
    """
    kinds = (module._forward_pre_hooks, module._forward_hooks)
    before = [set(hooks) for hooks in kinds]
    yield
    for hooks, known in zip(kinds, before, strict=True):
        for key in set(hooks) - known:
            del hooks[key]


def _mesh() -> DeviceMesh:
    if not dist.is_initialized():  # FSDP wants a group also where offload is all that is asked of it
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]  # documented
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return init_device_mesh(device().type, (world_size(),))


def _units(module: nn.Module) -> list[FSDPModule]:
    return [unit for unit in module.modules() if isinstance(unit, FSDPModule)]


def _root(module: nn.Module) -> FSDPModule:
    assert isinstance(module, FSDPModule)
    return module


def _pass_through(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + 0


# --- whole weights ---


@contextmanager
def whole_weights(module: nn.Module, reduce: bool = False) -> Iterator[None]:
    """Inside, every rank has the whole weights and works by itself: other batches, another number of them, or none.

    One all-gather per unit on entry; none inside. ``reduce``: on leaving, ``reduce_gradients``. An error of any rank
    is raised on all (``relay_errors``); gradients that were not reduced are then dropped. Within another
    ``whole_weights`` of the module nothing is gathered again.
    """
    units = _units(module)
    if not units or _is_whole(module):
        with relay_errors():
            yield
        if reduce:
            reduce_gradients(module)
        return
    with communicating():
        for unit in units:
            unit.unshard()
    _keep_whole(module)
    try:
        with relay_errors():
            yield
        if reduce:
            reduce_gradients(module)
    finally:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = None  # of the whole weights; reduced ones are at the shards
        for unit in units:
            unit.reshard()


def _keep_whole(module: nn.Module) -> None:
    """Takes off the hooks of FSDP that divide the weights again when somebody asks for ``state_dict``."""
    for each in module.modules():
        hooks = each._state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == "to_sharded_hook"]:
            del hooks[key]


def _is_whole(module: nn.Module) -> bool:
    return not any(isinstance(p, DTensor) for p in module.parameters())


def reduce_gradients(module: nn.Module) -> None:
    """Adds the ranks' sum of the gradients of the whole weights to the shards' gradients, in float32.

    Called by all ranks inside ``whole_weights``, at its end or also in between: an own count of micro-batches needs
    one call, calls in between keep sums of many micro-batches out of a 16-bit ``compute_dtype``. A rank without a
    gradient of a parameter counts as zero; where no rank has one the parameter has none (AdamW leaves it alone, as one
    process does). A module that is not sharded, of which every rank has a copy, has the sum on each.
    """
    if world_size() == 1 and not is_sharded(module):
        return
    assert _is_whole(module), "reduce_gradients outside whole_weights"
    parameters = [p for p in module.parameters() if p.requires_grad]
    known = [p.grad is not None for p in parameters]
    for parameter, *anybody in zip(parameters, *gather(known), strict=True):
        if any(anybody) and parameter.grad is None:
            # without it reduce-scatter pairs the gradients of different parameters, silently
            parameter.grad = torch.zeros_like(parameter)
    if not is_sharded(module):
        for parameter in parameters:
            if parameter.grad is not None:
                sum_over_ranks(parameter.grad)
        return
    root = _root(module)
    root.set_requires_gradient_sync(True)
    nothing = torch.zeros(1, device=device(), requires_grad=True)
    try:
        with communicating():
            module._pass_through(nothing).sum().backward()  # pyright: ignore[reportCallIssue]  # set by shard
    finally:
        root.set_requires_gradient_sync(False)


def gradient_norms(groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, float]:
    """The L2 norm of the gradients of each group of parameters, over all shards; groups without gradients are left out.

    The same number on every rank. One process: ``nn.utils.get_total_norm``.
    """
    norms = {
        name: float(nn.utils.get_total_norm([local(p.grad) for p in parameters if p.grad is not None]))
        for name, parameters in groups.items()
        if any(p.grad is not None for p in parameters)
    }
    if world_size() == 1:
        return norms
    parts = gather(norms)
    return {name: sum(part[name] ** 2 for part in parts) ** 0.5 for name in norms}


# --- whole matrices ---


@torch.no_grad()
def map_matrices_(function: Callable[[torch.Tensor], torch.Tensor], matrices: Sequence[torch.Tensor]) -> None:
    """``matrix <- function(matrix)`` in place, each whole matrix computed by one rank.

    ``function``: (M, N) -> (M, N). ``matrices``: sharded by rows as ``shard`` does it, or whole ones, which every rank
    computes. As many matrices at a time as there are ranks, of like sizes, travel by one all-to-all there and one
    back: a rank sends and receives what it has of them, and none computes what another does. Offloaded shards go
    through the card.
    """
    sharded: list[DTensor] = []
    for matrix in matrices:
        if isinstance(matrix, DTensor):
            sharded.append(matrix)
        else:
            matrix.copy_(function(matrix))
    sharded.sort(key=lambda matrix: (-matrix.numel(), *matrix.shape))  # stable: the same on all ranks
    for first in range(0, len(sharded), world_size()):
        _map_batch_(function, sharded[first : first + world_size()])


def _map_batch_(function: Callable[[torch.Tensor], torch.Tensor], matrices: Sequence[DTensor]) -> None:
    """Rank r computes matrix r of at most so many as there are ranks."""
    own = [matrix.to_local() for matrix in matrices]
    mine = matrices[rank()] if rank() < len(matrices) else None
    sent = [*(part.numel() for part in own), *[0] * (world_size() - len(own))]
    received = [0] * world_size() if mine is None else [rows * mine.shape[1] for rows in _rows(mine)]
    outgoing = torch.cat([part.reshape(-1) for part in own]).to(device())
    incoming = outgoing.new_empty(sum(received))
    _all_to_all(incoming, outgoing, received, sent)
    if mine is not None:
        incoming = function(incoming.view(mine.shape)).to(incoming.dtype).reshape(-1)
    _all_to_all(outgoing, incoming, sent, received)
    for part, rows in zip(own, outgoing.split([part.numel() for part in own]), strict=True):
        part.copy_(rows.view(part.shape))


def _all_to_all(output: torch.Tensor, given: torch.Tensor, received: list[int], sent: list[int]) -> None:
    if world_size() == 1:
        output.copy_(given)
        return
    with communicating():
        dist.all_to_all_single(output, given, received, sent)


def _rows(matrix: torch.Tensor) -> list[int]:
    """How many rows of a matrix each rank has: FSDP cuts as ``torch.chunk`` does."""
    assert isinstance(matrix, DTensor)
    assert matrix.placements == (Shard(0),), matrix.placements
    each = -(-matrix.shape[0] // world_size())
    return [max(0, min(each, matrix.shape[0] - r * each)) for r in range(world_size())]
