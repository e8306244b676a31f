"""The vocabulary of lvrpo: what flows from rows to rewards.

Axis letters used everywhere: P prompts, G members of a group, B = P * G, T sampling steps, L tokens of a sequence,
V vocabulary, D width, N image tokens, C channels of an image token, K rewards.
Time of a flow runs from t = 1 (noise) to t = 0 (data).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from lvrpo.errors import InputError

Task = Literal["understand", "generate", "edit", "reason"]
TASKS: tuple[Task, ...] = ("understand", "generate", "edit", "reason")

OutputKind = Literal["text", "image"]

SegmentKind = Literal["text", "flow", "tokens", "masked"]
SEGMENT_KINDS: tuple[SegmentKind, ...] = ("text", "flow", "tokens", "masked")
"""How outputs are made, in the order in which they are trained: text is written, pictures are drawn by a flow, as image
tokens one after another, or as masked image tokens a few at a time."""

LogitGuidance = Literal["joint", "detach_uncond", "none"]
"""What of guided logits has a gradient: both branches, the one with the prompt; none: the log-probs are unguided."""

Image = torch.Tensor
"""A picture: float32 (3, height, width), values in [0, 1]."""

Part = str | Image
"""One piece of a prompt: a string or a picture."""


@dataclass(frozen=True)
class Fact:
    """One atomic, checkable statement about an output picture, put as a question."""

    kind: str
    """What it is about: color, count, shape, exists, position, digit, total, unchanged ..."""
    question: str
    """The question whose answer tells whether the fact holds; the reading side can be asked it."""
    answer: str
    """The answer if the fact holds."""
    check: Mapping[str, Any] = field(default_factory=dict)
    """The same as data (JSON values only), for a verifier of the world that the prompt comes from."""


@dataclass(frozen=True)
class Prompt:
    """What a policy is asked."""

    id: str
    """Stable and unique: the key of the group. Two rows with the same text have two ids."""
    task: Task
    parts: tuple[Part, ...]
    """Text and pictures, in order."""
    output: tuple[OutputKind, ...]
    """The kinds of segments to produce, in order: ("text",), ("image",) or ("text", "image")."""
    answer: str | None = None
    """The right text output, where there is one."""
    facts: tuple[Fact, ...] = ()
    """What must hold of the picture drawn."""
    category: str = ""
    """The row of the results table that it counts in (counting, color_attr, sum ...)."""
    source: str = ""
    """The data set (and split) it comes from."""
    content: str = ""
    """What it asks, the same for all wordings; equal content is of one split. Empty: its text and pictures."""
    held_out: bool = False
    """Whether it shows a combination of things that training never shows."""
    rules: Mapping[str, Any] = field(default_factory=dict)
    """What the text output must keep to: fields of ``lvrpo.data.jsonl.TextRules``, JSON values only."""
    edited: torch.Tensor | None = None
    """bool (height, width), True where an edit may change the last picture of ``parts``; None: not known."""
    world: str = "scenes"
    """Who knows its words and checks its facts: an entry of ``lvrpo.data.base.WORLDS``, or my_package.module:Name."""
    form: str = ""
    """The words of a question without what they name, the same for questions that differ in content alone; "": that is
    not known."""

    def __post_init__(self) -> None:
        named = f"prompt {self.id!r}"
        if not isinstance(self.id, str) or not self.id:
            raise InputError(f"{named}: field id must be text that is not empty")
        if self.task not in TASKS:
            raise InputError(f"{named}: field task is {self.task!r}: must be one of {', '.join(TASKS)}")
        if not isinstance(self.parts, tuple | list):
            raise InputError(
                f"{named}: field parts is {self.parts!r}: must be a tuple of texts and pictures, such as ('a circle',)"
            )
        wrong = [type(part).__name__ for part in self.parts if not isinstance(part, str | torch.Tensor)]
        if wrong:
            raise InputError(f"{named}: field parts holds {wrong[0]}: must hold texts and pictures, (3, H, W) tensors")
        kinds = self.output if isinstance(self.output, tuple | list) else ()
        if not kinds or not set(kinds) <= {"text", "image"}:
            raise InputError(f"{named}: field output is {self.output!r}: must be a tuple of 'text' and 'image'")


@dataclass(frozen=True)
class Example:
    """A prompt with outputs to imitate: one row of a supervised corpus."""

    prompt: Prompt
    outputs: tuple[Part, ...]
    """One per entry of ``prompt.output``."""


@dataclass(frozen=True)
class TextSegment:
    """Sampled text."""

    kind: ClassVar[SegmentKind] = "text"
    tokens: torch.Tensor
    """int64 (L,): the sampled tokens, the end token included when the text ended by itself."""
    behavior_logprobs: torch.Tensor
    """float32 (L,): log-prob of each token under the policy that sampled it, at ``temperature``."""
    temperature: float
    text: str
    ended: bool
    """Whether the end token was sampled (False: cut off at the length limit)."""
    trainer_logprobs: torch.Tensor | None = None
    """float32 (L,): the same under the weights that an update starts from, by the program that trains; None: these are
    ``behavior_logprobs``."""


@dataclass(frozen=True)
class FlowSegment:
    """A picture drawn by integrating a flow from noise; latents in token layout."""

    kind: ClassVar[SegmentKind] = "flow"
    latent: torch.Tensor
    """float32 (N, C): the final state, t = 0."""
    timesteps: torch.Tensor
    """float32 (T + 1,): the grid, from 1 to 0."""
    trained_steps: tuple[int, ...]
    """Which of the T steps were sampled with noise and are trained; empty for a pure ODE."""
    states: torch.Tensor
    """float32 (W, N, C): the state before each trained step."""
    next_states: torch.Tensor
    """float32 (W, N, C): the state after each trained step, exactly as stored at sampling."""
    behavior_logprobs: torch.Tensor
    """float32 (W,): log-density of each trained step, reduced over its dimensions by ``logprob_reduction``."""
    sampler: str
    """The stochastic step: flow_sde, dance_sde, cps; ode when nothing is trained."""
    noise_level: float
    guidance_scale: float
    image_guidance_scale: float
    guidance_renorm: str
    logprob_reduction: Literal["mean", "sum"]
    image: Image
    """The decoded picture."""
    guidance_renorm_min: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Guided are the steps with low < t <= high."""
    means: torch.Tensor | None = None
    """float32 (W, N, C): the mean of each trained step under the weights that sampled; None: not recorded."""


@dataclass(frozen=True)
class ImageTokenSegment:
    """A picture drawn as discrete tokens, one after another (Janus, Emu3)."""

    kind: ClassVar[SegmentKind] = "tokens"
    tokens: torch.Tensor
    """int64 (N,): codes of the picture, in the order in which they were drawn."""
    behavior_logprobs: torch.Tensor
    """float32 (N,): log-prob of each token under the policy that sampled it, guided, at ``temperature``."""
    temperature: float
    guidance_scale: float
    image: Image
    """The decoded picture."""
    guided_logprobs: LogitGuidance = "joint"
    """What of the guided logits has a gradient in a replay."""
    trainer_logprobs: torch.Tensor | None = None
    """float32 (N,): as ``TextSegment.trainer_logprobs``."""


@dataclass(frozen=True)
class MaskedSegment:
    """A picture drawn as discrete tokens, of which a few at a time are revealed (Show-o, MMaDA)."""

    kind: ClassVar[SegmentKind] = "masked"
    tokens: torch.Tensor
    """int64 (N,): codes of the picture, in raster order."""
    reveal_steps: torch.Tensor
    """int64 (N,): the step at which each token was fixed, -1 for one that was given; rebuilds what every step saw."""
    scored: torch.Tensor
    """bool (R, N): the log-probs that count. On the recorded path R = 1, and every token counts that was not given; by
    Monte Carlo a row per draw, True where it masks: kept, so that every policy is scored under the same masks."""
    behavior_logprobs: torch.Tensor
    """float32 (R, N): under the policy that sampled, at ``temperature``; 0 where not scored."""
    likelihood: Literal["path", "monte_carlo"]
    """path: each token given those fixed in earlier steps; monte_carlo: the masked tokens given the others."""
    temperature: float
    guidance_scale: float
    image: Image
    """The decoded picture."""
    guided_logprobs: LogitGuidance = "joint"
    """What of the guided logits has a gradient in a replay; none (monte_carlo): the log-probs are unguided."""
    trainer_logprobs: torch.Tensor | None = None
    """float32 (R, N): as ``TextSegment.trainer_logprobs``."""


DrawnSegment = FlowSegment | ImageTokenSegment | MaskedSegment
TokenSegment = TextSegment | ImageTokenSegment | MaskedSegment
"""Those whose actions are tokens."""
Segment = TextSegment | DrawnSegment


@dataclass(frozen=True)
class Trajectory:
    """One recorded sample: the outputs of one member of a group."""

    prompt: Prompt
    member: int
    segments: tuple[Segment, ...]
    """One per entry of ``prompt.output``."""
    seed: int
    policy_version: int = 0

    @property
    def text(self) -> str | None:
        """The last sampled text, if any."""
        return next((s.text for s in reversed(self.segments) if isinstance(s, TextSegment)), None)

    @property
    def image(self) -> Image | None:
        """The last drawn picture, if any."""
        return next((s.image for s in reversed(self.segments) if isinstance(s, DrawnSegment)), None)


def segments_through(trajectory: Trajectory, kinds: Collection[SegmentKind]) -> tuple[Segment, ...]:
    """Its segments up to and including the last one of these kinds."""
    segments = trajectory.segments
    return segments[: max((s + 1 for s, segment in enumerate(segments) if segment.kind in kinds), default=0)]


@dataclass(frozen=True)
class Group:
    """The G trajectories of one prompt."""

    prompt: Prompt
    trajectories: tuple[Trajectory, ...]

    def __len__(self) -> int:
        return len(self.trajectories)


@dataclass(frozen=True)
class SegmentLogprobs:
    """Differentiable log-probs of one segment under the current weights, shaped as its ``behavior_logprobs``."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None = None
    """float32: entropy of the token distributions, shaped as the log-probs (all but flows)."""
    means: torch.Tensor | None = None
    """float32 (W, N, C): mean of each trained step, differentiable (flows only)."""
    stds: torch.Tensor | None = None
    """float32 (W,): deviation of each trained step in every dimension (flows only)."""


@dataclass(frozen=True)
class RewardTable:
    """Every score of a step, and why a score is missing."""

    names: tuple[str, ...]
    """K reward names."""
    weights: torch.Tensor
    """float32 (K,); 0 for a reward that is only watched."""
    scores: torch.Tensor
    """float32 (P, G, K); whatever stands in a masked cell never matters."""
    mask: torch.Tensor
    """bool (P, G, K): True where the score counts."""
    reasons: Mapping[tuple[int, int, int], str]
    """For every masked cell (p, g, k): 'not applicable' or 'failed: ...'."""
    tasks: tuple[Task, ...]
    """P task names, one per group."""
    judges: Mapping[str, tuple[OutputKind, ...]] = field(default_factory=dict)
    """Which segments of a trajectory of several a reward judges; every one where absent."""
    judge: str = ""
    """Who judged: class and hash of the weights."""
    judged_by: Mapping[str, str] = field(default_factory=dict)
    """By reward, for those that others judge too or instead: model and address, or folder and fingerprint."""
    noise: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """float32 (P, G) by reward: variance that a score owes to the draws of its estimate; nan where it is not known."""
    normalize: Mapping[str, str] = field(default_factory=dict)
    """By reward, for those that are not normalised as ``advantages.kind`` says: group, batch or none."""
    cut: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """bool (P, G), for rewards with a cap: whether the score lay beyond it."""

    def trained(self) -> RewardTable:
        """The rewards with a weight above 0, without those that are only watched."""
        kept = [k for k in range(len(self.names)) if self.weights[k] > 0]
        if len(kept) == len(self.names):
            return self
        reasons = {(p, g, kept.index(k)): reason for (p, g, k), reason in self.reasons.items() if k in kept}
        return replace(
            self,
            names=tuple(self.names[k] for k in kept),
            weights=self.weights[kept],
            scores=self.scores[..., kept],
            mask=self.mask[..., kept],
            reasons=reasons,
        )

    def mean(self, name: str) -> float:
        """Mean of one reward over its valid cells; nan where it has none."""
        k = self.names.index(name)
        valid = self.scores[..., k][self.mask[..., k]]
        return float(valid.mean()) if valid.numel() else float("nan")


Parts = Sequence[Part]
"""A context: what a policy has seen before it writes or draws."""
