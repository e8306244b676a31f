"""The base of policies that generate latents by a flow, each row by itself: Show-o2, and pipelines of diffusers.

Letters: B images, N tokens of one, C numbers of a token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable, Sequence
from typing import Generic, TypeVar

import torch

from lvrpo.errors import ContractError
from lvrpo.policies.base import Sampling, announce
from lvrpo.policies.defaults import replay_settings as text_settings
from lvrpo.policies.flow import (
    Guidance,
    Velocity,
    draw_noise,
    flow_segment,
    flow_segments,
    guidance_of,
    integrate,
    replay_settings,
    replay_steps,
)
from lvrpo.policies.transformers_policy import LibraryPolicy
from lvrpo.sampling import derive_seed, guide
from lvrpo.types import (
    SEGMENT_KINDS,
    FlowSegment,
    Image,
    Prompt,
    SegmentKind,
    SegmentLogprobs,
    Trajectory,
    segments_through,
)

Grid = tuple[int, int]
"""Rows and columns of tokens."""
R = TypeVar("R")


class LatentFlowPolicy(LibraryPolicy, Generic[R]):
    """A policy whose images are latents of a flow. A model says its rows (R), its grid, its times and its velocity.

    Both branches of classifier-free guidance are one batch, the unguided one has no text; where it has no
    gradient, it is a pass of its own, in the rollout too. Sampling and replay are split into passes alike, so that both
    compute the same bits.
    """

    # --- what a model says ---

    @abstractmethod
    def row(self, prompt: Prompt) -> R:
        """What an image is drawn after."""

    @abstractmethod
    def without_text(self, row: R) -> R:
        """The row of the unguided branch."""

    def alike(self, rows: Sequence[R]) -> list[list[int]]:
        """Indices of rows that may share a pass."""
        return [list(range(len(rows)))]

    @abstractmethod
    def latent_grid(self, image_size: tuple[int, int] | None) -> Grid:
        """The grid of an image of (height, width) pixels, None: the model's own; raises InputError."""

    @abstractmethod
    def latent_shape(self, grid: Grid) -> tuple[int, int]:
        """N and C."""

    @abstractmethod
    def row_tokens(self, row: R, grid: Grid) -> int:
        """Tokens of an image and its row in a forward pass."""

    @abstractmethod
    def times(self, sampling: Sampling, grid: Grid) -> torch.Tensor:
        """The times (T + 1,) of sampling, from 1 to 0."""

    @abstractmethod
    def flow(self, rows: Sequence[R], x_t: torch.Tensor, t: torch.Tensor, grid: Grid, scale: float) -> torch.Tensor:
        """Velocity, float32, in one pass at states (B, N, C) and times (B,), after rows that are alike.

        There may be several branches of the same states, one after another: k B rows. ``scale``: of guidance that is an
        input of the model.
        """

    @abstractmethod
    def decode_latents(self, latents: torch.Tensor, grid: Grid) -> list[Image]:
        """The images of latents (B, N, C), on the CPU."""

    @property
    def two_branches(self) -> bool:
        """Whether guidance mixes two branches."""
        return True

    def replay_texts(self, trajectories: Sequence[Trajectory]) -> list[SegmentLogprobs]:
        """``logprobs`` of texts of equal settings, of a policy that writes."""
        raise ContractError(f"{type(self).__name__} writes no texts")

    # --- sampling ---

    def draw(self, pairs: Sequence[tuple[Prompt, int]], sampling: Sampling) -> list[Trajectory]:
        """``sampling.group_size`` images after each prompt, given with its seed."""
        grid, guidance, size = self.latent_grid(sampling.image_size), guidance_of(sampling), sampling.group_size
        members = [(prompt, m, derive_seed(seed, m), seed) for prompt, seed in pairs for m in range(size)]
        rows, found = [self.row(prompt) for prompt, *_ in members], dict[int, Trajectory]()
        for part in self._parts(rows, grid, guidance):
            own = [members[k] for k in part]
            noise, step_noise = draw_noise(
                sampling,
                [derive_seed(seed if sampling.shared_noise else each, "noise") for _, _, each, seed in own],
                [derive_seed(each, "steps") for _, _, each, _ in own],
                self.latent_shape(grid),
            )
            step_noise = None if step_noise is None else step_noise.to(self.device)
            velocity = self._velocity_of([rows[k] for k in part], grid, guidance)
            flows = integrate(velocity, sampling, self.times(sampling, grid), noise.to(self.device), step_noise)
            segments = flow_segments(flows, self.decode_latents(flows.latents, grid), sampling)
            for k, (prompt, member, each, _), segment in zip(part, own, segments, strict=True):
                found[k] = Trajectory(prompt, member, (segment,), each)
            announce([found[k] for k in part])
        return [found[k] for k in range(len(members))]

    def _parts(self, rows: Sequence[R], grid: Grid, guidance: Guidance) -> list[list[int]]:
        branches, parts = 1 + (guidance.scale != 1 and self.two_branches), list[list[int]]()
        for same in self.alike(rows):
            cut = self.cut([branches * self.row_tokens(rows[i], grid) for i in same])
            parts += [[same[k] for k in part] for part in cut]
        return parts

    # --- velocities ---

    def _velocity_of(self, rows: Sequence[R], grid: Grid, guidance: Guidance) -> Velocity:
        """The guided velocity of images after their rows."""

        def at_state(x_t: torch.Tensor, t: torch.Tensor, at: float) -> torch.Tensor:
            return self._guided(rows, x_t, t.expand(len(x_t)), grid, guidance, guidance.active(at))

        return at_state

    def _guided(
        self,
        rows: Sequence[R],
        x_t: torch.Tensor,
        t: torch.Tensor,
        grid: Grid,
        guidance: Guidance,
        active: bool = True,
    ) -> torch.Tensor:
        if guidance.scale == 1 or not (active and self.two_branches):
            return self.flow(rows, x_t, t, grid, guidance.scale)
        empty = [self.without_text(row) for row in rows]
        if guidance.detach_uncond:
            v = self.flow(rows, x_t, t, grid, 1.0)
            with guidance.unguided():
                v_no_text = self.flow(empty, x_t, t, grid, 1.0)
        else:
            v, v_no_text = self.flow([*rows, *empty], x_t, t, grid, 1.0).chunk(2)
        return guide(v, v_no_text, None, guidance.scale, 1.0, guidance.renorm, guidance.renorm_min)

    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """See ``FlowPolicy.velocity``. Where the scale is an input of the model, 0 is the empty text at scale 1."""
        grid, guidance = self._drawn_grid(trajectories[0]), Guidance(guidance_scale or 1.0, 1.0, "none")
        rows = [self.row(trajectory.prompt) for trajectory in trajectories]
        rows = rows if guidance_scale else [self.without_text(row) for row in rows]
        found: dict[int, torch.Tensor] = {}
        for part in self._parts(rows, grid, guidance):
            v = self._guided([rows[k] for k in part], x_t[part], t[part], grid, guidance)
            found |= zip(part, v, strict=True)
        return torch.stack([found[k] for k in range(len(rows))])

    def _drawn_grid(self, trajectory: Trajectory) -> Grid:
        image = flow_segment(trajectory).image
        return self.latent_grid((image.shape[1], image.shape[2]))

    # --- replay ---

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """Differentiable replay of segments with equal settings together; see ``Policy.logprobs``."""
        out: list[list[SegmentLogprobs]] = [[] for _ in trajectories]
        alike: dict[Hashable, list[int]] = {}
        for i, trajectory in enumerate(trajectories):
            for segment in segments_through(trajectory, kinds):  # at most one
                settings = replay_settings(segment) if isinstance(segment, FlowSegment) else text_settings(segment)
                alike.setdefault(settings, []).append(i)
        for same in alike.values():
            own = [trajectories[i] for i in same]
            scored = self.replay_texts(own) if own[0].image is None else self._replay_images(own)
            for i, found in zip(same, scored, strict=True):
                out[i] = [found]
        return out

    def _replay_images(self, trajectories: Sequence[Trajectory]) -> list[SegmentLogprobs]:
        grid, guidance = self._drawn_grid(trajectories[0]), guidance_of(flow_segment(trajectories[0]))
        rows, found = [self.row(trajectory.prompt) for trajectory in trajectories], dict[int, SegmentLogprobs]()
        for part in self._parts(rows, grid, guidance):
            velocity = self._velocity_of([rows[k] for k in part], grid, guidance)
            recorded = [flow_segment(trajectories[k]) for k in part]
            flows = replay_steps(velocity, recorded, self.device, self.checkpointed)
            for k, logprobs, means in zip(part, flows.logprobs, flows.means, strict=True):
                found[k] = SegmentLogprobs(logprobs, means=means, stds=flows.stds)
        return [found[k] for k in range(len(rows))]
