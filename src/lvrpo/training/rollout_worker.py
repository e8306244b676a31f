"""The process of ``ProcessEngine``: a copy of the policy that samples with the weights that it is sent."""

from __future__ import annotations

import signal
import sys
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
from lvrpo.training.rollout_engine import described_error, packed, unpacked, weights_checksum
from lvrpo.training.setup import as_configured


def main() -> None:
    """Answers until the trainer is gone. Ctrl-C is the trainer's: it ends this process when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    connection = Connection(int(sys.argv[1]))
    policy: Policy | None = None
    settings = unpacked(connection.recv_bytes())
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            return
        try:
            policy = loaded(*settings) if policy is None else policy
            what, arguments = unpacked(message)
            answer, error = {"load": load_weights, "sample": sample}[what](policy, *arguments), None
        except Exception as raised:  # whatever it is, the trainer raises it
            answer, error = None, described_error(raised)
        connection.send_bytes(packed((error, answer)))


def loaded(config: Any, folder: str, dtype: str | None, base: str | None, allowed: list[str]) -> Policy:
    """The policy that the run began with. Any: a TrainConfig, which imports this package."""
    allow_code(allowed)
    torch.set_num_threads(config.threads)
    return as_configured(load_policy(folder, config.device, dtype, base), config)


@torch.no_grad()
def load_weights(policy: Policy, file: str) -> str:
    """Copies the weights of a file into the policy; returns the checksum of what it then has."""
    parameters = dict(policy_module(policy).named_parameters())
    weights = load_file(Path(file))
    for name, tensor in weights.items():
        own = parameters.get(name)
        if own is None or own.shape != tensor.shape or own.dtype != tensor.dtype:
            have = "none" if own is None else f"{own.dtype} {tuple(own.shape)}"
            raise InputError(f"weights of {name}: {tensor.dtype} {tuple(tensor.shape)} were sent, its copy has {have}")
        own.copy_(tensor)
    return weights_checksum({name: parameters[name] for name in weights})


@torch.no_grad()
def sample(policy: Policy, *arguments: Any) -> Any:
    """Any: as ``Policy.sample``."""
    return policy.sample(*arguments)


if __name__ == "__main__":
    main()
