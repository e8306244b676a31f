"""FSDP2 sharding of a policy's weights, all-gathered before a phase without collectives.

Trainable parameters are float32 shards, one FSDP unit per transformer layer and one for the rest; frozen parameters (an
encoder, the base model of an adapter) stay unsharded on every rank in the dtype they were loaded in. Rollout and replay
call a policy through many methods, a different number of times on each rank, so no forward pass communicates: weights
are all-gathered once, ranks work without collectives, and one reduce-scatter per unit then sums the gradients.

After ZeRO stage 3 (arXiv:1910.02054) and FSDP (arXiv:2304.11277). With one process and no offload a module is
unchanged.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import (
    _foreach_copy_,  # pyright: ignore[reportPrivateImportUsage]  # of torch.optim
    nn,
)
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

from lvrpo.distributed.collectives import (
    communication_errors,
    device,
    gather,
    rank,
    relay_errors,
    sum_over_ranks,
    world_size,
)

# --- sharding ---


def shard(
    module: nn.Module,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
    layers: Sequence[nn.Module] | None = None,
) -> dict[str, torch.dtype]:
    """Shards the trainable parameters of a module over the ranks, in place; all ranks must hold the same weights.

    ``compute_dtype``: dtype of gathered weights and their gradients (None: float32); gradients are summed in float32.
    ``offload``: keep shards, gradients and optimizer states in host memory, also with one process. ``layers``: the FSDP
    units besides the module itself (None: the entries of every outermost ``nn.ModuleList``).

    Returns the original dtype of each trainable parameter. The parameters are replaced, so create optimizers
    afterwards.
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
        with _without_fsdp_hooks(unit):
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
    # FSDP reduces at the end of a backward pass through its root: this method is a forward pass without compute
    module._pass_through = types.MethodType(_pass_through, module)  # pyright: ignore[reportArgumentType]  # no tensor
    register_fsdp_forward_method(module, "_pass_through")
    return loaded


def transformer_layers(module: nn.Module) -> list[nn.Module]:
    """The entries of every outermost ``nn.ModuleList`` of a module."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in transformer_layers(child)]


def is_sharded(module: nn.Module) -> bool:
    """Whether ``shard`` sharded this module."""
    return isinstance(module, FSDPModule)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows of a sharded tensor, as a view; an unsharded tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _without_fsdp_hooks(module: nn.Module) -> Iterator[None]:
    """Removes the forward hooks that FSDP registers: layers only run inside ``whole_weights``, already gathered.

    The hooks would all-gather on the ranks that call a layer, and detach gradients in backward passes of one rank.
    """
    kinds = (module._forward_pre_hooks, module._forward_hooks)
    before = [set(hooks) for hooks in kinds]
    yield
    for hooks, known in zip(kinds, before, strict=True):
        for key in set(hooks) - known:
            del hooks[key]


def _mesh() -> DeviceMesh:
    if not dist.is_initialized():  # FSDP needs a process group even for offload with one process
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
    """Inside, every rank has the unsharded weights and runs without collectives, with any number of batches.

    One all-gather per unit on entry. ``reduce``: call ``reduce_gradients`` on exit. An error of any rank is raised on
    all ranks (``relay_errors``); gradients that were not reduced are dropped. Nested calls gather nothing.
    """
    units = _units(module)
    if not units or _is_whole(module):
        with relay_errors():
            yield
        if reduce:
            reduce_gradients(module)
        return
    with communication_errors():
        for unit in units:
            unit.unshard()
    _disable_state_dict_resharding(module)
    try:
        with relay_errors():
            yield
        if reduce:
            reduce_gradients(module)
    finally:
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.grad = None  # of the gathered weights; the shards hold the reduced ones
        for unit in units:
            unit.reshard()


def _disable_state_dict_resharding(module: nn.Module) -> None:
    """Removes the FSDP hooks that reshard the weights when ``state_dict`` is called."""
    for submodule in module.modules():
        hooks = submodule._state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "__name__", "") == "to_sharded_hook"]:
            del hooks[key]


def _is_whole(module: nn.Module) -> bool:
    return not any(isinstance(p, DTensor) for p in module.parameters())


def reduce_gradients(module: nn.Module) -> None:
    """Sums the gradients of the gathered weights over the ranks and adds them to the shards' gradients, in float32.

    All ranks call it inside ``whole_weights``, once at the end or after each microbatch; the latter avoids accumulating
    in a 16-bit ``compute_dtype``. A missing gradient counts as zero; a parameter without a gradient on any rank gets
    none, so AdamW skips it as with one process. In an unsharded (replicated) module every rank gets the sum.
    """
    if world_size() == 1 and not is_sharded(module):
        return
    assert _is_whole(module), "reduce_gradients outside whole_weights"
    parameters = [p for p in module.parameters() if p.requires_grad]
    has_gradient = [p.grad is not None for p in parameters]
    for parameter, *on_ranks in zip(parameters, *gather(has_gradient), strict=True):
        if any(on_ranks) and parameter.grad is None:
            # otherwise reduce-scatter silently adds the gradients of different parameters
            parameter.grad = torch.zeros_like(parameter)
    if not is_sharded(module):
        for parameter in parameters:
            if parameter.grad is not None:
                sum_over_ranks(parameter.grad)
        return
    root = _root(module)
    root.set_requires_gradient_sync(True)
    zero = torch.zeros(1, device=device(), requires_grad=True)
    try:
        with communication_errors():
            module._pass_through(zero).sum().backward()  # pyright: ignore[reportCallIssue]  # set by shard
    finally:
        root.set_requires_gradient_sync(False)


def gradient_norms(groups: Mapping[str, Sequence[nn.Parameter]]) -> dict[str, float]:
    """The global L2 gradient norm of each parameter group that has gradients; equal on every rank."""
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

TOGETHER_BYTES = 16 << 20
"""Unsharded matrices of one shape and dtype are passed to a function in batches of at most this size."""


@torch.no_grad()
def map_matrices_(function: Callable[[torch.Tensor], torch.Tensor], matrices: Sequence[torch.Tensor]) -> None:
    """``matrix <- function(matrix)`` in place, each matrix computed by one rank.

    ``function``: (B, M, N) -> (B, M, N). ``matrices``: sharded by rows as by ``shard``; every rank computes unsharded
    ones, those of one shape and dtype together. Batches of ``world_size`` matrices of similar size are exchanged by one
    all-to-all before and one after ``function``. Offloaded shards pass through the GPU.
    """
    sharded: list[DTensor] = []
    whole: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}
    for matrix in matrices:
        if isinstance(matrix, DTensor):
            sharded.append(matrix)
        else:
            whole.setdefault((matrix.shape, matrix.dtype), []).append(matrix)
    for alike in whole.values():
        together = max(1, TOGETHER_BYTES // alike[0].nbytes)
        for first in range(0, len(alike), together):
            part = alike[first : first + together]
            _foreach_copy_(part, function(torch.stack(part)).unbind())
    sharded.sort(key=lambda matrix: (-matrix.numel(), *matrix.shape))  # stable: the same on all ranks
    for first in range(0, len(sharded), world_size()):
        _map_batch_(function, sharded[first : first + world_size()])


def _map_batch_(function: Callable[[torch.Tensor], torch.Tensor], matrices: Sequence[DTensor]) -> None:
    """Rank r computes matrix r; at most ``world_size`` matrices."""
    shards = [matrix.to_local() for matrix in matrices]
    mine = matrices[rank()] if rank() < len(matrices) else None
    sent = [*(shard.numel() for shard in shards), *[0] * (world_size() - len(shards))]
    received = [0] * world_size() if mine is None else [rows * mine.shape[1] for rows in _rows_per_rank(mine)]
    outgoing = torch.cat([shard.reshape(-1) for shard in shards]).to(device())
    incoming = outgoing.new_empty(sum(received))
    _all_to_all(incoming, outgoing, received, sent)
    if mine is not None:
        incoming = function(incoming.view(1, *mine.shape)).to(incoming.dtype).reshape(-1)
    _all_to_all(outgoing, incoming, sent, received)
    for shard, rows in zip(shards, outgoing.split([shard.numel() for shard in shards]), strict=True):
        shard.copy_(rows.view(shard.shape))


def _all_to_all(output: torch.Tensor, inputs: torch.Tensor, received: list[int], sent: list[int]) -> None:
    if world_size() == 1:
        output.copy_(inputs)
        return
    with communication_errors():
        dist.all_to_all_single(output, inputs, received, sent)


def _rows_per_rank(matrix: torch.Tensor) -> list[int]:
    """Rows of a matrix on each rank: FSDP splits like ``torch.chunk``."""
    assert isinstance(matrix, DTensor)
    assert matrix.placements == (Shard(0),), matrix.placements
    each = -(-matrix.shape[0] // world_size())
    return [max(0, min(each, matrix.shape[0] - r * each)) for r in range(world_size())]
