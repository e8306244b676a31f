"""Rollout engine for images: an SGLang-Diffusion server over HTTP (its interface of version 0.5.23).

It returns final latents, which DiffusionNFT and AWM train on: no path and no log-probs. Every transfer of weights is
followed by a probe: one step of an image, whose velocity has to be the policy's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load

from lvrpo.distributed import is_main
from lvrpo.errors import ContractError, InputError, optional_package
from lvrpo.policies.base import Policy, Sampling, announce
from lvrpo.policies.diffusers_flow.checkpoint import save_transformer
from lvrpo.policies.diffusers_flow.pipelines import TRAINED, Grid
from lvrpo.policies.diffusers_flow.policy import DiffusersPolicy
from lvrpo.policies.flow import FlowSample, flow_segments
from lvrpo.sampling import derive_seed
from lvrpo.training.inference_servers import EngineClient, ServerEngineConfig
from lvrpo.training.policies import weights_checksum
from lvrpo.types import Group, Prompt, Trajectory

PROBE = "a red circle above a blue square"
PROBE_SIDE = 256
"""Pixels, rounded down to whole patches."""
MAX_VELOCITY_DIFFERENCE = 0.1
"""Maximum difference of a velocity of the server from the policy's, relative to its norm. 16-bit weights and other
kernels move it by a few percent; a wrong prompt template, time or sign by far more."""
MAX_TIME_DIFFERENCE = 1e-3
"""Maximum difference of the times."""


class SGLangDiffusionServer(EngineClient):
    """``sglang serve`` with a pipeline whose latents are packed: Qwen-Image, FLUX. See ``RolloutEngine``."""

    name = "SGLang-Diffusion"
    command = "sglang serve --model-path BASE"
    most_bytes = 2**32  # with the pixels in float32: 100 MB for eight images of 1024 x 1024

    def __init__(self, policy: Policy, config: ServerEngineConfig) -> None:
        """``policy``: the trained policy. Raises InputError for one that is no pipeline of diffusers, or edits."""
        if not isinstance(policy, DiffusersPolicy):
            raise InputError(
                f"rollout.engine.kind={config.kind}: draws with pipelines of diffusers, and the policy is a "
                f"{type(policy).__name__}: use rollout.engine.kind=process or policy"
            )
        if "edit" in policy.tasks:
            raise InputError(
                f"rollout.engine.kind={config.kind}: draws from text alone, and the policy edits: use "
                "rollout.engine.kind=process or policy"
            )
        super().__init__(config)
        msgpack = optional_package("msgpack", "rollout.engine: needs the package msgpack", "endpoint")
        self.policy, self._unpack = policy, msgpack.unpackb

    def load_weights(self, weights: Mapping[str, torch.Tensor]) -> str:
        """Loads the policy's current weights into the server; see ``RolloutEngine.load_weights``.

        The returned checksum is that of the sent weights: the probe verifies what the server does with them.
        """
        checksum = weights_checksum(weights)
        if is_main():
            folder = self._folder.path / checksum[:16]
            if self.policy.adapter is None:
                save_transformer(self.policy.transformer, folder, self.policy.compute_dtype)
                self._update_weights(folder, target_modules=[TRAINED])
            else:
                self.policy.save(folder)
                # a new path under the same name replaces the adapter
                self._request("/v1/set_lora", {"lora_nickname": "lvrpo", "lora_path": str(folder), "target": TRAINED})
            shutil.rmtree(folder)
            self._probe()
        return checksum

    @torch.no_grad()
    def _probe(self) -> None:
        """Raises ContractError where the server's velocity at its first state is not the policy's."""
        policy = self.policy
        side = policy.pipeline.stride * max(1, PROBE_SIDE // policy.pipeline.stride)
        guidance = policy.default_sampling("generate").guidance_scale if policy.pipeline.guidance == "embedded" else 1.0
        sampling = Sampling(group_size=1, num_steps=2, guidance_scale=guidance, image_size=(side, side))
        prompt = Prompt("probe", "generate", (PROBE,), ("image",))
        grid = policy.latent_grid(sampling.image_size)
        ((states, sigmas),) = self._draw(prompt, sampling, grid, 0, [0, 1])
        served = (states[1] - states[0]) / (sigmas[1] - sigmas[0])
        x_t, t = states[:1].to(policy.device), sigmas[:1].to(policy.device)
        own = policy.flow([policy.row(prompt)], x_t, t, grid, guidance)[0].cpu()
        difference = float((served - own).norm() / own.norm().clamp(min=1e-8))
        if not difference <= MAX_VELOCITY_DIFFERENCE:
            raise ContractError(
                f"rollout engine: a velocity of {self.name} differs from the policy's by {difference:.3g} of its norm, "
                f"limit {MAX_VELOCITY_DIFFERENCE}: start it on the folder of the base, without caches that skip steps"
            )

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """A group of images per prompt, one request each, by steps of the ODE; see ``RolloutEngine.sample``."""
        policy, groups = self.policy, []
        self._check(sampling)
        grid = policy.latent_grid(sampling.image_size)
        plain = replace(sampling, sampler="ode", window=())

        def draw(prompt: Prompt, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return self._draw(prompt, plain, grid, seed, [plain.num_steps])

        with ThreadPoolExecutor(min(self.config.workers, max(1, len(prompts)))) as pool:
            for prompt, seed, drawn in zip(prompts, seeds, pool.map(draw, prompts, seeds), strict=True):
                latents = torch.stack([states[-1] for states, _ in drawn]).to(policy.device)
                none = latents.new_zeros(len(latents), 0, *latents.shape[1:])
                flows = FlowSample(
                    latents, policy.times(plain, grid), none, none, none.new_zeros(len(latents), 0), none
                )
                segments = flow_segments(flows, policy.decode_latents(latents, grid), plain)
                members = [
                    Trajectory(prompt, m, (segment,), derive_seed(seed, m)) for m, segment in enumerate(segments)
                ]
                announce(members)
                groups.append(Group(prompt, tuple(members)))
        return groups

    def _check(self, sampling: Sampling) -> None:
        """Raises InputError for settings that the server does not have."""
        same = ["solver"]
        if sampling.guidance_scale != 1 and self.policy.two_branches:
            same.append("guidance_renorm")
        wanted = {name: getattr(self.policy.pipeline.defaults, name) for name in same}
        wanted |= {"timestep_shift": None, "guidance_interval": (0.0, 1.0), "shared_noise": False}
        for name, value in wanted.items():
            if (given := getattr(sampling, name)) != value:  # fields of Sampling
                raise InputError(f"rollout.{name}={given}: {self.name} draws with {value}: set it, or another engine")

    def _draw(
        self, prompt: Prompt, sampling: Sampling, grid: Grid, seed: int, steps: Sequence[int]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The states (S, N, C) at some steps and the times (T + 1,) of each member, on the CPU."""
        pipeline = self.policy.pipeline
        body: dict[str, Any] = {
            "prompt": prompt.text,
            "seed": seed % 2**31,
            "height": grid[0] * pipeline.stride,
            "width": grid[1] * pipeline.stride,
            "num_inference_steps": sampling.num_steps,
            "num_outputs_per_prompt": sampling.group_size,
            "guidance_scale": sampling.guidance_scale,
            "rollout": True,
            "rollout_sde_type": "ode",
            "rollout_log_prob_no_const": True,  # required for ode
            "rollout_debug_mode": False,
            "rollout_return_dit_trajectory": True,
            "rollout_return_step_indices": list(steps),
            "suppress_logs": True,
        }
        if self.policy.two_branches:
            body["negative_prompt"] = pipeline.empty_prompt
        reply = self._send("/rollout/generate", body)
        try:
            assert reply is not None
            trajectories = [one["dit_trajectory"] for one in self._unpack(reply.content)]
            found = [(_tensor(one["latents"]), _tensor(one["sigmas"])) for one in trajectories]
        except Exception as error:  # msgpack and safetensors raise different types
            raise ContractError(
                f"rollout engine: a response of {self.name} cannot be read ({type(error).__name__}): use a version "
                "with /rollout/generate, such as 0.5.23"
            ) from None
        times, shape = self.policy.times(sampling, grid), (len(steps), *self.policy.latent_shape(grid))
        for states, sigmas in found:
            if tuple(states.shape) != shape:
                raise ContractError(
                    f"rollout engine: {self.name} returned states of {tuple(states.shape)}, not {shape}: it packs "
                    "latents of Qwen-Image and FLUX alone: use rollout.engine.kind=process"
                )
            if sigmas.shape != times.shape or float((sigmas - times).abs().max()) > MAX_TIME_DIFFERENCE:
                raise ContractError(
                    f"rollout engine: {self.name} draws at other times than the policy: start it on the folder of the "
                    "base"
                )
        return found


def _tensor(value: Mapping[str, Any]) -> torch.Tensor:
    """A tensor of a response, float32: bytes of safetensors. Any: of msgpack."""
    return load(value["data"])["t"].float()
