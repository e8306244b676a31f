"""Memory of a run: the persistent part, from shapes, and the phases of a step, which kinds of policies measure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lvrpo.distributed import world_size
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import DTYPES
from lvrpo.rewards.base import SIDES
from lvrpo.rewards.table import IN_PYTHON, TASK_REWARD, build_rewards
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import uses_old_policy
from lvrpo.training.losses.base import GroupAdvantages, Member, Objective
from lvrpo.training.memory import MemoryEstimate
from lvrpo.training.microbatches import split
from lvrpo.training.policies import shard_dtype
from lvrpo.training.rollout_engine import ProcessEngineConfig
from lvrpo.types import Fact, Group, OutputKind, Parts, Prompt, Trajectory

SMALL_MOMENTS = 4096
"""Parameters with fewer elements keep 32-bit moments in ``adamw_8bit``."""
PROGRAM = {"cpu": 56 << 20, "cuda": 2 * (32 << 20)}
"""Memory besides tensors. CPU: measured anonymous memory of a run of a policy of 4 MiB, with the data of the built-in
world. GPU: two cuBLAS workspaces (forward and backward thread), as large as on an H100."""


class StepMemory(ABC):
    """The memory of a run of a policy whose tensors are fake; see ``memory_estimate.estimate_memory``."""

    whole: int
    """Bytes of the policy's weights without an adapter."""

    def __init__(self, policy: nn.Module, config: TrainConfig, whole: int, device: str) -> None:
        """``policy``: with its adapter; it is changed. ``device``: cpu or cuda."""
        self.module, self.config, self.whole, self.device = policy, config, whole, device
        self.policy = cast("Policy", policy)
        self.frozen_parts: list[nn.Module] = getattr(policy, "frozen_parts", [])  # optional in a class
        self.sampling = config.sampling(0)
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.divided = config.offload or world_size() > 1
        self.in_rounds = self.divided and shard_dtype(self.policy, config) is not None

    def prepare(self) -> None:
        """Sets dtype and limits of the policy and makes its gradients, once its tensors are fake."""
        if self.config.precision.compute is not None:
            self.module.set_compute_dtype(DTYPES[self.config.precision.compute])  # type: ignore[operator]
        self.config.limits.apply(self.policy)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]
        if not self.in_rounds:  # which takes them away after every pass
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)

    # --- what a kind of policy measures ---

    @abstractmethod
    def phases(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> dict[str, int]:
        """The peak of every phase of a step, in bytes; "replay" begins the names of those with a gradient."""

    @abstractmethod
    def outputs(self, prompts: Sequence[Prompt]) -> tuple[int, int]:
        """Bytes of the outputs of one step on the device, and of their recorded steps in host memory."""

    def layers(self) -> list[nn.Module]:
        """The modules whose sharded gradients are summed one after another."""
        return [self.module]

    # --- the whole ---

    def estimate(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> MemoryEstimate:
        config, on_gpu = self.config, self.device != "cpu"
        gradients = tensor_bytes(self.trained)
        mixed = bool(config.gradient_audit.every) or config.gradient_mixing != "sum"
        old = uses_old_policy(config, self.policy.segment_kinds)
        by_task = gradients * (len({prompt.task for prompt in prompts}) + 1) if mixed else 0
        sharded = self._sharded_bytes(old) + by_task if self.divided else 0
        host = sharded if config.offload else 0
        transient = self.phases(prompts, validation)
        outputs, steps = self.outputs(prompts)
        if self.divided:  # a reduce-scatter of float32, layer by layer
            largest = max((sum(p.numel() for p in m.parameters() if p.requires_grad) for m in self.layers()), default=0)
            transient["replay: summing gradients"] = 8 * largest + (gradients if self.in_rounds else 0)
        weights = tensor_bytes(
            t for m in (self.module, *self.frozen_parts) for t in m.state_dict(keep_vars=True).values()
        )
        persistent = {
            "weights": weights,
            "frozen and averaged weights": self.weight_copy_bytes(old),
            "the judge's own weights": 0 if self.divided else gradients * self._judge_copies(),
            "moments": 0 if self.divided else self._moments(),
            "this process's share": 0 if config.offload else sharded // world_size(),
            "gradients by task": 0 if self.divided else by_task,
            "outputs of a step": 2 * outputs + (0 if on_gpu else 2 * steps),
            "offloaded": 0 if on_gpu else host,
            "program": PROGRAM[self.device],
        }
        engine = config.rollout.engine
        if isinstance(engine, ProcessEngineConfig) and engine.device is None:  # on this device as well
            persistent["rollout engine"] = weights + persistent["program"]
        host_only = host + 2 * steps if on_gpu and config.offload else 0
        return MemoryEstimate(persistent, 0 if self.in_rounds else gradients, transient, host_only)

    def weight_copy_bytes(self, old: bool) -> int:
        """Bytes of average, old policy and reference, which sharded runs count among their share."""
        return 0 if self.divided else (1 + old + (self.config.adapter is None)) * tensor_bytes(self.trained)

    def _sharded_bytes(self, old: bool) -> int:
        """Sharded bytes of all processes together: float32 weights and averages, reference, moments, gradients."""
        numbers = sum(parameter.numel() for parameter in self.trained)
        reference = 0 if self.config.adapter is not None else tensor_bytes(self.trained)
        return 4 * numbers * (3 + old + self._judge_copies()) + reference + self._moments()

    def _judge_copies(self) -> int:
        """Number of weight sets of the judge: its own, and that of a slow EMA candidate."""
        judge = self.config.judge
        return judge.is_refreshed * (1 + (judge.kind == "average" and judge.refresh_every is not None))

    def _moments(self) -> int:
        kind, total = self.config.optimizer.kind, 0
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            each = 8
            if kind == "adamw_8bit" and parameter.numel() >= SMALL_MOMENTS:
                each = 2
            if kind == "muon" and parameter.ndim == 2 and ".layers." in name and self.config.adapter is None:
                each = 4
            total += each * parameter.numel()
        return total * len(self.config.phases(self.policy.segment_kinds))

    # --- shared by the kinds ---

    def held(self) -> list[torch.Tensor]:
        """The tensors that are counted as persistent, or as gradients."""
        modules = self.module, *self.frozen_parts
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return tensors + [p.grad for p in self.trained if p.grad is not None]

    def asks_judge(self) -> bool:
        """Whether a reward may ask the judge about drawings."""
        if "read" not in getattr(self.module, "judging_sides", SIDES):  # optional in a class
            return False
        rows = [r for r in self.config.rewards if r.where is None and r.name != TASK_REWARD]
        rows = [r for r in rows if not r.name.startswith(f"{IN_PYTHON}:")]
        return any(source.judge is not None or "read" in source.sides for source in build_rewards(rows))

    def largest_microbatch(self, groups: Sequence[Group], objective: Objective) -> tuple[list[Member], int]:
        """The largest microbatch of groups of one task that all have signal, and the number of microbatches."""
        policy = self.policy
        longest = sorted(groups, key=lambda group: -policy.count_tokens(group.trajectories[0]).context)

        def size(members: Sequence[Member]) -> int:
            found = [(policy.count_tokens(m.trajectory), objective.passes(m.trajectory)) for m in members]
            return sum(tokens.context + tokens.text + tokens.image * passes for tokens, passes in found)

        with unset_fake_temporarily():  # the selection needs values of advantages and times
            A = torch.linspace(-1, 1, self.config.rollout.group_size).expand(len(groups), -1)
            chosen = objective.select_members(longest, GroupAdvantages.all_valid(A))
            cuts = list(split(chosen, objective, policy, self.config.limits))
            return list(max(cuts, key=size, default=[])), len(cuts)


NAMES: dict[OutputKind, str] = {"text": "text", "image": "drawings"}
"""Kinds of outputs in the names of phases."""


def name_of(output: Sequence[OutputKind]) -> str:
    """What is written and drawn, in the name of a phase."""
    return " and ".join(NAMES[kind] for kind in output)


def questions_about(drawn: Sequence[Trajectory]) -> list[tuple[Parts, str]]:
    """What a judge is asked about drawings, with the answers: one question for every fact of every image."""
    return [
        ((trajectory.image, fact.question), fact.answer)
        for trajectory in drawn
        for fact in trajectory.prompt.facts or (Fact("", "", ""),)
        if trajectory.image is not None
    ]


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())
