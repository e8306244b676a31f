"""Several processes on one run, below everything else: torchrun's processes, FSDP2, sharded weight sets, checkpoints.

It knows PyTorch modules and no policy, loss or configuration. Every process calls the same functions in the same order
(SPMD); with one process each of them is free and changes no number.
"""

from lvrpo.distributed.checkpoint import Saving, load_sharded, save_sharded, save_sharded_async, stored_tensors
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
    reports,
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
    "Saving",
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
    "reports",
    "save_sharded",
    "save_sharded_async",
    "shard",
    "split_between_ranks",
    "start",
    "stop",
    "stored_tensors",
    "sum_over_ranks",
    "whole_weights",
    "without_adapter",
    "world_size",
]
