"""One run on several processes (``torchrun``), each with whole policies on a device of its own.

The first process runs the loop: its random numbers, decisions and files are those of a run alone. Where the work is,
all share it: prompts are dealt out to be sampled, rows to be judged, members to be replayed; gradients are summed into
the first process, which steps. Weights that have changed are sent before they are used again.

Results are those of one process up to rounding, since other rows go through a policy together, and the same bit for bit
with as many processes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import torch

from lvrpo.errors import ContractError, InputError, LostProcessError
from lvrpo.policies.base import Policy, Sampling, StandIn
from lvrpo.training.interrupt import Interrupted
from lvrpo.training.methods import objectives_of
from lvrpo.training.microbatches import backward, by_kind, frozen_terms
from lvrpo.training.objective import Metrics, Microbatch, Policies, policy_module
from lvrpo.training.offload import Act, Shards
from lvrpo.training.optimizer import trained_weights
from lvrpo.training.wire import Sent, Wire, attempt, require
from lvrpo.types import Group, Image, Parts, Prompt

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

# --- messages ---


@dataclass(frozen=True)
class Setup:
    """What the others build their policies from."""

    config: TrainConfig
    start: str
    """Folder of the weights that the run began with; every process has to see it."""
    base: str | None = None
    """The MODEL below it, where its files do not name it."""
    checkpoint: str | None = None
    """Where offloaded policies go on; others are sent."""


@dataclass(frozen=True)
class Refresh:
    """The weights of these policies follow."""

    policies: Sequence[str]


@dataclass(frozen=True)
class Call:
    """A method of a policy is called, by everybody with arguments of their own."""

    policy: str
    method: str


@dataclass(frozen=True)
class Differentiate:
    """Everybody differentiates microbatches of their own."""


@dataclass(frozen=True)
class Stop:
    """There is nothing more to do."""


# --- what every process does ---


@dataclass(frozen=True)
class Rank:
    """One process: its end of the wire, and its policies."""

    wire: Wire
    config: TrainConfig
    policies: Policies
    shards: Shards | None = None
    """Where policies are offloaded: what this process keeps of them."""

    def policy(self, name: str) -> Policy:
        """One of the policies, its weights in place; everybody asks for the same one."""
        return getattr(self.policies, name) if self.shards is None else self.shards.unshard(name)

    def refresh(self, names: Sequence[str]) -> None:
        """Weights of the first process to all."""
        for name in names:
            for tensor in trained_weights(policy_module(getattr(self.policies, name))).values():
                self.wire.broadcast(tensor)

    def call(self, name: str, method: str, arguments: tuple[Any, ...] | None) -> list[Sent]:
        """Everybody's results of a method of a policy, for the first process; None where nothing was to be done."""

        policy = self.policy(name)

        def result() -> Sent:
            return None if arguments is None else getattr(policy, method)(*arguments)

        answers = self.wire.gather_objects(attempt(result))
        require([failure for _, failure in answers])
        return [found for found, _ in answers]

    def differentiate(self, batches: Sequence[Microbatch]) -> Metrics:
        """Everybody's gradients, summed into the first process, and what everybody logged."""
        if self.shards is not None:
            return self.shards.differentiate(batches)
        metrics, live = Metrics(), policy_module(self.policies.live)
        _, failure = attempt(lambda: self._backward(batches, metrics))
        parameters = [parameter for parameter in live.parameters() if parameter.requires_grad]
        known = [parameter.grad is not None for parameter in parameters]
        reports = self.wire.all_gather_objects((failure, metrics, known))
        require([report[0] for report in reports])
        total = Metrics()
        for _, logged, _ in reports:
            total.include(logged)
        for parameter, *anybody in zip(parameters, *(report[2] for report in reports), strict=True):
            if any(anybody):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.wire.reduce(parameter.grad)
        if self.wire.rank:
            live.zero_grad(set_to_none=True)
        return total

    def _backward(self, batches: Sequence[Microbatch], metrics: Metrics) -> None:
        objectives = by_kind(objectives_of(self.config, self.policies.live.writes))
        for batch in batches:
            objective = objectives[batch.kind]
            backward(objective, self.policies.live, batch, frozen_terms(objective, self.policies, batch), metrics)


def serve(wire: Wire, build: Callable[[Setup], tuple[Policies, Shards | None]]) -> None:
    """What all but the first process do: whatever that one asks, until it says stop."""
    setup = wire.broadcast_object()
    if not isinstance(setup, Stop):
        built, failure = attempt(lambda: build(setup))
        ready = not any(wire.all_gather_objects(failure))
        if ready and built is not None:
            _help(Rank(wire, setup.config, *built))
    wire.close()


def _help(rank: Rank) -> None:
    wire = rank.wire
    while not isinstance(command := wire.broadcast_object(), Stop):
        if isinstance(command, Refresh):
            rank.refresh(command.policies)
        elif isinstance(command, Call):
            rank.call(command.policy, command.method, wire.scatter_objects())
        elif isinstance(command, Differentiate):
            with _raised_by_the_first():
                rank.differentiate(wire.scatter_objects())
        elif isinstance(command, Act):
            with _raised_by_the_first():
                getattr(rank.shards, command.method)(*command.arguments)


@contextmanager
def _raised_by_the_first() -> Iterator[None]:
    """What goes wrong here or there, unless the first process is gone."""
    try:
        yield
    except LostProcessError:
        raise
    except (InputError, ContractError):
        pass


# --- what the loop of the first process sees ---


class Team:
    """The processes of a run. Here there is one."""

    size = 1

    def __init__(self, shards: Shards | None = None) -> None:
        """``shards``: where policies are offloaded."""
        self.shards = shards

    def shared(self, policies: Policies) -> Policies:
        """The policies to sample and judge with."""
        return policies

    def moved(self, *names: str) -> None:
        """Says which policies (none: all that move) have other weights than before."""

    @property
    def shares_updates(self) -> bool:
        """Whether gradients are those of several processes, or of weights that are not all in place."""
        return self.shards is not None

    def differentiate(self, batches: Sequence[Sequence[Microbatch]]) -> Metrics:
        """Adds the gradients of everybody's microbatches, those of each process in turn; what was logged."""
        assert self.shards is not None
        return self.shards.differentiate(batches[0])


ALONE = Team()


class Leader(Team):
    """The first of several processes. A context manager: leaving it lets the others go."""

    def __init__(self, wire: Wire, setup: Setup, policies: Policies, shards: Shards | None = None) -> None:
        """Tells the others what to load; ``policies`` may have moved since. Raises what kept another from loading."""
        super().__init__(shards)
        self.size = wire.size
        self.wire, self.own = wire, Rank(wire, setup.config, policies, shards)
        self.names = {id(policy): name for name, policy in reversed(_named(policies).items())}
        self.stale: set[str] = set()
        self.moved()
        wire.broadcast_object(setup)
        failures = wire.all_gather_objects(None)
        if any(failures):
            wire.close()
        require(failures)
        if shards is not None:
            shards.announce, shards.led = wire.broadcast_object, True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        known = isinstance(error, InputError | ContractError | Interrupted)
        if error is None or (known and not isinstance(error, LostProcessError)):
            # after anything else the others may be in the middle of something: they see us end
            self.wire.broadcast_object(Stop())
            self.wire.close()

    def shared(self, policies: Policies) -> Policies:
        """Every policy as ``Shared``."""
        found = {name: Shared(self, self.names[id(policy)], policy) for name, policy in _named(policies).items()}
        return replace(policies, **cast(dict[str, Any], found))

    def moved(self, *names: str) -> None:
        if self.shards is not None:  # which know by themselves
            return
        self.stale |= set(names or self.names.values()) - {"reference"}

    @property
    def shares_updates(self) -> bool:
        return True

    def differentiate(self, batches: Sequence[Sequence[Microbatch]]) -> Metrics:
        self._refresh("live", "old")
        self.wire.broadcast_object(Differentiate())
        return self.own.differentiate(self.wire.scatter_objects(batches))

    def call(self, name: str, method: str, arguments: Sequence[tuple[Any, ...] | None]) -> list[Sent]:
        """Every process's result of a method of a policy; None where it is given no arguments."""
        self._refresh(name)
        self.wire.broadcast_object(Call(name, method))
        return self.own.call(name, method, self.wire.scatter_objects(arguments))

    def _refresh(self, *names: str) -> None:
        stale = sorted(self.stale.intersection(names))
        if stale:
            self.wire.broadcast_object(Refresh(stale))
            self.own.refresh(stale)
            self.stale.difference_update(stale)


class Shared(StandIn):
    """A policy that every process has: all sample and judge; anything else is the first one's own."""

    def __init__(self, leader: Leader, name: str, policy: Policy) -> None:
        self._leader, self._name, self._policy = leader, name, policy

    def policy(self) -> Policy:
        """That of the first process."""
        return self._policy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """As ``Policy.sample``; prompts are dealt in turn, so that everybody gets some of every task."""
        size = self._leader.size
        hands = [range(rank, len(prompts), size) for rank in range(size)]
        asked = [([prompts[i] for i in hand], sampling, [seeds[i] for i in hand]) if hand else None for hand in hands]
        groups: dict[int, Group] = {}
        for hand, found in zip(hands, self._leader.call(self._name, "sample", asked), strict=True):
            groups.update(zip(hand, found or (), strict=True))
        # a prompt comes back as a copy: groups keep the very object that was asked
        return [_of(prompt, groups[i]) for i, prompt in enumerate(prompts)]

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """As ``Policy.text_logprob``."""
        return self._by_rows("text_logprob", len(texts), lambda own: (contexts[own], texts[own]))

    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        *times: tuple[float, float],
        **named: tuple[float, float],
    ) -> torch.Tensor:
        """As ``Policy.image_logprob``."""
        given = (*times, *named.values())
        return self._by_rows(
            "image_logprob", len(images), lambda own: (contexts[own], images[own], draws, seeds[own], *given)
        )

    def _by_rows(self, method: str, rows: int, arguments: Callable[[slice], tuple[Any, ...]]) -> torch.Tensor:
        """Rows that follow each other stay together, for they share contexts."""
        size = self._leader.size
        if rows == 0:
            return cast(torch.Tensor, getattr(self._policy, method)(*arguments(slice(0, 0))))
        hands = [slice(rows * rank // size, rows * (rank + 1) // size) for rank in range(size)]
        asked = [arguments(hand) if hand.start < hand.stop else None for hand in hands]
        found = self._leader.call(self._name, method, asked)
        return torch.cat([part for part in found if part is not None])


def _of(prompt: Prompt, group: Group) -> Group:
    return Group(prompt, tuple(replace(trajectory, prompt=prompt) for trajectory in group.trajectories))


def _named(policies: Policies) -> dict[str, Policy]:
    """Those that there are; one that stands for two is named twice."""
    found = {field.name: getattr(policies, field.name) for field in fields(policies)}
    return {name: policy for name, policy in found.items() if policy is not None}
