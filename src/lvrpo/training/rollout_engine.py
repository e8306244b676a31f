"""Rollout engines: programs that sample instead of the policy, with synchronized weights.

An engine is a copy of the policy in another process (``ProcessEngine``), an inference server (``inference_servers``),
or a custom class. It receives weights and prompts and returns groups with its own behavior log-probs.
"""

from __future__ import annotations

import io
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from safetensors.torch import save_file

from lvrpo.child import module_command
from lvrpo.config import Config, default_kind
from lvrpo.distributed import device, relay_errors
from lvrpo.errors import ContractError, InputError, LvrpoError, describe_error
from lvrpo.policies.base import Policy, Sampling
from lvrpo.registry import allowed_code, resolve
from lvrpo.training.image_server import SGLangDiffusionServer
from lvrpo.training.inference_servers import SERVERS, ServerEngineConfig
from lvrpo.training.policies import policy_module, weights_checksum, weights_dtype
from lvrpo.training.weights_folder import WeightsFolder
from lvrpo.types import Group, Prompt

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

DEFAULT_IMPORTANCE_CAP = 2.0
"""Default ``importance_cap`` of token losses with a rollout engine."""


class RolloutEngine(Protocol):
    """A program that samples; one instance per rank."""

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        """Loads the trained weights, by parameter name; returns ``weights_checksum`` of its copy."""
        ...

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``Policy.sample``; ``behavior_logprobs`` are those of the engine."""
        ...

    def close(self) -> None:
        """Frees its resources."""
        ...


class PolicyEngineConfig(Config):
    """The trained policy itself samples."""

    kind: Literal["policy"] = "policy"


class ProcessEngineConfig(Config):
    """A copy of the policy in a separate process and on its own device."""

    kind: Literal["process"] = "process"
    device: str | None = None
    """Device of the engine, such as cuda:1; null: that of the run."""


class CustomEngineConfig(Config):
    """A custom class, constructed with (start, config, options); ``start``: the folder of the initial policy."""

    kind: Literal["custom"] = "custom"
    name: str
    """my_package.module:Class or ./my_file.py:Class."""
    options: dict[str, Any] = Field(default={})
    """Options of the class. Any: defined by the class."""


Engine = Annotated[
    PolicyEngineConfig | ProcessEngineConfig | ServerEngineConfig | CustomEngineConfig,
    Field(discriminator="kind"),
    default_kind("policy"),
]


def trainable_weights(policy: Policy) -> dict[str, torch.Tensor]:
    """The weights that training changes, by parameter name."""
    return {name: p.detach() for name, p in policy_module(policy).named_parameters() if p.requires_grad}


class EngineSampler:
    """Samples with an engine and verifies its weights and outputs."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self.synced_checksum = ""
        """Checksum of the engine's weights."""

    def sync_weights(self, policy: Policy) -> None:
        """Sends the policy's current trainable weights, unless the engine has them already.

        Raises ContractError if the checksum of the engine's copy differs.
        """
        self.load_weights(trainable_weights(policy))

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> None:
        """``sync_weights`` of given weights, by parameter name."""
        sent = weights_checksum(weights)
        if sent == self.synced_checksum:
            return
        self.synced_checksum = ""
        with _engine_errors("load_weights"):
            found = self.engine.load_weights(weights)
        if found != sent:
            raise ContractError(
                f"rollout engine: holds weights with checksum {found} after those with {sent} were sent: its outputs "
                "would be of another policy: fix load_weights, or sample with rollout.engine.kind=policy"
            )
        self.synced_checksum = sent

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """``RolloutEngine.sample`` with the caller's prompt objects; raises ContractError for wrong group sizes."""
        with _engine_errors("sample"):
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
def open_engine(
    config: TrainConfig, policy: Policy, start: Path, base: str | None = None
) -> Iterator[EngineSampler | None]:
    """The engine of this rank, closed on exit; None: the policy samples. A process starts at the first weight sync.

    ``policy``: the trained one. ``start``: the folder of the initial policy; ``base``: the base MODEL of its adapter,
    to override the recorded one.
    """
    engine: RolloutEngine
    section = config.rollout.engine
    if isinstance(section, PolicyEngineConfig):
        yield None
        return
    with relay_errors():
        if isinstance(section, ProcessEngineConfig):
            engine = ProcessEngine(config, start, base, section.device)
        elif isinstance(section, ServerEngineConfig):
            engine = _server_engine(config, section, policy)
        else:
            engine = _custom_engine(section, config, start)
    try:
        yield EngineSampler(engine)
    finally:
        engine.close()


def _server_engine(config: TrainConfig, section: ServerEngineConfig, policy: Policy) -> RolloutEngine:
    if section.kind != "sglang" or "text" in policy.segment_kinds:
        return SERVERS[section.kind](policy, section)
    if config.rollout.sampler != "ode":
        raise InputError(
            f"rollout.sampler={config.rollout.sampler}: a server draws without recorded steps: use ode with "
            "flow.kind=nft or awm, or rollout.engine.kind=process"
        )
    return SGLangDiffusionServer(policy, section)


def _custom_engine(section: CustomEngineConfig, config: TrainConfig, start: Path) -> RolloutEngine:
    cls = resolve("rollout engine", section.name, {}, ("load_weights", "sample", "close"))
    try:
        return cls(start, config, section.options)
    except LvrpoError:
        raise
    except Exception as error:  # user code may raise anything
        raise InputError(
            f"rollout.engine: {section.name} cannot be made: {describe_error(error)}: correct its options, or the class"
        ) from error


@contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """Converts any exception of an engine to a ContractError of one line."""
    try:
        yield
    except LvrpoError:
        raise
    except Exception as error:  # user code may raise anything
        raise ContractError(f"rollout engine: {what} failed: {describe_error(error)}: fix it") from error


class ProcessEngine:
    """A copy of the policy in a separate process (``rollout_worker``)."""

    def __init__(self, config: TrainConfig, start: Path, base: str | None = None, on: str | None = None) -> None:
        """``on``: device of the copy; None: that of this process."""
        self.config, self.start, self.base = config, start, base
        self.device = str(device()) if on is None else on
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._folder = WeightsFolder()

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        """See ``RolloutEngine.load_weights``; transfers a file in shared memory."""
        file = self._folder.path / "weights.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in weights.items()}, str(file))
        try:
            return self._call("load", str(file))
        finally:
            file.unlink(missing_ok=True)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``RolloutEngine.sample``."""
        return self._call("sample", list(prompts), sampling, list(seeds))

    def close(self) -> None:
        """Ends the process."""
        if self._connection is not None:
            self._connection.close()  # the worker then exits
        if self._process is not None:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None
        self._folder.close()

    def _call(self, what: str, *arguments: Any) -> Any:
        """Calls a method of the worker; its error is raised here. Any: depends on the method."""
        try:
            connection = self._connected()
            connection.send_bytes(serialize((what, arguments)))
            error, answer = deserialize(connection.recv_bytes())
        except (EOFError, OSError) as lost:
            code = None if self._process is None else self._process.wait()
            raise ContractError(
                f"rollout engine: its process ended with exit code {code}: see what it printed, then resume the run"
            ) from lost
        if error is not None:
            kind, message = error
            raise kind(f"rollout engine: {message}")
        return answer

    def _connected(self) -> Connection:
        if self._connection is None:
            parent, child = socket.socketpair()
            with child:
                command, environment = module_command("lvrpo.training.rollout_worker", str(child.fileno()))
                self._process = subprocess.Popen(
                    command, pass_fds=[child.fileno()], stdin=subprocess.DEVNULL, env=environment
                )
            self._connection = Connection(parent.detach())
            folder, dtype = str(self.start), weights_dtype(self.config, self.start)
            settings = self.config.model_copy(update={"device": self.device})
            self._connection.send_bytes(serialize((settings, folder, dtype, self.base, sorted(allowed_code()))))
        return self._connection


def serialize(message: object) -> bytes:
    """Serializes a message with tensors for a worker process."""
    buffer = io.BytesIO()
    torch.save(message, buffer)
    return buffer.getvalue()


def deserialize(message: bytes) -> Any:
    """Restores a message of ``serialize``; CUDA tensors move to this process's GPU. Any: any message."""
    gpu = device()
    move: Callable[[Any, str], Any] = lambda storage, at: storage if at == "cpu" else storage.cuda(gpu)  # noqa: E731
    return torch.load(io.BytesIO(message), map_location=move, weights_only=False)  # from our own process


def error_to_relay(error: Exception) -> tuple[type[LvrpoError], str]:
    """Type and message with which the trainer raises an error of a worker."""
    if isinstance(error, InputError | ContractError):
        return type(error), str(error)
    return ContractError, describe_error(error)
