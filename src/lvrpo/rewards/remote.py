"""Rewards whose objects live in Ray actors: other processes, with cards of their own, on any node of a cluster.

An actor that dies, or does not answer in time, loses the scores of the group it was scoring and no other.
"""

from __future__ import annotations

import math
import os
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypeVar
from weakref import WeakValueDictionary

import torch

from lvrpo.config import config_sha256
from lvrpo.distributed import device, world_size
from lvrpo.distributed.ray_cluster import ray_cluster, resources
from lvrpo.errors import ContractError, InputError, LvrpoError
from lvrpo.policies.base import Judge
from lvrpo.registry import allow_code, allowed_code
from lvrpo.rewards.async_scoring import cancellation
from lvrpo.rewards.base import Scores, Side
from lvrpo.rewards.config import ConfiguredReward, RayConfig, RewardConfig, checked_scores, configured_reward
from lvrpo.types import FlowSegment, Group, OutputKind, Prompt

ROOM_S = 120.0
"""Seconds that the cluster may take to start an actor."""
DEATHS = 2
"""Deaths of its actor after which a group has no scores."""
T = TypeVar("T")


@dataclass(frozen=True)
class Traits:
    """The optional attributes of a reward, as its row has them."""

    judges: tuple[OutputKind, ...]
    sides: tuple[Side, ...]
    judged_by: str
    relative: bool

    @classmethod
    def from_source(cls, source: ConfiguredReward) -> Self:
        return cls(source.judges, source.sides, source.judged_by, source.relative)


# --- in the actor ---


class RewardActor:
    """Creates its reward at the first call and after each restart, and scores one group at a time."""

    def __init__(self, config: RewardConfig, folder: str, allowed: Sequence[str]) -> None:
        self.config, self.folder, self.allowed = config, folder, allowed
        self._source: ConfiguredReward | None = None

    def ping(self) -> None:
        """Returns once the actor runs."""

    def make(self) -> Traits | LvrpoError:
        """Creates the reward; returns its traits, or the error."""
        return _or_error(lambda: Traits.from_source(self._reward()))

    def applies(self, prompts: Sequence[Prompt]) -> list[bool] | LvrpoError:
        """Whether each can be scored."""
        return _or_error(lambda: [self._reward().scores(prompt) for prompt in prompts])

    def score(self, group: Group) -> Iterator[Scores | LvrpoError | None]:
        """None when it begins, then what was found: who waits knows whose call an actor died of."""
        yield None
        nobody: Any = None
        yield _or_error(lambda: checked_scores(self._reward(), [group], self._reward().judge or nobody))

    def _reward(self) -> ConfiguredReward:
        if self._source is None:
            try:
                os.chdir(self.folder)  # paths are relative to it
            except OSError as error:
                raise InputError(
                    f"rewards.{self.config.title}.where: its node does not see {self.folder} ({error.strerror}): start "
                    "the run in a folder that all nodes share"
                ) from None
            allow_code(self.allowed)
            self._source = configured_reward(self.config, str(device()))
        return self._source


def _or_error(function: Callable[[], T]) -> T | LvrpoError:
    """Errors of lvrpo go back as they are; those that Ray raises are of kinds of its own."""
    try:
        return function()
    except LvrpoError as error:
        return error


# --- in the processes that train ---


def remote_reward(config: RewardConfig) -> RemoteReward:
    """The reward of a row with ``where``; rows that differ only in the use of scores share its actors.

    Raises InputError where ray or room in the cluster is missing, where the reward cannot be made, and for one that
    asks the run's judge.
    """
    alone = {"where": None, "weight": 1.0, "on_failure": "mask"}
    alone |= dict.fromkeys(("max_failed", "clip", "normalize", "schedule"))
    key = config_sha256(config.model_copy(update={**alone, "where": config.where}))
    found = _rewards.get(key)
    if found is None:
        found = RemoteReward(config.model_copy(update=alone), config.where.ray, key)  # pyright: ignore[reportOptionalMemberAccess]
        _rewards[key] = found
    return found


def shared_namespace() -> str:
    """Ray namespace: one for all processes of a run, and for no other run."""
    if world_size() == 1:
        return _own_namespace
    names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    return "lvrpo " + " ".join(os.environ.get(name, "") for name in names)


def portable(group: Group) -> Group:
    """A copy of a group without what rewards do not read: the states of images, which are megabytes."""

    def own(value: Any) -> Any:  # Any: whatever a field holds
        return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value

    def segment(of: Any) -> Any:  # Any: of any kind
        if isinstance(of, FlowSegment):
            states = {name: getattr(of, name) for name in ("states", "next_states")}
            of = replace(of, means=None, **{name: t.new_zeros(0, *t.shape[1:]) for name, t in states.items()})
        return replace(of, **{field.name: own(getattr(of, field.name)) for field in fields(of)})

    prompt = _portable_prompt(group.prompt)
    members = [replace(t, prompt=prompt, segments=tuple(map(segment, t.segments))) for t in group.trajectories]
    return Group(prompt, tuple(members))


def _portable_prompt(prompt: Prompt) -> Prompt:
    """A copy of a prompt with copies of its images."""
    parts = tuple(part if isinstance(part, str) else part.detach().cpu().clone() for part in prompt.parts)
    return replace(prompt, parts=parts, edited=None if prompt.edited is None else prompt.edited.cpu().clone())


@dataclass
class _Replica:
    """One actor. Any: a handle of Ray, and a reference to a call."""

    name: str
    actor: Any
    starting: Any
    """The call that returns once it runs; None: it does."""
    since: float
    """When ``starting`` was sent."""


@dataclass
class _Call:
    row: int
    replica: _Replica
    since: float
    began: bool = False


class RemoteReward:
    """A reward in actors, as the table of rewards sees it."""

    def __init__(self, config: RewardConfig, where: RayConfig, key: str) -> None:
        self.config, self.where, self.title = config, where, config.title
        self.ray: Any = ray_cluster(f"rewards.{self.title}.where")  # a package that need not be there
        self._applies_to: dict[int, tuple[Prompt, bool]] = {}
        now = time.monotonic()
        self.replicas = [
            _Replica(name, *self._start_actor(name), now) for name in (f"{key} {i}" for i in range(where.replicas))
        ]
        while any(replica.starting is not None for replica in self.replicas):
            if time.monotonic() - now > ROOM_S:
                raise InputError(self._no_room())
            self.poll_actors(0.5)
        for replica in self.replicas[1:]:  # all load at once
            replica.actor.make.remote()
        traits: Traits = self._call_actor("make")
        if traits.sides:
            raise InputError(
                f"rewards.{self.title}.where: asks the run's judge, which stays where the run trains: give the row "
                "judge: FOLDER, say sides = () in a class that asks nobody, or leave where out"
            )
        self.judges, self.sides, self.judged_by, self.relative = traits.judges, (), traits.judged_by, traits.relative

    def applies(self, prompt: Prompt) -> bool:
        """See ``Reward.applies``; prompts of ``prefetch_applies`` need no further call."""
        self.prefetch_applies([prompt], keep=True)
        return self._applies_to[id(prompt)][1]

    def prefetch_applies(self, prompts: Sequence[Prompt], keep: bool = False) -> None:
        """Asks about all prompts that it does not know at once, for a call waits behind those of other processes.

        ``keep``: prompts of calls before are remembered too.
        """
        same = [prompt for prompt in prompts if self._applies_to.get(id(prompt), (None,))[0] is prompt]
        known = {id(prompt): self._applies_to[id(prompt)] for prompt in same}
        asked = [prompt for prompt in prompts if id(prompt) not in known]
        reply = self._call_actor("applies", [_portable_prompt(prompt) for prompt in asked]) if asked else ()
        found = {id(prompt): (prompt, bool(own)) for prompt, own in zip(asked, reply, strict=True)}
        self._applies_to = (self._applies_to if keep else {}) | known | found

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        """See ``Reward.score``; ``judge`` stays here. A group whose call failed has nan, and the reason."""
        found = _Scoring(self, groups).found()
        values, failures = torch.full((len(groups), len(groups[0])), math.nan), {}
        for p in range(len(groups)):
            of = found[p]
            if isinstance(of, str):
                failures |= {(p, g): of for g in range(len(groups[0]))}
                continue
            values[p] = of.values[0]
            failures |= {(p, g): why for (_, g), why in of.failures.items()}
        return Scores(values, failures)

    @property
    def longest_wait(self) -> float:
        """Seconds in which a call is answered that waits behind one of every process."""
        return ROOM_S + self.where.timeout_s * world_size()

    def poll_actors(self, wait_s: float) -> None:
        """Waits briefly for actors that are starting; replaces one that is lost."""
        starting = {replica.starting: replica for replica in self.replicas if replica.starting is not None}
        for call in self.ray.wait(list(starting), timeout=wait_s)[0] if starting else ():
            replica = starting[call]
            try:
                self.ray.get(call)
                replica.starting = None
            except self.ray.exceptions.ActorUnavailableError:
                time.sleep(0.2)
                replica.starting = replica.actor.ping.remote()
            except self.ray.exceptions.RayActorError:  # its name may be that of one that still ends
                time.sleep(0.2)
                replica.actor, replica.starting = self._start_actor(replica.name)

    def restarting(self, replica: _Replica) -> None:
        """Ray makes a new process for it."""
        replica.starting, replica.since = replica.actor.ping.remote(), time.monotonic()

    def _start_actor(self, name: str) -> tuple[Any, Any]:
        """An actor, which other processes may have made, and a call that returns once it runs."""
        takes = {"num_cpus": self.where.num_cpus, "num_gpus": self.where.num_gpus, "max_restarts": -1}
        named = {"name": name, "namespace": shared_namespace(), "get_if_exists": True}
        cls = self.ray.remote(RewardActor).options(**takes, **named)
        actor = cls.remote(self.config, os.getcwd(), sorted(allowed_code()))
        return actor, actor.ping.remote()

    def _call_actor(self, method: str, *args: Any) -> Any:
        """Calls a method of an actor; raises what the reward raises, and ContractError if no actor answers."""
        lost = ""
        for _ in range(DEATHS * world_size()):
            since = time.monotonic()
            while all(replica.starting is not None for replica in self.replicas) and time.monotonic() - since < ROOM_S:
                self.poll_actors(0.5)
            replica = next((r for r in self.replicas if r.starting is None), self.replicas[0])
            try:
                reply = self.ray.get(getattr(replica.actor, method).remote(*args), timeout=self.longest_wait)
            except self.ray.exceptions.RayActorError:
                self.restarting(replica)
                lost = "its actor dies of it"
            except self.ray.exceptions.RayError as error:
                lost = type(error).__name__
                break
            else:
                if isinstance(reply, LvrpoError):
                    raise reply
                return reply
        raise ContractError(f"reward {self.title!r}: {method} failed: {lost}: correct {self.config.name}")

    def _no_room(self) -> str:
        where, has, free = self.where, resources(self.ray), self.ray.available_resources()
        there = " and ".join(f"{has[kind]:g} {kind}s ({free.get(kind, 0):g} free)" for kind in has)
        return (
            f"rewards.{self.title}.where: no room within {ROOM_S:g} s for {where.replicas} x ({where.num_cpus:g} CPUs "
            f"and {where.num_gpus:g} GPUs): the Ray cluster has {there}: ask for less, or add nodes"
        )


class _Scoring:
    """One call of ``RemoteReward.score``: each group goes to an actor that is idle for this process."""

    def __init__(self, reward: RemoteReward, groups: Sequence[Group]) -> None:
        self.reward, self.groups, self.ray = reward, groups, reward.ray
        self.todo = deque(range(len(groups)))
        self.done: dict[int, Scores | str] = {}
        self.calls: dict[Any, _Call] = {}  # by what Ray gives for a call
        self.deaths, self.own_deaths = Counter[int](), Counter[int]()
        self.over = cancellation()

    def found(self) -> dict[int, Scores | str]:
        """The scores of every group, or the reason why it has none; raises the LvrpoErrors of the reward."""
        while len(self.done) < len(self.groups):
            self.reward.poll_actors(0)
            self._submit()
            starting = [r.starting for r in self.reward.replicas if r.starting is not None]
            for asked in self.ray.wait([*self.calls, *starting], timeout=0.5)[0]:
                if asked in self.calls:
                    self._collect(asked, self.calls[asked])
            self._end_overdue()
            if self.over.is_set():
                raise ContractError(f"reward {self.reward.title!r}: the run was stopped")
        return self.done

    def _submit(self) -> None:
        busy = [call.replica for call in self.calls.values()]
        for replica in self.reward.replicas:
            if self.todo and replica.starting is None and replica not in busy:
                row = self.todo.popleft()
                call = replica.actor.score.options(num_returns="streaming")
                self.calls[call.remote(portable(self.groups[row]))] = _Call(row, replica, time.monotonic())

    def _collect(self, asked: Any, call: _Call) -> None:
        """Handles an actor's answer for a group. Any: an object of Ray."""
        try:
            reply: Scores | LvrpoError | None = self.ray.get(next(asked))
        except self.ray.exceptions.RayActorError:
            del self.calls[asked]
            self.reward.restarting(call.replica)
            self.deaths[call.row] += 1
            self.own_deaths[call.row] += call.began
            # one that had not begun waited behind the call of another process
            if self.own_deaths[call.row] < DEATHS and self.deaths[call.row] < DEATHS * world_size():
                self.todo.append(call.row)
            else:
                self.done[call.row] = f"its actor died ({self.deaths[call.row]} times)"
            return
        except self.ray.exceptions.RayError as error:
            reply = None
            self.done[call.row] = type(error).__name__
        if isinstance(reply, LvrpoError):
            raise reply
        if reply is not None:
            self.done[call.row] = reply
        if call.row in self.done:
            del self.calls[asked]
        else:
            call.began, call.since = True, time.monotonic()

    def _end_overdue(self) -> None:
        now, where = time.monotonic(), self.reward.where
        for asked, call in list(self.calls.items()):
            limit = where.timeout_s if call.began else self.reward.longest_wait
            if now - call.since > limit:
                del self.calls[asked]
                self.ray.kill(call.replica.actor, no_restart=False)
                self.reward.restarting(call.replica)
                self.done[call.row] = f"no answer within timeout_s={where.timeout_s:g}"
        if not self.calls and all(r.starting is not None and now - r.since > ROOM_S for r in self.reward.replicas):
            self.done |= dict.fromkeys(self.todo, f"no actor came back within {ROOM_S:g} s")


_rewards: WeakValueDictionary[str, RemoteReward] = WeakValueDictionary()
_own_namespace = f"lvrpo {uuid.uuid4().hex}"
