"""How much memory a run will need, before anything is loaded.

What stays (weights, moments, copies) is counted. What comes and goes is found by running the parts of a step on tensors
without memory, at the sizes of the run's own prompts, and adding up what would be alive at once.
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
from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.base import Policy
from lvrpo.policies.loading import DTYPES, pick_device, policy_class, policy_folder
from lvrpo.policies.mot import flow_sampler, generate
from lvrpo.policies.mot.adapter import has_adapter, inject_adapter
from lvrpo.policies.mot.attention import forget_packings
from lvrpo.policies.mot.generate import Decoder, decode_batch_size
from lvrpo.policies.mot.model_runner import Grid, row_tokens, run_ids
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.mot.trajectory import flow_segment as flow_record
from lvrpo.policies.mot.trajectory import tokenized_text
from lvrpo.policies.mot.transformer import Cache
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.rewards.table import IN_PYTHON, build_rewards
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
"""Parameters of fewer numbers keep moments of 32 bits in ``adamw_8bit``."""
PROGRAM = {"cpu": 56 << 20, "cuda": 2 * (32 << 20)}
"""What a run takes beside tensors. CPU: anonymous memory of a run of a policy of 4 MiB, measured, with the data of the
built-in world. Card: two workspaces of cuBLAS, one of the thread that runs backward passes, as large as on an H100."""


def estimate_memory(
    config: TrainConfig,
    prompts: Sequence[Prompt],
    validation: Sequence[Prompt] = (),
    device: torch.device | None = None,
    check: Callable[[Policy], object] = lambda policy: None,
) -> MemoryEstimate | None:
    """The memory of a run on its device, from the sizes in the policy's folder alone.

    ``check``: refuses a policy, without its weights, that cannot read the rows.

    ``prompts`` are those of a step, ``validation`` the held-out ones. Texts are taken to be as long as they may be. The
    operations are those of the CPU, also for a card, where some texts go through attention in other parts. ``device``
    stands for the configuration's; it need not be there.
    None for a policy of another kind than the Mixture-of-Transformers. Raises InputError for an adapter.
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
    """As ``estimate_memory``, of a policy on the meta device, which is changed."""
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
    with FakeTensorMode(allow_non_fake_inputs=True):  # pictures of the prompts come as they are
        for module in policy.modules():
            for name, parameter in module.named_parameters(recurse=False):
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                setattr(module, name, torch.nn.Parameter(empty, requires_grad=parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
        return _Estimator(policy, config, whole, device).estimate(prompts, validation)


class _Estimator:
    """The parts of a step, run without memory; see ``estimate_memory``."""

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
        kept, on_card = self._divided(old) + by_task if self.divided else 0, self.device != "cpu"
        host = kept if config.offload else 0
        steps = 2 * sum(self._recorded_steps(prompt) * group_size for prompt in prompts)
        if self.divided:
            copies = 0
        passes: dict[str, int] = {}
        if isinstance(self.policy, TinyPolicy) and self.device == "cpu":
            passes["load"] = max(0, self.whole - copies)  # the file is read whole beside the policy
        for name, asked, size in (("rollout", prompts, group_size), ("validation", validation, 1)):
            for members in self._sampled_at_once(asked, size):
                self._note(passes, f"{name} of {_kind(members)}", lambda m=members: self._rollout(m))
        groups = [self._group(prompt) for prompt in prompts]
        for objective in objectives_of(config, self.policy.segment_kinds):
            for task in tasks:
                replayed = self._replayed_at_once([g for g in groups if g.prompt.task == task], objective)
                replay = self._replay_text if objective.output == "text" else self._replay_drawings
                name = "replay of " + _NAMES[objective.output]
                if replayed:
                    self._note(passes, name, lambda r=replay, t=replayed: r(t), gradient=True)
        drawn = [t for group in groups for t in group.trajectories if t.image is not None]
        if drawn and any(
            s.judge is not None or "read" in s.sides
            for s in build_rewards(
                [r for r in config.rewards if r.where is None and not r.name.startswith(f"{IN_PYTHON}:")]
            )
        ):
            self._note(passes, "judge", lambda: self._judge(drawn))
        if self.divided:  # a reduce-scatter of float32, layer by layer
            layers = [
                sum(p.numel() for p in layer.parameters() if p.requires_grad)
                for layer in self.policy.transformer.layers
            ]
            passes["replay: summing gradients"] = 8 * max(layers, default=0) + (gradients if self.in_rounds else 0)
        stays = {
            "weights": _bytes(self.policy.state_dict().values()),
            "frozen and averaged weights": copies,
            "the judge's own weights": 0 if self.divided else gradients * self._judges(),
            "moments": 0 if self.divided else self._moments(),
            "this process's share": 0 if config.offload else kept // world_size(),
            "gradients by task": 0 if self.divided else by_task,
            "outputs of a step": 2 * sum(self._recorded(prompt) * group_size for prompt in prompts)
            + (0 if on_card else steps),
            "offloaded": 0 if on_card else host,
            "program": PROGRAM[self.device],
        }
        engine = config.rollout.engine
        if isinstance(engine, ProcessEngineConfig) and engine.device is None:  # on this device as well
            stays["rollout engine"] = stays["weights"] + stays["program"]
        beside = host + steps if on_card and config.offload else 0
        return MemoryEstimate(stays, 0 if self.in_rounds else gradients, passes, beside)

    def _divided(self, old: bool) -> int:
        """What the processes keep together: weights and averages in float32, the reference, moments, gradients."""
        numbers = sum(parameter.numel() for parameter in self.trained)
        reference = 0 if self.config.adapter is not None else _bytes(self.trained)
        return 4 * numbers * (3 + old + self._judges()) + reference + self._moments()

    def _note(self, passes: dict[str, int], name: str, run: Callable[[], None], gradient: bool = False) -> None:
        """Runs a part and remembers what it took at its worst."""
        kept = [
            *self.policy.parameters(),
            *self.policy.buffers(),
            *(p.grad for p in self.trained if p.grad is not None),
        ]
        with LiveBytes(kept, self.device) as live, torch.set_grad_enabled(gradient):
            run()
        if self.in_rounds:
            self.policy.zero_grad(set_to_none=True)
        passes[name] = max(passes.get(name, 0), live.peak)

    def _judges(self) -> int:
        """How many copies a judge has that moves: itself, and a slow average that waits to replace it."""
        judge = self.config.judge
        return judge.moves * (1 + (judge.kind == "average" and judge.refresh_every is not None))

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

    def _recorded(self, prompt: Prompt) -> int:
        """Of one trajectory, on the device."""
        if "image" not in prompt.output:
            return 0
        height, width = self._grid(prompt)
        return height * width * (4 * self.policy.encoders.channels + 12 * self.policy.pixels_per_token() ** 2)

    def _recorded_steps(self, prompt: Prompt) -> int:
        """Of one trajectory, in host memory: the states before and after, and the means."""
        if "image" not in prompt.output:
            return 0
        height, width = self._grid(prompt)
        return 3 * len(self.sampling.window) * 4 * height * width * self.policy.encoders.channels

    def _grid(self, prompt: Prompt) -> Grid:
        return self.policy._grid(prompt, self.sampling)

    # ---------------------------------------------------------------- what goes through at once
    def _sampled_at_once(self, prompts: Sequence[Prompt], group_size: int) -> list[list[Prompt]]:
        """Of every kind of output and size, the first members that are sampled together, the longest contexts first."""
        classes: dict[object, list[Prompt]] = {}
        for prompt in prompts:
            classes.setdefault((prompt.output, self._grid(prompt)), []).append(prompt)
        out = []
        for alike in classes.values():
            longest = sorted(alike, key=lambda prompt: -row_tokens(self.policy._row(prompt)))
            members = [prompt for prompt in longest for _ in range(group_size)]
            out.append([members[i] for i in self.policy._cut(members, self._grid(longest[0]))[0]])
        return out

    def _replayed_at_once(self, groups: Sequence[Group], objective: Objective) -> list[Trajectory]:
        """The largest part of a task's members that is replayed together, every group being told apart."""
        policy = self.policy
        longest = sorted(groups, key=lambda group: -policy.count_tokens(group.trajectories[0]).context)

        def size(members: Sequence[Member]) -> int:
            found = [(policy.count_tokens(m.trajectory), objective.passes(m.trajectory)) for m in members]
            return sum(tokens.context + tokens.text + tokens.image * passes for tokens, passes in found)

        with unset_fake_temporarily():  # a choice looks at advantages and times
            A = torch.linspace(-1, 1, self.config.rollout.group_size).expand(len(groups), -1)
            chosen = objective.select_members(longest, GroupAdvantages.of_all(A))
            cuts = list(split(chosen, objective, policy, self.config.limits))
            return [member.trajectory for member in max(cuts, key=size, default=[])]

    def _group(self, prompt: Prompt) -> Group:
        return Group(prompt, tuple(self._trajectory(prompt, m) for m in range(self.config.rollout.group_size)))

    def _trajectory(self, prompt: Prompt, member: int) -> Trajectory:
        """An outcome as long as it may be; no two members write alike."""
        segments = [self._text(member) if kind == "text" else self._drawing(prompt) for kind in prompt.output]
        return Trajectory(prompt, member, tuple(segments), member)

    def _text(self, member: int) -> TextSegment:
        length = self.config.rollout.max_new_tokens
        with unset_fake_temporarily():  # its values are looked at
            tokens, logprobs = torch.arange(length) + member * length, torch.zeros(length)
        return TextSegment(tokens, logprobs, self.config.rollout.temperature, "", ended=False)

    def _drawing(self, prompt: Prompt) -> FlowSegment:
        sampling, policy = self.sampling, self.policy
        height, width = self._grid(prompt)
        shift = policy.timestep_shift() if sampling.timestep_shift is None else sampling.timestep_shift
        window = sampling.window if sampling.sampler != "ode" else ()
        pixels = policy.pixels_per_token()
        with unset_fake_temporarily():  # they are looked at: is a step guided
            timesteps = timestep_grid(sampling.num_steps, shift)
        states = torch.empty(1, len(window), height * width, policy.encoders.channels)
        latents, logprobs = torch.empty(1, *states.shape[2:]), torch.empty(1, len(window))
        drawn = flow_sampler.FlowSample(latents, timesteps, states, states, logprobs, states)
        return flow_record(drawn, 0, torch.empty(3, height * pixels, width * pixels), sampling)

    # ---------------------------------------------------------------- parts of a step
    def _rollout(self, members: Sequence[Prompt]) -> None:
        """As ``sample``: the last token of the longest texts, their scores, one step of a drawing, and its pixels."""
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
                guidance = flow_sampler.guidance_of(self.sampling)
                v = flow_sampler.guided_velocity(
                    runner, branches, x_t, torch.empty(()), guidance, grid, guidance.interval[1]
                )
                policy.encoders.decode_latents(x_t - v, grid)

    def _write(self, cache: Cache, owner: Sequence[int]) -> None:
        """A token of texts of which no two are alike, in buffers for the longest, and rows that change after it."""
        transformer, steps = self.policy.transformer, self.config.rollout.max_new_tokens
        rows = owner[: decode_batch_size(transformer, cache, steps)]
        decoder = Decoder(transformer, cache.select(rows), steps)
        tokens = torch.full((len(rows),), self.runner.tokenizer.bos_id)
        logits = self.policy.encoders.text_logits(decoder.step(self.policy.encoders.embed_tokens(tokens)))
        torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
        decoder.select(range(len(rows))[::-1])

    def _replay_text(self, trajectories: Sequence[Trajectory]) -> None:
        """As ``token_grid`` of the reference, then of the trained policy."""
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
        """As the losses of drawings: what frozen policies say, then recorded steps, or velocities at fresh times."""
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
        """A question for every fact of every drawing, as many as are asked at once."""
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
    """Pictures come at the size that the towers want: how they are resized needs their values."""
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
    """Counts the bytes of the tensors that operations made and that are still alive; ``peak`` is the most so far.

    Convolutions count with the copies that the kernels of a device (cpu, cuda) work on.
    """

    def __init__(self, not_counted: Iterable[torch.Tensor], device: str = "cpu") -> None:
        super().__init__()
        self.now = self.peak = 0
        self.device = device
        self._known = {tensor.untyped_storage()._cdata for tensor in not_counted}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any: what torch passes to a mode."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        if func is torch.ops.aten.convolution.default:
            self.peak = max(self.peak, self.now + self._rearranged(args[0], args[1], out))
        return out

    def _rearranged(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> int:
        """A convolution wants the channels of a pixel together: it works on copies of what goes in and comes out.

        oneDNN has one of them at a time, and none for 1 x 1 (both measured); cuDNN takes its workspace for both.
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
