"""The data types of lvrpo, from prompts to rewards.

Axis letters used everywhere: P prompts, G members of a group, B = P * G, T sampling steps, L tokens of a sequence,
V vocabulary, D width, N image tokens, C channels of an image token, K rewards.
Flow time runs from t = 1 (noise) to t = 0 (data).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from lvrpo.errors import InputError

TaskKind = Literal["understand", "generate", "edit", "reason"]
TASKS: tuple[TaskKind, ...] = ("understand", "generate", "edit", "reason")

OutputKind = Literal["text", "image"]

Split = Literal["train", "validation", "test"]

SegmentKind = Literal["text", "flow", "tokens", "masked"]
SEGMENT_KINDS: tuple[SegmentKind, ...] = ("text", "flow", "tokens", "masked")
"""Generation method of a segment, in the order of training: text, and images by a flow, as autoregressive image tokens,
or as masked image tokens."""

LogitGuidance = Literal["joint", "detach_uncond", "none"]
"""Gradient of guided logits and velocities: joint: through all branches; detach_uncond: through the conditional branch
only; none: the log-probs are unguided."""

Image = torch.Tensor
"""An image: float32 (3, height, width), values in [0, 1], on the CPU whatever the device of the policy."""

Part = str | Image
"""One part of a prompt: text or an image."""


@dataclass(frozen=True)
class Fact:
    """One atomic, checkable statement about an output image, phrased as a question."""

    kind: str
    """color, count, shape, exists, position, digit, total, unchanged ..."""
    question: str
    """A VQA question for the understanding side."""
    answer: str
    """The answer if the fact holds."""
    check: Mapping[str, Any] = field(default_factory=dict)
    """The fact as JSON values, for the verifier of the prompt's world."""
    choices: tuple[str, ...] = ()
    """The answers to choose from, ``answer`` among them; () for an open question."""


@dataclass(frozen=True)
class Prompt:
    """The input of a policy and everything needed to score its output."""

    id: str
    """Stable and unique key of the group, also for two rows with the same text."""
    task: TaskKind
    parts: tuple[Part, ...]
    """Text and images, in order."""
    output: tuple[OutputKind, ...]
    """The kinds of segments to produce, in order: ("text",), ("image",) or ("text", "image")."""
    answer: str | None = None
    """The reference answer of the text output, if any."""
    facts: tuple[Fact, ...] = ()
    """Facts that the output image must satisfy."""
    category: str = ""
    """Row of the results table (counting, color_attr, sum ...)."""
    source: str = ""
    """Data set and split."""
    content: str = ""
    """Key of the content, equal for all paraphrases; equal content never crosses splits. Empty: text and images."""
    held_out: bool = False
    """Whether it contains a combination that training prompts never contain."""
    rules: Mapping[str, Any] = field(default_factory=dict)
    """Rules for the text output: fields of ``lvrpo.data.rows.TextRules``, JSON values only."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Further values of its row, for reward functions; JSON values only. The model never sees them."""
    edited: torch.Tensor | None = None
    """bool (height, width), True where an edit may change the last image of ``parts``; None: unknown."""
    world: str = "scenes"
    """The prompt's verifier and vocabulary: an entry of ``lvrpo.data.base.WORLDS``, or my_package.module:Name."""
    form: str = ""
    """Template of the question, equal for questions that differ in content only; "": unknown."""

    def __post_init__(self) -> None:
        named = f"prompt {self.id!r}"
        if not isinstance(self.id, str) or not self.id:
            raise InputError(f"{named}: field id must be text that is not empty")
        if self.task not in TASKS:
            raise InputError(f"{named}: field task is {self.task!r}: must be one of {', '.join(TASKS)}")
        if not isinstance(self.parts, tuple | list):
            raise InputError(
                f"{named}: field parts is {self.parts!r}: must be a tuple of texts and images, such as ('a circle',)"
            )
        wrong = [type(part).__name__ for part in self.parts if not isinstance(part, str | torch.Tensor)]
        if wrong:
            raise InputError(f"{named}: field parts holds {wrong[0]}: must hold texts and images, (3, H, W) tensors")
        kinds = self.output if isinstance(self.output, tuple | list) else ()
        if not kinds or not set(kinds) <= {"text", "image"}:
            raise InputError(f"{named}: field output is {self.output!r}: must be a tuple of 'text' and 'image'")

    @property
    def text(self) -> str:
        """The texts of the prompt, without its images."""
        return " ".join(part for part in self.parts if isinstance(part, str)).strip()

    @property
    def images(self) -> list[Image]:
        """The images of the prompt, in order."""
        return [part for part in self.parts if not isinstance(part, str)]


@dataclass(frozen=True)
class Example:
    """A prompt with target outputs: one row of a supervised corpus."""

    prompt: Prompt
    outputs: tuple[Part, ...]
    """One per entry of ``prompt.output``."""
    dropped: Literal["", "text", "image"] = ""
    """What of the prompt is left out, so that guidance has a branch without it."""


@dataclass(frozen=True)
class TextSegment:
    """Sampled text, token after token unless it is a ``MaskedTextSegment``."""

    kind: ClassVar[SegmentKind] = "text"
    tokens: torch.Tensor
    """int64 (L,): the sampled tokens, with the end token if it was sampled."""
    behavior_logprobs: torch.Tensor
    """float32 (L,): log-prob of each token under the policy that sampled it, at ``temperature``."""
    temperature: float
    text: str
    ended: bool
    """Whether the end token was sampled (False: truncated at the length limit)."""
    trainer_logprobs: torch.Tensor | None = None
    """float32 (L,): log-probs under the weights before the update, recomputed by the trainer; None: equal to
    ``behavior_logprobs``."""


@dataclass(frozen=True, kw_only=True)
class MaskedTextSegment(TextSegment):
    """Text sampled by masked (parallel) decoding in blocks (MMaDA), cut at its first end token.

    Letters: L tokens of the text, N >= L places that were decoded, R draws. ``behavior_logprobs`` are (L,), or (R, L)
    for likelihood=monte_carlo.
    """

    decoded: torch.Tensor
    """int64 (N,): the tokens of all places; those after the end are seen by other steps and never scored."""
    reveal_steps: torch.Tensor
    """int64 (N,): the step at which each place was decoded, N where decoding stopped before; defines each step's
    context."""
    scored: torch.Tensor
    """bool (L,) or (R, L): which log-probs count. path: all; monte_carlo: one row per draw, True where masked."""
    likelihood: Literal["path", "monte_carlo"]
    """As ``MaskedSegment.likelihood``; monte_carlo masks the places after the end too."""


@dataclass(frozen=True)
class FlowSegment:
    """An image sampled by integrating a flow from noise; latents in token layout."""

    kind: ClassVar[SegmentKind] = "flow"
    latent: torch.Tensor
    """float32 (N, C): the final state, t = 0."""
    timesteps: torch.Tensor
    """float32 (T + 1,): the grid, from 1 to 0."""
    trained_steps: tuple[int, ...]
    """Indices of the stochastic (trained) steps among the T steps; empty for a pure ODE."""
    states: torch.Tensor
    """float32 (W, N, C): x_t of each trained step."""
    next_states: torch.Tensor
    """float32 (W, N, C): x_next of each trained step, exactly as sampled."""
    behavior_logprobs: torch.Tensor
    """float32 (W,): log-density of each trained step, reduced over dimensions by ``logprob_reduction``."""
    sampler: str
    """flow_sde, dance_sde or cps; ode without stochastic steps."""
    noise_level: float
    guidance_scale: float
    image_guidance_scale: float
    guidance_renorm: str
    logprob_reduction: Literal["mean", "sum"]
    image: Image
    """The decoded image."""
    guidance_renorm_min: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Steps with low < t <= high are guided."""
    guided_logprobs: LogitGuidance = "joint"
    """Gradient of the guided velocities in a replay."""
    means: torch.Tensor | None = None
    """float32 (W, N, C): mean of each trained step under the behavior policy; None: not recorded."""


@dataclass(frozen=True)
class ImageTokenSegment:
    """An image sampled as autoregressive discrete tokens (Janus, Emu3)."""

    kind: ClassVar[SegmentKind] = "tokens"
    tokens: torch.Tensor
    """int64 (N,): image codes in sampling order."""
    behavior_logprobs: torch.Tensor
    """float32 (N,): log-prob of each token under the policy that sampled it, guided, at ``temperature``."""
    temperature: float
    guidance_scale: float
    image: Image
    """The decoded image."""
    guided_logprobs: LogitGuidance = "joint"
    """Gradient of the guided logits in a replay."""
    trainer_logprobs: torch.Tensor | None = None
    """float32 (N,): as ``TextSegment.trainer_logprobs``."""


@dataclass(frozen=True)
class MaskedSegment:
    """An image sampled as discrete tokens by masked (parallel) decoding (Show-o, MMaDA)."""

    kind: ClassVar[SegmentKind] = "masked"
    tokens: torch.Tensor
    """int64 (N,): image codes in raster order."""
    reveal_steps: torch.Tensor
    """int64 (N,): the step, or the group of steps, at which each token was decoded, -1 for a given token; defines each
    step's context."""
    scored: torch.Tensor
    """bool (R, N): which log-probs count. path: R = 1, every decoded token; monte_carlo: one row per draw, True where
    masked; recorded, so that every policy is scored under the same masks."""
    behavior_logprobs: torch.Tensor
    """float32 (R, N): under the policy that sampled, at ``temperature``; 0 where not scored."""
    likelihood: Literal["path", "monte_carlo"]
    """path: each token given those of earlier steps; monte_carlo: the masked tokens given the others."""
    temperature: float
    guidance_scale: float
    image: Image
    """The decoded image."""
    guided_logprobs: LogitGuidance = "joint"
    """Gradient of the guided logits in a replay; none (monte_carlo): the log-probs are unguided."""
    trainer_logprobs: torch.Tensor | None = None
    """float32 (R, N): as ``TextSegment.trainer_logprobs``."""


DrawnSegment = FlowSegment | ImageTokenSegment | MaskedSegment
ScoredSegment = MaskedSegment | MaskedTextSegment
"""Segments of masked decoding, which record what of their log-probs counts."""
TokenSegment = TextSegment | ImageTokenSegment | MaskedSegment
"""Segments whose actions are tokens."""
Segment = TextSegment | DrawnSegment


@dataclass(frozen=True)
class Trajectory:
    """One recorded sample: the outputs of one member of a group."""

    prompt: Prompt
    member: int
    segments: tuple[Segment, ...]
    """One per entry of ``prompt.output``."""
    seed: int

    @property
    def text(self) -> str | None:
        """The last sampled text, if any."""
        return next((s.text for s in reversed(self.segments) if isinstance(s, TextSegment)), None)

    @property
    def image(self) -> Image | None:
        """The last sampled image, if any."""
        return next((s.image for s in reversed(self.segments) if isinstance(s, DrawnSegment)), None)


def segments_through(trajectory: Trajectory, kinds: Collection[SegmentKind]) -> tuple[Segment, ...]:
    """The segments up to and including the last one of these kinds."""
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
    """Differentiable log-probs of one segment under the current weights, of the shape of its ``behavior_logprobs``."""

    logprobs: torch.Tensor
    entropy: torch.Tensor | None = None
    """float32: entropy of the token distributions, of the shape of the log-probs (None for flows)."""
    means: torch.Tensor | None = None
    """float32 (W, N, C): mean of each trained step, differentiable (flows only)."""
    stds: torch.Tensor | None = None
    """float32 (W,): standard deviation per dimension of each trained step (flows only)."""


@dataclass(frozen=True)
class RewardTable:
    """All scores of a step, and the reasons of missing ones."""

    names: tuple[str, ...]
    """K reward names."""
    weights: torch.Tensor
    """float32 (K,); 0 for a reward that is only logged."""
    scores: torch.Tensor
    """float32 (P, G, K); masked cells are undefined."""
    mask: torch.Tensor
    """bool (P, G, K): True where the score is valid."""
    reasons: Mapping[tuple[int, int, int], str]
    """The reason of every masked cell (p, g, k): 'not applicable' or 'failed: ...'."""
    tasks: tuple[TaskKind, ...]
    """P task names, one per group."""
    judges: Mapping[str, tuple[OutputKind, ...]] = field(default_factory=dict)
    """Output kinds that a reward scores in a trajectory of several segments; default: all."""
    judge: str = ""
    """The judge policy: class and hash of the weights."""
    judged_by: Mapping[str, str] = field(default_factory=dict)
    """External judges by reward: model and address, or folder and fingerprint."""
    normalize: Mapping[str, str] = field(default_factory=dict)
    """Normalization by reward, where it differs from that of ``advantages.kind``: group, batch or none."""
    cut: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """bool (P, G), for rewards with a cap: whether the score was clipped."""

    def trained(self) -> RewardTable:
        """The table of the rewards with a positive weight."""
        positive = [k for k in range(len(self.names)) if self.weights[k] > 0]
        if len(positive) == len(self.names):
            return self
        reasons = {(p, g, positive.index(k)): reason for (p, g, k), reason in self.reasons.items() if k in positive}
        return replace(
            self,
            names=tuple(self.names[k] for k in positive),
            weights=self.weights[positive],
            scores=self.scores[..., positive],
            mask=self.mask[..., positive],
            reasons=reasons,
        )

    def mean(self, name: str) -> float:
        """Mean of one reward over its valid cells; nan if there is none."""
        k = self.names.index(name)
        valid = self.scores[..., k][self.mask[..., k]]
        return float(valid.mean()) if valid.numel() else float("nan")


Parts = Sequence[Part]
"""The context of a generated segment."""
