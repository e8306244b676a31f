"""Who samples the groups: the policy itself, or a rollout engine that is sent its weights.

An engine is another program: a copy of the policy in a process (``ProcessEngine``), or one of your own around an
inference server. It gets prompts and weights and returns groups with the log-probs that it sampled by.
"""

from __future__ import annotations

import hashlib
import io
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from safetensors.torch import save_file

from lvrpo.config import Config, default_kind
from lvrpo.distributed import device, relay_errors
from lvrpo.errors import ContractError, InputError, LvrpoError, described
from lvrpo.policies.base import Policy, Sampling
from lvrpo.registry import allowed_code, resolve
from lvrpo.training.policies import policy_module, weights_dtype
from lvrpo.types import Group, Prompt

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

CAP = 2.0
"""``importance_cap`` of token losses where another program samples and the configuration does not say."""
SHARED_MEMORY = "/dev/shm"
WORDS = 2**16
"""Of a checksum, at once."""


class RolloutEngine(Protocol):
    """A program beside the trainer that samples. Each rank has one of its own."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        """Takes the trained weights, by parameter; returns ``weights_checksum`` of those that it now holds."""
        ...

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """As ``Policy.sample``; ``behavior_logprobs`` are what the engine sampled by."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class OwnSamplerConfig(Config):
    """The policy that is trained samples."""

    kind: Literal["policy"] = "policy"


class ProcessEngineConfig(Config):
    """A copy of the policy in a process of its own, on a device of its own."""

    kind: Literal["process"] = "process"
    device: str | None = None
    """Such as cuda:1; null: that of the run."""


class CustomEngineConfig(Config):
    """A class of your own, called with (start, config, options): the folder of the weights that the run begins with."""

    kind: Literal["custom"] = "custom"
    name: str
    """my_package.module:Class or ./my_file.py:Class."""
    options: dict[str, Any] = Field(default={})
    """Of the class. Any: each has its own."""


Engine = Annotated[
    OwnSamplerConfig | ProcessEngineConfig | CustomEngineConfig, Field(discriminator="kind"), default_kind("policy")
]


def weights_checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """A checksum of names, dtypes, shapes and every byte; of mistakes, not of attacks. The same on every device."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {_checksum(tensor)} ".encode())
    return digest.hexdigest()


def _checksum(tensor: torch.Tensor) -> int:
    """The sum of 64-bit words times odd numbers that differ by place, modulo 2^64, where the tensor is."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(data) % 8:
        data = torch.cat([data, data.new_zeros(-len(data) % 8)])
    words = data.view(torch.int64)
    odd = torch.arange(min(WORDS, len(words)), device=words.device) * 2 + 1
    total = torch.zeros((), dtype=torch.int64, device=words.device)  # which wraps around
    for place, some in enumerate(words.split(WORDS)):
        total += (some * odd[: len(some)]).sum() + 2 * WORDS * place * some.sum()
    return int(total)


class Sampler:
    """Samples with an engine, which holds the weights that are asked for: each push is verified by its checksum."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.holds = ""
        """Checksum of the weights that the engine has."""

    def push(self, policy: Policy) -> None:
        """Sends the trained weights that the policy has at present, where the engine has others.

        Raises ContractError where it then holds something else.
        """
        weights = {name: p.detach() for name, p in policy_module(policy).named_parameters() if p.requires_grad}
        sent = weights_checksum(weights)
        if sent == self.holds:
            return
        self.holds = ""
        with _named_errors("load_weights"):
            found = self.engine.load_weights(weights)
        if found != sent:
            raise ContractError(
                f"rollout engine: holds weights with checksum {found} after those with {sent} were sent: its outputs "
                "would be of another policy: mend load_weights, or sample with rollout.engine.kind=policy"
            )
        self.holds = sent

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """As ``RolloutEngine.sample``, of the prompts' own objects; raises ContractError for groups that are not."""
        with _named_errors("sample"):
            groups = self.engine.sample(prompts, sampling, seeds)
        sizes = [len(group.trajectories) for group in groups]
        if sizes != [sampling.group_size] * len(prompts):
            raise ContractError(
                f"rollout engine: returned groups of {sizes} for {len(prompts)} prompts: return one of "
                f"{sampling.group_size} trajectories for each"
            )
        return [
            Group(prompt, tuple(replace(trajectory, prompt=prompt) for trajectory in group.trajectories))
            for prompt, group in zip(prompts, groups, strict=True)
        ]


@contextmanager
def open_engine(config: TrainConfig, start: Path, base: str | None = None) -> Iterator[Sampler | None]:
    """The engine of this rank, closed at the end; None: the policy samples. It starts with the first push.

    ``start``: the folder of the policy that the run begins with; ``base``: the MODEL below its adapter, if elsewhere.
    """
    engine: RolloutEngine
    section = config.rollout.engine
    if isinstance(section, OwnSamplerConfig):
        yield None
        return
    with relay_errors():
        if isinstance(section, ProcessEngineConfig):
            engine = ProcessEngine(config, start, base, section.device)
        else:
            engine = _own_engine(section, config, start)
    try:
        yield Sampler(engine)
    finally:
        engine.close()


def _own_engine(section: CustomEngineConfig, config: TrainConfig, start: Path) -> RolloutEngine:
    cls = resolve("rollout engine", section.name, {}, ("load_weights", "sample", "close"))
    try:
        return cls(start, config, section.options)
    except LvrpoError:
        raise
    except Exception as error:  # anybody's class may raise anything
        raise InputError(
            f"rollout.engine: {section.name} cannot be made: {described(error)}: correct its options, or the class"
        ) from error


@contextmanager
def _named_errors(what: str) -> Iterator[None]:
    """Around calls of anybody's engine: what they raise is one line."""
    try:
        yield
    except LvrpoError:
        raise
    except Exception as error:  # anybody's engine may raise anything
        raise ContractError(f"rollout engine: {what} failed: {described(error)}: mend it") from error


class ProcessEngine:
    """A copy of the policy in a process of its own (``rollout_worker``)."""

    def __init__(self, config: TrainConfig, start: Path, base: str | None = None, on: str | None = None) -> None:
        """``on``: its device; None: that of this process."""
        self.config, self.start, self.base = config, start, base
        self.device = str(device()) if on is None else on
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        memory = SHARED_MEMORY if os.path.isdir(SHARED_MEMORY) else None
        self._folder = tempfile.TemporaryDirectory(prefix="lvrpo_weights_", dir=memory)

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        """As ``RolloutEngine.load_weights``; through a file in shared memory."""
        file = Path(self._folder.name) / "weights.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, str(file))
        try:
            return self._ask("load", str(file))
        finally:
            file.unlink(missing_ok=True)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """As ``RolloutEngine.sample``."""
        return self._ask("sample", list(prompts), sampling, list(seeds))

    def close(self) -> None:
        """Ends the process."""
        if self._connection is not None:
            self._connection.close()  # it ends where nobody is there any more
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None
        self._folder.cleanup()

    def _ask(self, what: str, *arguments: Any) -> Any:
        """Any: what is asked has its own arguments and answer. An error there is raised here."""
        try:
            connection = self._started()
            connection.send_bytes(packed((what, arguments)))
            error, answer = unpacked(connection.recv_bytes())
        except (EOFError, OSError) as lost:
            code = None if self._process is None else self._process.wait()
            raise ContractError(
                f"rollout engine: its process ended with exit code {code}: see what it printed, then resume the run"
            ) from lost
        if error is not None:
            kind, words = error
            raise kind(f"rollout engine: {words}")
        return answer

    def _started(self) -> Connection:
        if self._connection is None:
            own, its = socket.socketpair()
            with its:
                command = [sys.executable, "-m", "lvrpo.training.rollout_worker", str(its.fileno())]
                self._process = subprocess.Popen(command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL)
            self._connection = Connection(own.detach())
            folder, dtype = str(self.start), weights_dtype(self.config, self.start)
            settings = self.config.model_copy(update={"device": self.device})
            self._connection.send_bytes(packed((settings, folder, dtype, self.base, sorted(allowed_code()))))
        return self._connection


def packed(message: object) -> bytes:
    """A message with tensors for another process of the run."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def unpacked(message: bytes) -> Any:
    """What ``packed`` was given; tensors of a card arrive on this process's own. Any: whatever was sent."""
    here = device()
    move: Callable[[Any, str], Any] = lambda storage, at: storage if at == "cpu" else storage.cuda(here)  # noqa: E731
    return torch.load(io.BytesIO(message), map_location=move, weights_only=False)  # from our own process


def described_error(error: Exception) -> tuple[type[LvrpoError], str]:
    """An error of a worker, as the trainer raises it."""
    if isinstance(error, InputError | ContractError):
        return type(error), str(error)
    return ContractError, described(error)
