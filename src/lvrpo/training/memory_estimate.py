"""Memory estimate of a run before anything is loaded.

Persistent memory (weights, moments, copies) is computed from shapes. Transient memory is measured by running the phases
of a step on fake tensors at the sizes of the run's prompts and tracking the live bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lvrpo.distributed import world_size
from lvrpo.errors import InputError
from lvrpo.policies.adapter import has_adapter, inject_adapter
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Policy
from lvrpo.policies.flow import FlowSample, flow_segments, guidance_of
from lvrpo.policies.loading import DTYPES, pick_device, policy_class, policy_folder
from lvrpo.policies.mot import flow_sampler, generate
from lvrpo.policies.mot.attention import forget_packings
from lvrpo.policies.mot.generate import Decoder, decode_batch_size
from lvrpo.policies.mot.model_runner import Grid, row_tokens, run_ids
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.mot.trajectory import tokenized_text
from lvrpo.policies.mot.transformer import Cache
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.table import IN_PYTHON, TASK_REWARD, build_rewards
from lvrpo.sampling import timestep_grid
from lvrpo.training.config import TrainConfig
from lvrpo.training.losses import objectives_of, uses_old_policy
from lvrpo.training.losses.base import GroupAdvantages, Member, Objective, flow_segment
from lvrpo.training.losses.dpo import FlowDPOConfig, TextDPOConfig
from lvrpo.training.losses.flow import FreshNoiseConfig, NoisingConfig
from lvrpo.training.losses.flow_grpo import RecordedStepsConfig
from lvrpo.training.losses.grpo import PolicyGradientConfig
from lvrpo.training.memory import MemoryEstimate
from lvrpo.training.microbatches import split
from lvrpo.training.policies import shard_dtype, weights_dtype
from lvrpo.training.rollout_engine import ProcessEngineConfig
from lvrpo.types import Fact, FlowSegment, Group, Image, Prompt, TextSegment, Trajectory

SMALL_MOMENTS = 4096
"""Parameters with fewer elements keep 32-bit moments in ``adamw_8bit``."""
PROGRAM = {"cpu": 56 << 20, "cuda": 2 * (32 << 20)}
"""Memory besides tensors. CPU: measured anonymous memory of a run of a policy of 4 MiB, with the data of the built-in
world. GPU: two cuBLAS workspaces (forward and backward thread), as large as on an H100."""


def estimate_memory(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt] = (),
    device: torch.device | None = None,
    check: Callable[[Policy], object] = lambda policy: None,
) -> MemoryEstimate | None:
    """The memory of a run on its device, from the shapes in the policy's folder.

    ``prompts``: those of a step; ``validation``: the held-out ones. Texts are assumed to have the maximum length. The
    CPU implementation is measured, also for a GPU, whose attention may be batched differently. ``device`` overrides
    that of the configuration; it need not exist. ``check``: called with the policy without weights, to refuse rows that
    it cannot read.
    Returns None for a policy that is not a Mixture-of-Transformers. Raises InputError for an adapter.
    """
    folder = policy_folder(config.policy)
    if has_adapter(folder):
        raise InputError(f"policy={config.policy}: is an adapter: make one model of it with `lvrpo export` first")
    kind = policy_class(folder)
    if not issubclass(kind, MoTPolicy):
        return None
    forget_packings()
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            device = device or pick_device(config.device)
            policy = kind.from_config(folder, device, DTYPES.get(weights_dtype(config, folder) or ""))
        check(policy)
        return estimate_policy(policy, config, prompts, validation, device)
    finally:
        forget_packings()


def estimate_policy(
    policy: MoTPolicy,
    config: TrainConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt] = (),
    device: torch.device | None = None,
) -> MemoryEstimate:
    """``estimate_memory`` of a policy on the meta device, which is modified."""
    whole = _bytes(policy.state_dict().values())
    with torch.device("meta"):
        if config.adapter is not None:
            inject_adapter(policy, config.adapter)
    forget_packings()
    try:
        kind = (device or pick_device(config.device)).type
        return _estimate_without_memory(policy, config, whole, prompts, validation, kind)
    finally:
        forget_packings()


def _estimate_without_memory(
    policy: MoTPolicy,
    config: TrainConfig,
    whole: int,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt],
    device: str,
) -> MemoryEstimate:
    with FakeTensorMode(allow_non_fake_inputs=True):  # images of the prompts are real tensors
        for module in policy.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
        return _Estimator(policy, config, whole, device).estimate(prompts, validation)


class _Estimator:
    """Runs the phases of a step on fake tensors; see ``estimate_memory``."""

    def __init__(self, policy: MoTPolicy, config: TrainConfig, whole: int, device: str) -> None:
        self.policy, self.config = policy, config
        self.whole = whole
        self.device = device
        self.sampling = config.sampling(0)
        if config.precision.compute is not None:
            policy.set_compute_dtype(DTYPES[config.precision.compute])
        config.limits.apply(policy)
        if isinstance(policy, BagelPolicy):
            _skip_resizing(policy)
        self.runner = policy.runner
        self.trained = [p for p in policy.parameters() if p.requires_grad]
        self.divided = config.offload or world_size() > 1
        self.in_rounds = self.divided and shard_dtype(policy, config) is not None
        if not self.in_rounds:  # which takes them away after every pass
            for parameter in self.trained:
                parameter.grad = torch.empty_like(parameter)

    def estimate(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> MemoryEstimate:
        config, group_size = self.config, self.config.rollout.group_size
        gradients = _bytes(self.trained)
        mixed = bool(config.gradient_audit.every) or config.gradient_mixing != "sum"
        tasks = {prompt.task for prompt in prompts}
        old = uses_old_policy(config, self.policy.segment_kinds)
        copies = (1 + old + (config.adapter is None)) * gradients
        by_task = gradients * (len(tasks) + 1) if mixed else 0
        sharded, on_gpu = self._sharded_bytes(old) + by_task if self.divided else 0, self.device != "cpu"
        host = sharded if config.offload else 0
        steps = 2 * sum(self._recorded_step_bytes(prompt) * group_size for prompt in prompts)
        if self.divided:
            copies = 0
        transient: dict[str, int] = {}
        if isinstance(self.policy, TinyPolicy) and self.device == "cpu":
            transient["load"] = max(0, self.whole - copies)  # the file is read whole beside the policy
        for name, sampled, size in (("rollout", prompts, group_size), ("validation", validation, 1)):
            for members in self._sampled_at_once(sampled, size):
                self._measure(transient, f"{name} of {_kind(members)}", lambda m=members: self._rollout(m))
        groups = [self._group(prompt) for prompt in prompts]
        for objective in objectives_of(config, self.policy.segment_kinds):
            for task in tasks:
                replayed = self._replayed_at_once([g for g in groups if g.prompt.task == task], objective)
                replay = self._replay_text if objective.output == "text" else self._replay_drawings
                name = "replay of " + _NAMES[objective.output]
                if replayed:
                    self._measure(transient, name, lambda r=replay, t=replayed: r(t), gradient=True)
        drawn = [t for group in groups for t in group.trajectories if t.image is not None]
        if drawn and any(
            s.judge is not None or "read" in s.sides
            for s in build_rewards(
                [
                    r
                    for r in config.rewards
                    if r.where is None and r.name != TASK_REWARD and not r.name.startswith(f"{IN_PYTHON}:")
                ]
            )
        ):
            self._measure(transient, "judge", lambda: self._judge(drawn))
        if self.divided:  # a reduce-scatter of float32, layer by layer
            layers = [
                sum(p.numel() for p in layer.parameters() if p.requires_grad)
                for layer in self.policy.transformer.layers
            ]
            transient["replay: summing gradients"] = 8 * max(layers, default=0) + (gradients if self.in_rounds else 0)
        persistent = {
            "weights": _bytes(self.policy.state_dict().values()),
            "frozen and averaged weights": copies,
            "the judge's own weights": 0 if self.divided else gradients * self._judge_copies(),
            "moments": 0 if self.divided else self._moments(),
            "this process's share": 0 if config.offload else sharded // world_size(),
            "gradients by task": 0 if self.divided else by_task,
            "outputs of a step": 2 * sum(self._trajectory_bytes(prompt) * group_size for prompt in prompts)
            + (0 if on_gpu else steps),
            "offloaded": 0 if on_gpu else host,
            "program": PROGRAM[self.device],
        }
        engine = config.rollout.engine
        if isinstance(engine, ProcessEngineConfig) and engine.device is None:  # on this device as well
            persistent["rollout engine"] = persistent["weights"] + persistent["program"]
        host_only = host + steps if on_gpu and config.offload else 0
        return MemoryEstimate(persistent, 0 if self.in_rounds else gradients, transient, host_only)

    def _sharded_bytes(self, old: bool) -> int:
        """Sharded bytes of all processes together: float32 weights and averages, reference, moments, gradients."""
        numbers = sum(parameter.numel() for parameter in self.trained)
        reference = 0 if self.config.adapter is not None else _bytes(self.trained)
        return 4 * numbers * (3 + old + self._judge_copies()) + reference + self._moments()

    def _measure(self, transient: dict[str, int], name: str, run: Callable[[], None], gradient: bool = False) -> None:
        """Runs a phase and records its peak."""
        excluded = [
            *self.policy.parameters(),
            *self.policy.buffers(),
            *(p.grad for p in self.trained if p.grad is not None),
        ]
        with LiveBytes(excluded, self.device) as live, torch.set_grad_enabled(gradient):
            run()
        if self.in_rounds:
            self.policy.zero_grad(set_to_none=True)
        transient[name] = max(transient.get(name, 0), live.peak)

    def _judge_copies(self) -> int:
        """Number of weight sets of the judge: its own, and that of a slow EMA candidate."""
        judge = self.config.judge
        return judge.is_refreshed * (1 + (judge.kind == "average" and judge.refresh_every is not None))

    def _moments(self) -> int:
        kind, total = self.config.optimizer.kind, 0
        for name, parameter in self.policy.named_parameters():
            if not parameter.requires_grad:
                continue
            each = 8
            if kind == "adamw_8bit" and parameter.numel() >= SMALL_MOMENTS:
                each = 2
            if kind == "muon" and parameter.ndim == 2 and ".layers." in name and self.config.adapter is None:
                each = 4
            total += each * parameter.numel()
        return total * len(self.config.phases(self.policy.segment_kinds))

    def _trajectory_bytes(self, prompt: Prompt) -> int:
        """Device memory of one trajectory."""
        if "image" not in prompt.output:
            return 0
        height, width = self._grid(prompt)
        return height * width * (4 * self.policy.encoders.channels + 12 * self.policy.pixels_per_token() ** 2)

    def _recorded_step_bytes(self, prompt: Prompt) -> int:
        """Host memory of one trajectory: states, next states and means of the recorded steps."""
        if "image" not in prompt.output:
            return 0
        height, width = self._grid(prompt)
        return 3 * len(self.sampling.window) * 4 * height * width * self.policy.encoders.channels

    def _grid(self, prompt: Prompt) -> Grid:
        return self.policy._grid(prompt, self.sampling)

    # ---------------------------------------------------------------- batches
    def _sampled_at_once(self, prompts: Sequence[Prompt], group_size: int) -> list[list[Prompt]]:
        """Per output kind and image size, the first sampling batch, with the longest contexts first."""
        classes: dict[object, list[Prompt]] = {}
        for prompt in prompts:
            classes.setdefault((prompt.output, self._grid(prompt)), []).append(prompt)
        out = []
        for same in classes.values():
            longest = sorted(same, key=lambda prompt: -row_tokens(self.policy._row(prompt)))
            members = [prompt for prompt in longest for _ in range(group_size)]
            out.append([members[i] for i in self.policy._cut(members, self._grid(longest[0]))[0]])
        return out

    def _replayed_at_once(self, groups: Sequence[Group], objective: Objective) -> list[Trajectory]:
        """The largest microbatch of a task, assuming that all groups have signal."""
        policy = self.policy
        longest = sorted(groups, key=lambda group: -policy.count_tokens(group.trajectories[0]).context)

        def size(members: Sequence[Member]) -> int:
            found = [(policy.count_tokens(m.trajectory), objective.passes(m.trajectory)) for m in members]
            return sum(tokens.context + tokens.text + tokens.image * passes for tokens, passes in found)

        with unset_fake_temporarily():  # the selection needs values of advantages and times
            A = torch.linspace(-1, 1, self.config.rollout.group_size).expand(len(groups), -1)
            chosen = objective.select_members(longest, GroupAdvantages.all_valid(A))
            cuts = list(split(chosen, objective, policy, self.config.limits))
            return [member.trajectory for member in max(cuts, key=size, default=[])]

    def _group(self, prompt: Prompt) -> Group:
        return Group(prompt, tuple(self._trajectory(prompt, m) for m in range(self.config.rollout.group_size)))

    def _trajectory(self, prompt: Prompt, member: int) -> Trajectory:
        """A trajectory of maximum length; the texts of all members differ."""
        segments = [self._text(member) if kind == "text" else self._drawing(prompt) for kind in prompt.output]
        return Trajectory(prompt, member, tuple(segments), member)

    def _text(self, member: int) -> TextSegment:
        length = self.config.rollout.max_new_tokens
        with unset_fake_temporarily():  # the replay needs its values
            tokens, logprobs = torch.arange(length) + member * length, torch.zeros(length)
        return TextSegment(tokens, logprobs, self.config.rollout.temperature, "", ended=False)

    def _drawing(self, prompt: Prompt) -> FlowSegment:
        sampling, policy = self.sampling, self.policy
        height, width = self._grid(prompt)
        shift = policy.timestep_shift() if sampling.timestep_shift is None else sampling.timestep_shift
        window = sampling.window if sampling.sampler != "ode" else ()
        pixels = policy.pixels_per_token()
        with unset_fake_temporarily():  # guidance intervals need their values
            timesteps = timestep_grid(sampling.num_steps, shift)
        states = torch.empty(1, len(window), height * width, policy.encoders.channels)
        latents, logprobs = torch.empty(1, *states.shape[2:]), torch.empty(1, len(window))
        drawn = FlowSample(latents, timesteps, states, states, logprobs, states)
        return flow_segments(drawn, torch.empty(1, 3, height * pixels, width * pixels), sampling)[0]

    # ---------------------------------------------------------------- phases of a step
    def _rollout(self, members: Sequence[Prompt]) -> None:
        """Memory of ``sample``: the last token of the longest texts, their scores, one step, the decoding of images."""
        policy, runner = self.policy, self.runner
        owner = run_ids([prompt.id for prompt in members])
        rows = [policy._row(members[owner.index(p)]) for p in range(owner[-1] + 1)]
        output, of_prompt = members[0].output, owner
        with policy.autocast():
            cache = runner.prefill(rows)
            if "text" in output:
                self._write(cache, owner)
                texts = [tokenized_text(self._text(m)) for m in range(len(members))]
                closed = len(output) > 1
                scores = generate.score_text(runner, cache, owner, texts, self.sampling.temperature, closed)
                if closed:
                    cache, owner = scores.cache, list(range(len(members)))
            if "image" in output:
                grid, size = self._grid(members[0]), len(members)
                branches = policy._branches(cache.select(owner), [rows[p] for p in of_prompt], self.sampling)
                x_t = torch.empty(size, grid[0] * grid[1], policy.encoders.channels)
                guidance = guidance_of(self.sampling)
                v = flow_sampler.guided_velocity(
                    runner, branches, x_t, torch.empty(()), guidance, grid, guidance.interval[1]
                )
                policy.encoders.decode_latents(x_t - v, grid)

    def _write(self, cache: Cache, owner: Sequence[int]) -> None:
        """One decoding step of texts that all differ, with buffers of maximum length, and a reordering of rows."""
        transformer, steps = self.policy.transformer, self.config.rollout.max_new_tokens
        rows = owner[: decode_batch_size(transformer, cache, steps)]
        decoder = Decoder(transformer, cache.select(rows), steps)
        tokens = torch.full((len(rows),), self.runner.tokenizer.bos_id)
        logits = self.policy.encoders.text_logits(decoder.step(self.policy.encoders.embed_tokens(tokens)))
        torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
        decoder.select(range(len(rows))[::-1])

    def _replay_text(self, trajectories: Sequence[Trajectory]) -> None:
        """The memory of ``token_grid``, first of the reference, then of the trained policy."""
        text = self.config.text
        if isinstance(text, TextDPOConfig) or (isinstance(text, PolicyGradientConfig) and text.kl_coef):
            with torch.no_grad():
                self.policy.logprobs(trajectories, ["text"])
        replayed = self.policy.logprobs(trajectories, ["text"])
        terms = [term for rows in replayed for row in rows if row.entropy is not None
                 for term in (row.logprobs, row.entropy)]  # fmt: skip
        del replayed
        torch.cat(terms).sum().backward()

    def _replay_drawings(self, trajectories: Sequence[Trajectory]) -> None:
        """Memory of the image losses: outputs of frozen policies, then recorded steps, or velocities at fresh times."""
        flow, policy = self.config.flow, self.policy
        recorded, fresh = isinstance(flow, RecordedStepsConfig), isinstance(flow, FreshNoiseConfig)
        by_velocity = not isinstance(flow, RecordedStepsConfig) or flow.kl == "velocity"
        compared = isinstance(flow, FlowDPOConfig) or bool(flow.kl_coef)
        draws = flow.timesteps_per_sample if isinstance(flow, NoisingConfig) else 1
        repeated = [trajectory for trajectory in trajectories for _ in range(draws)]
        x_t = torch.stack([flow_segment(trajectory).latent for trajectory in repeated])
        scale = flow_segment(trajectories[0]).guidance_scale if fresh else 1.0

        def velocity(guidance_scale: float = scale) -> torch.Tensor:
            return policy.velocity(repeated, x_t, torch.empty(len(x_t)), guidance_scale)

        with torch.no_grad():
            if compared and not by_velocity:
                policy.logprobs(trajectories)
            others = [velocity() for _ in range(fresh + compared)] if by_velocity else []
        if recorded:
            last = [rows[-1] for rows in policy.logprobs(trajectories)]
            terms = [term for row in last for term in (row.logprobs, row.means) if term is not None]
            if compared and by_velocity:
                terms += [velocity() for _ in flow_segment(trajectories[0]).trained_steps]
        else:
            terms = [
                velocity(),
                *([velocity(0.0)] if isinstance(flow, FreshNoiseConfig) and flow.unguided_kl_coef else []),
            ]
        terms += [(terms[0] - other).square() for other in others if other.shape == terms[0].shape]
        torch.stack([term.square().mean() for term in terms]).sum().backward()

    def _judge(self, drawn: Sequence[Trajectory]) -> None:
        """The largest batch of questions, one for every fact of every image."""
        asked = [
            ((trajectory.image, fact.question), fact.answer)
            for trajectory in drawn
            for fact in trajectory.prompt.facts or (Fact("", "", ""),)
            if trajectory.image is not None
        ]
        rows = [self.runner.row(context, draws=False) for context, _ in asked]
        new = [len(self.runner.tokenizer.encode(answer)) + 1 for _, answer in asked]
        tokens = [row_tokens(row) + more for row, more in zip(rows, new, strict=True)]
        most = max(self.policy.split_rows(rows, new), key=lambda part: sum(tokens[i] for i in part))
        self.policy.text_logprob([asked[i][0] for i in most], [asked[i][1] for i in most])


_NAMES = {"text": "text", "image": "drawings"}


def _kind(prompts: Sequence[Prompt]) -> str:
    return " and ".join(_NAMES[kind] for kind in prompts[0].output)


def _skip_resizing(policy: BagelPolicy) -> None:
    """Replaces the image preprocessing, which needs pixel values, by empty tensors of its output size."""
    towers, config = policy.encoders, policy.config

    def read_pixels(image: Image) -> torch.Tensor:
        height, width = towers.vision_grid(image)
        return torch.empty(3, height * config.vit.patch_size, width * config.vit.patch_size)

    def encode_latents(images: Sequence[Image]) -> torch.Tensor:
        height, width = (side * config.token_pixels for side in towers.latent_grid(images[0]))
        f, channels = config.vae.downsample, config.vae.channels
        noise = torch.empty(len(images), channels, height // f, width // f)
        return towers.encode_pixels(torch.empty(len(images), 3, height, width), noise)

    towers.read_pixels, towers.encode_latents = read_pixels, encode_latents


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class LiveBytes(TorchDispatchMode):
    """Tracks the bytes of live tensors created by operations; ``peak`` is the maximum so far.

    Convolutions include the workspace copies of their kernels on the device (cpu, cuda).
    """

    def __init__(self, not_counted: Iterable[torch.Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.now = self.peak = 0
        self.device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any: the arguments of torch's interface."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + self._rearranged(args[0], args[1], out))
        return out

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
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
