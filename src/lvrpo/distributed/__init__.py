"""Multi-process training: torchrun's process group, FSDP2 sharding, sharded weight sets and checkpoints.

The package works on PyTorch modules and imports no policy, loss or configuration. Every process calls the same
functions in the same order (SPMD); with one process they are no-ops and change no number.
"""

from lvrpo.distributed.checkpoint import AsyncSave, load_sharded, save_sharded, save_sharded_async, stored_tensors
from lvrpo.distributed.collectives import (
    device,
    gather,
    gather_with_tensors,
    is_main,
    lost_process,
    on_main,
    process_group,
    rank,
    relay_errors,
    should_print,
    split_between_ranks,
    start,
    stop,
    sum_over_ranks,
    world_size,
)
from lvrpo.distributed.muon import ShardedMuon
from lvrpo.distributed.sharding import (
    gradient_norms,
    is_sharded,
    local,
    reduce_gradients,
    shard,
    whole_weights,
)
from lvrpo.distributed.weights import POLICY, WeightSets, without_adapter

__all__ = [
    "POLICY",
    "AsyncSave",
    "ShardedMuon",
    "WeightSets",
    "device",
    "gather",
    "gather_with_tensors",
    "gradient_norms",
    "is_main",
    "is_sharded",
    "load_sharded",
    "local",
    "lost_process",
    "on_main",
    "process_group",
    "rank",
    "reduce_gradients",
    "relay_errors",
    "save_sharded",
    "save_sharded_async",
    "shard",
    "should_print",
    "split_between_ranks",
    "start",
    "stop",
    "stored_tensors",
    "sum_over_ranks",
    "whole_weights",
    "without_adapter",
    "world_size",
]
