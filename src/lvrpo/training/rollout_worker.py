"""The worker process of ``ProcessEngine``: a copy of the policy that receives weights and samples."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import load_policy
from lvrpo.registry import allow_code
from lvrpo.training.policies import policy_module
from lvrpo.training.rollout_engine import deserialize, error_to_relay, serialize, weights_checksum
from lvrpo.training.setup import configure_policy


def main() -> None:
    """Handles calls until the trainer closes the connection. Ignores SIGINT: the trainer ends this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    policy: Policy | None = None
    settings = deserialize(connection.recv_bytes())
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            policy = loaded(*settings) if policy is None else policy
            what, arguments = deserialize(message)
            answer, error = {"load": load_weights, "sample": sample}[what](policy, *arguments), None
        except Exception as raised:  # the trainer raises it
            answer, error = None, error_to_relay(raised)
        with suppress(OSError):  # of a trainer that was killed: the next receive ends this process
            connection.send_bytes(serialize((error, answer)))


def loaded(config: Any, folder: str, dtype: str | None, base: str | None, allowed: list[str]) -> Policy:
    """The initial policy of the run. Any: a TrainConfig, whose import would be circular."""
    allow_code(allowed)
    torch.set_num_threads(config.threads)
    return configure_policy(load_policy(folder, config.device, dtype, base), config)


@torch.no_grad()
def load_weights(policy: Policy, file: str) -> str:
    """Copies the weights of a file into the policy; returns the checksum of the copy."""
    parameters = dict(policy_module(policy).named_parameters())
    weights = load_file(Path(file))
    for name, tensor in weights.items():
        target = parameters.get(name)
        if target is None or target.shape != tensor.shape or target.dtype != tensor.dtype:
            have = "none" if target is None else f"{target.dtype} {tuple(target.shape)}"
            raise InputError(f"weights of {name}: {tensor.dtype} {tuple(tensor.shape)} were sent, its copy has {have}")
        target.copy_(tensor)
    return weights_checksum({name: parameters[name] for name in weights})


@torch.no_grad()
def sample(policy: Policy, *arguments: Any) -> Any:
    """Any: as ``Policy.sample``."""
    return policy.sample(*arguments)


if __name__ == "__main__":
    main()
