"""Memory estimate of a run before anything is loaded.

Persistent memory (weights, moments, copies) is computed from shapes. Transient memory is measured: the policy's own
``sample``, the losses and their backward pass run on fake weights, at the sizes of the run's prompts, while the live
bytes are tracked.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lvrpo.distributed import world_size
from lvrpo.errors import InputError
from lvrpo.policies.adapter import AdaptablePolicy, has_adapter, inject_adapter
from lvrpo.policies.base import Policy, Sampling
from lvrpo.policies.decoding import last_step_alone
from lvrpo.policies.loading import DTYPES, pick_device, policy_class, policy_folder
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.rewards.base import SIDES
from lvrpo.rewards.table import IN_PYTHON, TASK_REWARD, build_rewards
from lvrpo.sampling.tokens import parts_as_on
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of, uses_old_policy
from lvrpo.training.losses.base import GroupAdvantages, Member, Microbatch, Objective
from lvrpo.training.memory import MemoryEstimate, NotEstimatedError
from lvrpo.training.microbatches import split
from lvrpo.training.policies import policy_module, shard_dtype, weights_dtype
from lvrpo.training.rollout_engine import ProcessEngineConfig
from lvrpo.training.validation import Validator
from lvrpo.types import Fact, FlowSegment, Group, MaskedSegment, OutputKind, Prompt, Segment, TextSegment, Trajectory

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors created by operations; ``peak`` is the maximum so far.

    Operations of real tensors (prompts, tokens, times) are computed. Those of fake tensors are not: their floats are
    fake; integers and booleans, which decide what comes next, are real zeros; a float that is asked for is 1.
    Convolutions include the workspace copies of their kernels on the device (cpu, cuda).
    """

    def __init__(self, not_counted: Iterable[torch.Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.now = self.peak = self._phase = 0
        self.device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any: the arguments of torch's interface."""
        out = self._run(func, args, kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + self._rearranged(args[0], args[1], out))
        return out

    def _run(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Any: as above."""
        if not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1.0
        if func in _INDEXED:
            args = (args[0], [place for index in args[1] for place in _places(index)], *args[2:])
        return tree_map(_with_zeros, func(*args, **kwargs))

    def _rearranged(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
        """Size of the channels-last copies of input and output in a convolution.

        oneDNN allocates one at a time, and none for 1 x 1 kernels (both measured); cuDNN both.
        """
        if max(weight.shape[2:]) == 1:
            return 0
        sizes = (x.nbytes, out.nbytes)
        return max(sizes) if self.device == "cpu" else sum(sizes)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size, self._phase)

    def restart(self) -> None:
        """Counts from 0: neither what is alive now, which may be garbage, nor that it is freed later."""
        self.now = self.peak = 0
        self._phase += 1

    def _freed(self, key: int, size: int, phase: int) -> None:
        self._known.discard(key)
        if phase == self._phase:
            self.now -= size


_INDEXED = (
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    *(aten._index_put_impl_.default, aten._unsafe_index.Tensor),
)
"""Operations whose second argument may hold masks, which have a shape of the result that depends on values."""


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as indices."""
    return list(index.nonzero().unbind(1)) if index is not None and index.dtype == torch.bool else [index]


def _with_zeros(x: Any) -> Any:
    """Any: an output of an operation."""
    if isinstance(x, FakeTensor) and not (x.is_floating_point() or x.is_complex()):
        return torch.zeros(x.shape, dtype=x.dtype)
    return x


def fake_weights(modules: Iterable[nn.Module]) -> None:
    """Replaces the parameters of modules, and their buffers on the meta device, by fake tensors on the CPU.

    Shared parameters stay shared; buffers of integers become zeros.
    """
    made: dict[torch.Tensor, torch.Tensor] = {}
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # the fake tensors keep it
    for module in {child: None for outer in modules for child in outer.modules()}:
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, old in own:
            if old not in made and isinstance(old, nn.Parameter):
                with mode:
                    made[old] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=old.requires_grad)
            elif old not in made:
                with mode:
                    made[old] = torch.empty(old.shape, dtype=old.dtype) if old.is_meta else old
                made[old] = _with_zeros(made[old])
            setattr(module, name, made[old])


T = TypeVar("T")

SMALL_MOMENTS = 4096
"""Parameters with fewer elements keep 32-bit moments in ``adamw_8bit``."""
PROGRAM = {"cpu": 56 << 20, "cuda": 2 * (32 << 20)}
"""Memory besides tensors. CPU: measured anonymous memory of a run of a policy of 4 MiB, with the data of the built-in
world. GPU: two cuBLAS workspaces (forward and backward thread), as large as on an H100."""
NAMES: dict[OutputKind, str] = {"text": "text", "image": "images"}
"""Kinds of outputs in the names of phases."""


def estimate_memory(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt] = (),
    device: torch.device | None = None,
    check: Callable[[Policy], object] = lambda policy: None,
) -> MemoryEstimate:
    """The memory of a run on its device, from the json and tokenizer files in the policy's folder.

    ``prompts``: those of a step; ``validation``: the held-out ones. Texts are assumed to have the maximum length. The
    CPU implementation is measured, also for a GPU, whose attention may be batched differently. ``device`` overrides
    that of the configuration; it need not exist. ``check``: called with the policy without weights, to refuse rows that
    it cannot read.
    Raises InputError for an adapter, NotEstimatedError for a class without ``EstimablePolicy.from_config`` and for a
    model that cannot run without values.
    """
    folder = policy_folder(config.policy)
    if has_adapter(folder):
        raise InputError(f"policy={config.policy}: is an adapter: make one model of it with `lvrpo export` first")
    kind = policy_class(folder)
    if getattr(kind, "from_config", None) is None:  # optional in a class
        raise NotEstimatedError(
            f"policy={config.policy}: its memory is not estimated, as its class {kind.__name__} has no from_config "
            "(docs/guides/your_model.md)"
        )
    device = device or pick_device(config.device)
    dtype = DTYPES.get(weights_dtype(config, folder) or "")
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta") if issubclass(kind, MoTPolicy) else nullcontext():
            policy = kind.from_config(folder, device, dtype)
        check(policy)
        return estimate_policy(policy, config, prompts, validation, device)


def estimate_policy(
    policy: Policy,
    config: TrainConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt] = (),
    device: torch.device | None = None,
) -> MemoryEstimate:
    """``estimate_memory`` of a policy on the meta device, which is modified."""
    module = policy_module(policy)
    if config.adapter is not None and isinstance(module, AdaptablePolicy):
        with torch.device("meta"):
            inject_adapter(module, config.adapter)
    kind = (device or pick_device(config.device)).type
    try:
        return StepMemory(module, config, kind).estimate(prompts, validation)
    except InputError:
        raise
    except Exception as error:  # any model of another package may need the values of tensors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise NotEstimatedError(
            f"policy={config.policy}: its memory is not estimated, as it does not run without values ({reason})"
        ) from error


class StepMemory:
    """The memory of a run of a policy, whose weights become fake.

    Prompts are the real ones; texts have their full length, of which one step is computed, as of the steps of a flow
    those that differ. Of every kind of output as many members are sampled as fill a batch, those with the longest
    prompts. The CPU implementation is measured, also for a GPU.
    """

    def __init__(self, policy: nn.Module, config: TrainConfig, device: str) -> None:
        """``policy``: with its adapter, on the meta device. ``device``: cpu or cuda."""
        self.module, self.config, self.device = policy, config, device
        self.policy = cast("Policy", policy)
        self.frozen_parts: list[nn.Module] = getattr(policy, "frozen_parts", [])  # optional in a class
        self.sampling = config.sampling(0)
        self.divided = config.offload or world_size() > 1
        self.in_rounds = self.divided and shard_dtype(self.policy, config) is not None
        fake_weights([policy, *self.frozen_parts])
        if config.precision.compute is not None:
            policy.set_compute_dtype(DTYPES[config.precision.compute])  # type: ignore[operator]
        config.limits.apply(self.policy)
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        if not self.in_rounds:  # which takes them away after every pass
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)
        self.live = LiveBytes(self.held(), device)
        self.peaks: dict[str, int] = {}
        """Of every phase of a step, in bytes; "replay" begins the names of those with a gradient."""
        self.groups: list[Group] = []

    # --- the whole ---

    def estimate(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> MemoryEstimate:
        """See ``estimate_memory``; once for an object."""
        config, on_gpu = self.config, self.device != "cpu"
        gradients = tensor_bytes(self.trained)
        mixed = bool(config.gradient_audit.every) or config.gradient_mixing != "sum"
        old = uses_old_policy(config, self.policy.segment_kinds)
        by_task = gradients * (len({prompt.task for prompt in prompts}) + 1) if mixed else 0
        sharded = self._sharded_bytes(old) + by_task if self.divided else 0
        host = sharded if config.offload else 0
        with self.live, torch.no_grad(), last_step_alone(), parts_as_on(self.device):
            self._measure_phases(prompts, validation)
        transient, (outputs, steps) = self.peaks, self.outputs()
        if self.divided:  # a reduce-scatter of float32, layer by layer
            layers = self.module.transformer.layers if isinstance(self.module, MoTPolicy) else [self.module]
            largest = max(sum(p.numel() for p in m.parameters() if p.requires_grad) for m in layers)
            transient["replay: summing gradients"] = 8 * largest + (gradients if self.in_rounds else 0)
        weights = tensor_bytes(
            t for m in (self.module, *self.frozen_parts) for t in m.state_dict(keep_vars=True).values()
        )
        persistent = {
            "weights": weights,
            "frozen and averaged weights": 0 if self.divided else (1 + old + (config.adapter is None)) * gradients,
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

    def held(self) -> list[torch.Tensor]:
        """The tensors that are counted as persistent, or as gradients."""
        modules = self.module, *self.frozen_parts
        tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
        return tensors + [p.grad for p in self.trained if p.grad is not None]

    def outputs(self) -> tuple[int, int]:
        """Bytes of the outputs of a step on the device, and in host memory.

        On the device are latents of flows, and the images of a Mixture-of-Transformers.
        """
        device, host, decoded = 0, 0, isinstance(self.module, MoTPolicy)
        for segment in (s for group in self.groups for t in group.trajectories for s in t.segments):
            whole = tensor_bytes(_tensors(segment))
            stays = segment.latent.nbytes + decoded * segment.image.nbytes if isinstance(segment, FlowSegment) else 0
            device, host = device + stays, host + whole - stays
        return device, host

    # --- phases ---

    def _measure_phases(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> None:
        for same in _alike(prompts, lambda prompt: prompt.output):
            self.groups += self._sample("rollout", same, self.sampling)
        for same in _alike(validation, lambda prompt: prompt.output):
            self._sample("validation", same, Validator({}, self.config).sampling)
        drawn = [t for group in self.groups for t in group.trajectories if t.image is not None]
        if drawn and self.asks_judge():
            self._measure("judge", lambda: self._judge(drawn))
        for objective in objectives_of(self.config, self.policy.segment_kinds):
            for task in dict.fromkeys(prompt.task for prompt in prompts):
                self._replay(objective, [group for group in self.groups if group.prompt.task == task])

    def asks_judge(self) -> bool:
        """Whether a reward may ask the judge about images."""
        if "read" not in getattr(self.module, "judging_sides", SIDES):  # optional in a class
            return False
        rows = [r for r in self.config.rewards if r.where is None and r.name != TASK_REWARD]
        rows = [r for r in rows if not r.name.startswith(f"{IN_PYTHON}:")]
        return any(source.judge is not None or "read" in source.sides for source in build_rewards(rows))

    def _measure(self, name: str, run: Callable[[], T], gradient: bool = False) -> T:
        """Runs a phase and records its peak."""
        self.live.restart()
        with torch.set_grad_enabled(gradient):
            found = run()
        if self.in_rounds:
            self.module.zero_grad(set_to_none=True)
        self.peaks[name] = max(self.peaks.get(name, 0), self.live.peak)
        return found

    # --- rollout ---

    def _sample(self, name: str, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """Groups of prompts of one output: of the longest ones sampled, of the others like the first of their kind."""
        name = f"{name} of {' and '.join(NAMES[kind] for kind in prompts[0].output)}"

        def sample(some: Sequence[Prompt]) -> list[Group]:
            return self._measure(name, lambda: self.policy.sample(some, sampling, list(range(len(some)))))

        def sources(prompt: Prompt) -> list[torch.Size]:
            return [part.shape for part in prompt.parts if not isinstance(part, str) and "image" in prompt.output]

        kinds: dict[object, list[Group]] = {}  # by the size of what is drawn
        for same in _alike(prompts, sources):
            members = sample(same[:1])[0].trajectories
            size = None if members[0].image is None else members[0].image.shape
            kinds.setdefault(size, []).extend(Group(p, tuple(replace(t, prompt=p) for t in members)) for p in same)
        found: list[Group] = []
        for groups in kinds.values():
            longest = sorted(groups, key=lambda group: -self._tokens(group.trajectories[0]))
            count = -(-self._filling(longest[0].trajectories[0]) // len(longest[0]))
            if count > 1 and len(longest) > 1:
                longest[:count] = sample([group.prompt for group in longest[:count]])
            found += longest
        return [
            replace(g, trajectories=tuple(_with_values(t, sampling.num_steps) for t in g.trajectories)) for g in found
        ]

    def _filling(self, trajectory: Trajectory) -> int:
        """As many trajectories as this one fill a forward pass."""
        most = getattr(self.module, "max_tokens", None)  # optional in a class: all go through at once
        return sys.maxsize if most is None else -(-most // max(1, self._tokens(trajectory)))

    def _tokens(self, trajectory: Trajectory) -> int:
        """Tokens of a row of a forward pass."""
        counts = self.policy.count_tokens(trajectory)
        return counts.context + counts.text + counts.image

    # --- replay and judge ---

    def _replay(self, objective: Objective, groups: Sequence[Group]) -> None:
        members, count = self.largest_microbatch(groups, objective)
        if not members:
            return
        name, policy = f"replay of {NAMES[objective.output]}", self.policy
        batch = Microbatch(groups[0].prompt.task, objective.kind, 0, members, 1.0)
        kept = 0

        def run() -> None:
            nonlocal kept
            with torch.no_grad():
                frozen = {n: objective.reference_outputs(n, policy, batch) for n in objective.frozen_policies}
            kept = tensor_bytes(frozen.values())
            output = objective.loss(policy, replace(batch, frozen=frozen))
            output.loss.backward()  # while the metrics, which keep their own parts of the graph, are alive

        before = self.peaks.pop(name, 0)
        self._measure(name, run, gradient=True)
        # outputs of frozen policies are computed for all microbatches first
        self.peaks[name] = max(before, self.peaks[name] + kept * (count - 1))

    def _judge(self, drawn: Sequence[Trajectory]) -> None:
        """A batch of questions at least, one for every fact of every image."""
        asked = [
            ((trajectory.image, fact.question), fact.answer)
            for trajectory in drawn
            for fact in trajectory.prompt.facts or (Fact("", "", ""),)
            if trajectory.image is not None
        ]
        asked = asked[: self._filling(drawn[0])]
        self.policy.text_logprob([context for context, _ in asked], [answer for _, answer in asked])

    def largest_microbatch(self, groups: Sequence[Group], objective: Objective) -> tuple[list[Member], int]:
        """The largest microbatch of groups of one task that all have signal, and the number of microbatches."""
        policy = self.policy
        longest = sorted(groups, key=lambda group: -policy.count_tokens(group.trajectories[0]).context)

        def size(members: Sequence[Member]) -> int:
            found = [(policy.count_tokens(m.trajectory), objective.passes(m.trajectory)) for m in members]
            return sum(tokens.context + tokens.text + tokens.image * passes for tokens, passes in found)

        A = torch.linspace(-1, 1, self.config.rollout.group_size).expand(len(groups), -1)
        chosen = objective.select_members(longest, GroupAdvantages.all_valid(A))
        cuts = list(split(chosen, objective, policy, self.config.limits))
        return list(max(cuts, key=size, default=[])), len(cuts)


def _alike(prompts: Iterable[Prompt], key: Callable[[Prompt], object]) -> list[list[Prompt]]:
    """Prompts by a key, compared as text."""
    classes: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        classes.setdefault(str(key(prompt)), []).append(prompt)
    return list(classes.values())


def _with_values(trajectory: Trajectory, num_steps: int) -> Trajectory:
    """Values that others look at: pixels of zeros for a judge, and steps of which each reveals some tokens."""
    segments: list[Segment] = []
    for segment in trajectory.segments:
        if not isinstance(segment, TextSegment):
            segment = replace(segment, image=torch.zeros(segment.image.shape))
        if isinstance(segment, MaskedSegment):
            count = len(segment.tokens)
            segment = replace(segment, reveal_steps=torch.arange(count) * min(num_steps, count) // count)
        segments.append(segment)
    return replace(trajectory, segments=tuple(segments))


def _tensors(segment: Segment) -> list[torch.Tensor]:
    values: list[Any] = [getattr(segment, field.name) for field in fields(segment)]  # Any: fields of every type
    return [value for value in values if isinstance(value, torch.Tensor)]


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())
