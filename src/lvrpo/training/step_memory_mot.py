"""Phases of a step of a Mixture-of-Transformers, run on fake tensors at the sizes of the run's prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from lvrpo.policies.bagel.policy import BagelPolicy
from lvrpo.policies.flow import FlowSample, flow_segments, guidance_of
from lvrpo.policies.mot import flow_sampler, generate
from lvrpo.policies.mot.generate import Decoder, decode_batch_size
from lvrpo.policies.mot.model_runner import Grid, row_tokens, run_ids
from lvrpo.policies.mot.policy import MoTPolicy
from lvrpo.policies.mot.trajectory import tokenized_text
from lvrpo.policies.mot.transformer import Cache
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.sampling import timestep_grid
from lvrpo.training.config import TrainConfig
from lvrpo.training.live_bytes import LiveBytes
from lvrpo.training.losses import objectives_of, uses_old_policy
from lvrpo.training.losses.base import flow_segment
from lvrpo.training.losses.dpo import FlowDPOConfig, TextDPOConfig
from lvrpo.training.losses.flow import FreshNoiseConfig, NoisingConfig
from lvrpo.training.losses.flow_grpo import RecordedStepsConfig
from lvrpo.training.losses.grpo import PolicyGradientConfig
from lvrpo.training.memory import MemoryEstimate
from lvrpo.training.step_memory import NAMES, StepMemory, name_of, questions_about
from lvrpo.types import FlowSegment, Group, Image, Prompt, TextSegment, Trajectory


class MoTStepMemory(StepMemory):
    """For BAGEL and the tiny policy; the CPU implementation is measured, also for a GPU."""

    def __init__(self, policy: MoTPolicy, config: TrainConfig, whole: int, device: str) -> None:
        super().__init__(policy, config, whole, device)
        self.policy: MoTPolicy = policy

    def estimate(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> MemoryEstimate:
        """See ``StepMemory``."""
        policy = self.policy
        with FakeTensorMode(allow_non_fake_inputs=True):  # images of the prompts are real tensors
            for module in policy.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))
            self.prepare()
            if isinstance(policy, BagelPolicy):
                _skip_resizing(policy)
            self.runner = policy.runner
            return super().estimate(prompts, validation)

    def layers(self) -> list[nn.Module]:
        return list(self.policy.transformer.layers)

    def outputs(self, prompts: Sequence[Prompt]) -> tuple[int, int]:
        size = self.config.rollout.group_size
        device = sum(self._trajectory_bytes(prompt) * size for prompt in prompts)
        return device, sum(self._recorded_step_bytes(prompt) * size for prompt in prompts)

    def phases(self, prompts: Sequence[Prompt], validation: Sequence[Prompt]) -> dict[str, int]:
        config = self.config
        transient: dict[str, int] = {}
        if isinstance(self.policy, TinyPolicy) and self.device == "cpu":  # the file is read whole beside the policy
            copies = self.weight_copy_bytes(uses_old_policy(config, self.policy.segment_kinds))
            transient["load"] = max(0, self.whole - copies)
        for name, sampled, size in (("rollout", prompts, config.rollout.group_size), ("validation", validation, 1)):
            for members in self._sampled_at_once(sampled, size):
                self._measure(transient, f"{name} of {name_of(members[0].output)}", lambda m=members: self._rollout(m))
        groups = [self._group(prompt) for prompt in prompts]
        for objective in objectives_of(config, self.policy.segment_kinds):
            for task in dict.fromkeys(prompt.task for prompt in prompts):
                members, _ = self.largest_microbatch([g for g in groups if g.prompt.task == task], objective)
                replayed = [member.trajectory for member in members]
                replay = self._replay_text if objective.output == "text" else self._replay_drawings
                name = "replay of " + NAMES[objective.output]
                if replayed:
                    self._measure(transient, name, lambda r=replay, t=replayed: r(t), gradient=True)
        drawn = [t for group in groups for t in group.trajectories if t.image is not None]
        if drawn and self.asks_judge():
            self._measure(transient, "judge", lambda: self._judge(drawn))
        return transient

    def _measure(self, transient: dict[str, int], name: str, run: Callable[[], None], gradient: bool = False) -> None:
        """Runs a phase and records its peak."""
        with LiveBytes(self.held(), self.device) as live, torch.set_grad_enabled(gradient):
            run()
        if self.in_rounds:
            self.policy.zero_grad(set_to_none=True)
        transient[name] = max(transient.get(name, 0), live.peak)

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
        asked = questions_about(drawn)
        rows = [self.runner.row(context, draws=False) for context, _ in asked]
        new = [len(self.runner.tokenizer.encode(answer)) + 1 for _, answer in asked]
        tokens = [row_tokens(row) + more for row, more in zip(rows, new, strict=True)]
        most = max(self.policy.split_rows(rows, new), key=lambda part: sum(tokens[i] for i in part))
        self.policy.text_logprob([asked[i][0] for i in most], [asked[i][1] for i in most])


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
