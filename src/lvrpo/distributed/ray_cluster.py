"""The connection to a Ray cluster; ``import lvrpo.distributed`` does not load it."""

from __future__ import annotations

import os
import signal
import threading
from types import ModuleType

from lvrpo.distributed.collectives import world_size
from lvrpo.distributed.peers import typed_first_line
from lvrpo.errors import ContractError, InputError, optional_package

STORE_BYTES = 1 << 30
"""Object store size of a cluster that this process starts; Ray spills the rest to disk."""


def ray_cluster(what: str) -> ModuleType:
    """The package ``ray``, connected to RAY_ADDRESS, else to the cluster of ``ray start``, else to a new local cluster.

    A new cluster ends with this process; with several processes none is started. ``what`` prefixes error messages.
    Raises InputError if ray is not installed or there is no cluster to connect to, ContractError if Ray fails to start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = optional_package("ray", f"{what}: needs ray", "ray")
    if ray.is_initialized():
        return ray
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if world_size() > 1:
            ray.init(os.environ.get("RAY_ADDRESS", "auto"), **quiet)
        else:
            try:
                ray.init(include_dashboard=False, object_store_memory=STORE_BYTES, **quiet)
            except ValueError:  # an existing cluster refuses these options
                ray.init(**quiet)
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        remedy = f"see whether RAY_ADDRESS={address} runs" if address else "start one first: ray start --head"
        raise InputError(f"{what}: there is no Ray cluster to connect to: {remedy}") from error
    except Exception as error:  # Ray raises many types
        raise ContractError(f"{what}: Ray did not start: {typed_first_line(error)}") from error
    finally:
        for number, handler in handlers.items():  # ray.init replaces the SIGTERM handler
            if handler is not None:
                signal.signal(number, handler)
    return ray


def resources(ray: ModuleType) -> dict[str, float]:
    """CPUs and GPUs of the whole cluster."""
    found = ray.cluster_resources()
    return {kind: found.get(kind, 0.0) for kind in ("CPU", "GPU")}
