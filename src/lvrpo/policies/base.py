"""The contract of a policy, however it generates images, and the settings that it is sampled with."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from torch import nn

from lvrpo.errors import ContractError, InputError
from lvrpo.sampling.masked import mask_draws, with_complements
from lvrpo.types import (
    SEGMENT_KINDS,
    Example,
    Group,
    Image,
    LogitGuidance,
    Part,
    Parts,
    Prompt,
    SegmentKind,
    SegmentLogprobs,
    TaskKind,
    Trajectory,
)


@dataclass(frozen=True)
class MaskedScoring:
    """The scoring of images and texts of masked tokens, at sampling and in every replay."""

    likelihood: Literal["path", "monte_carlo", "coupled"] = "path"
    """coupled: monte_carlo with every mask and its complement, so that each pair scores every token."""
    draws: int = 1
    """monte_carlo: random masks per image or text; coupled: pairs of them."""
    schedule: Literal["cosine", "uniform"] = "cosine"
    """monte_carlo, coupled: distribution of the share of masked tokens."""
    steps_per_pass: int = 1
    """path: so many steps are scored together, given the tokens of earlier ones (TraceRL, arXiv:2509.06949)."""

    def masks(self, seeds: Sequence[int], num_tokens: int) -> torch.Tensor:
        """bool (B, R, num_tokens): the random masks of monte_carlo and coupled, one sequence per seed."""
        drawn = mask_draws(seeds, num_tokens, self.draws, self.schedule)
        return with_complements(drawn) if self.likelihood == "coupled" else drawn


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. One object is shared by all members of a group."""

    group_size: int = 8
    temperature: float = 1.0
    """Temperature of text tokens; 0 is greedy (log-probs are then those of temperature 1)."""
    max_new_tokens: int = 24
    """Maximum length of a text, in tokens."""
    num_steps: int = 8
    """Model evaluations per image; steps in which masked tokens are revealed. Image tokens take one each."""
    timestep_shift: float | None = None
    """Time shift of the grid; None: the policy's own."""
    sampler: Literal["ode", "flow_sde", "dance_sde", "cps"] = "ode"
    """Rule of the steps in ``window``: flow_sde (arXiv:2505.05470), dance_sde (arXiv:2505.07818) and cps
    (arXiv:2509.05952) add noise."""
    noise_level: float = 0.7
    """Scale a of that noise."""
    window: tuple[int, ...] = ()
    """The steps sampled with noise and trained; all others follow the ODE."""
    solver: Literal["adams_bashforth", "dpm_solver", "euler"] = "adams_bashforth"
    """Solver of the ODE steps; the first two are of second order."""
    steps_after_window: int | None = None
    """Steps after the end of the window, equal in unshifted time; None: those of the grid."""
    guidance_scale: float = 1.0
    """Classifier-free guidance scale of the text; 1: no guidance."""
    image_guidance_scale: float = 1.0
    """Classifier-free guidance scale of the source image of an edit; 1: no guidance."""
    guidance_renorm: Literal["none", "global", "channel", "channel_match", "text_channel"] = "none"
    """Shrinks the guided velocity to the norm of the conditional one, or gives it that norm (``sampling.guide``)."""
    guidance_renorm_min: float = 0.0
    """Lower bound of the shrinking factor; 1 switches it off."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """(low, high): steps with low < t <= high are guided; the others run only the conditional branch."""
    logprob_reduction: Literal["mean", "sum"] = "mean"
    """Reduction over the latent dimensions of the log-prob of a stochastic step."""
    shared_noise: bool = False
    """Whether the members of a group start from the same noise."""
    image_size: tuple[int, int] | None = None
    """Height and width of an image generated without a source image; None: the policy's own."""
    image_temperature: float = 1.0
    """Temperature of image tokens and masked image tokens; 0 is greedy."""
    choice_temperature: float = 0.0
    """Temperature of the Gumbel noise when a step chooses the tokens to unmask; 0: the most confident ones."""
    guided_logprobs: LogitGuidance = "joint"
    """Which branches of guidance have a gradient in a replay of an image (``LogitGuidance``)."""
    masked: MaskedScoring = MaskedScoring()
    block_length: int = 32
    """For texts of masked tokens: places of a block; blocks are decoded from left to right."""
    tokens_per_step: int = 1
    """For texts of masked tokens: places that a step decodes."""

    def __post_init__(self) -> None:
        for name in ("group_size", "max_new_tokens", "num_steps", "block_length", "tokens_per_step"):
            value = getattr(self, name)  # its fields, by name
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"sampling.{name}={value}: must be a whole number >= 1")
        for name in SCALES:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"sampling.{name}={value}: must be a number >= 0")


SCALES = (
    *("temperature", "image_temperature", "choice_temperature", "noise_level"),
    *("guidance_scale", "image_guidance_scale"),
)
"""Fields of ``Sampling`` that are numbers >= 0."""


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of the replay of a trajectory."""

    context: int
    """Tokens of its prompt; members of a group that are replayed together share it."""
    text: int
    """Tokens of its text segments."""
    image: int
    """Tokens of one pass over the image that it generates."""


_listener: ContextVar[Callable[[Sequence[Trajectory]], object]] = ContextVar("listener", default=lambda _: None)


@contextmanager
def listening(listener: Callable[[Sequence[Trajectory]], object]) -> Iterator[None]:
    """Inside, ``listener`` is called with what policies ``announce``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def announce(trajectories: Sequence[Trajectory]) -> None:
    """A policy may call it in ``sample`` with trajectories whose texts and images are complete, before others are.

    Their seeds are ``derive_seed(seed of the prompt, member)``; their log-probs may be missing.
    """
    _listener.get()(trajectories)


def with_seeds(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[tuple[Prompt, int]]:
    """Each prompt of ``sample`` with its seed; raises ContractError where their numbers differ."""
    if len(seeds) != len(prompts):
        raise ContractError(f"seeds: {len(seeds)} for {len(prompts)} prompts: give one for each")
    return list(zip(prompts, seeds, strict=True))


READS_ONLY = "reads images and does not draw them"
"""The phrase in messages for a policy that cannot generate images."""


def can_draw(tasks: Collection[TaskKind]) -> bool:
    """Whether a policy with these tasks generates images."""
    return "generate" in tasks or "edit" in tasks


def abilities(tasks: Collection[TaskKind]) -> str:
    """The phrase in messages for what a policy does."""
    return f"does {', '.join(tasks)} alone" if can_draw(tasks) else READS_ONLY


def check_text(policy: object, text: str) -> None:
    """Raises InputError where a policy cannot tokenize a text; a policy without ``check_text`` accepts all."""
    check = getattr(policy, "check_text", None)  # optional
    if check is not None:
        check(text)


# --- the interface: every policy has the members of RolloutPolicy and SavedPolicy; the others are optional ---


@runtime_checkable
class RolloutPolicy(Protocol):
    """Samples outputs and replays them with a gradient: all that a policy-gradient loss needs."""

    @property
    def segment_kinds(self) -> tuple[SegmentKind, ...]:
        """The kinds of segments in its outputs."""
        ...

    @property
    def image_size(self) -> int | None:
        """Side in pixels of square input and output images; None: any size."""
        ...

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the forward pass, which sets the tolerance of a replay."""
        ...

    def default_sampling(self, task: TaskKind) -> Sampling:
        """The default sampling settings of a task: guidance, steps, length."""
        ...

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """Samples a group for every prompt; ``seeds`` has one seed per prompt, members are derived from it."""
        ...

    def logprobs(
        self, trajectories: Sequence[Trajectory], kinds: Collection[SegmentKind] = SEGMENT_KINDS
    ) -> list[list[SegmentLogprobs]]:
        """Differentiable replay, one entry per segment of a trajectory; equals behavior_logprobs before an update.

        What comes after the last segment of one of ``kinds`` is not replayed and has no entry. Before it, log-probs of
        other kinds may be nan.
        """
        ...

    def count_tokens(self, trajectory: Trajectory) -> TokenCounts:
        """The number of tokens of its replay."""
        ...

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by expert: "understand", "generate", "shared"."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Scores outputs of any policy: all that a reward needs. Rewards ask it questions by ``sample``."""

    def sample(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> list[Group]:
        """See ``RolloutPolicy.sample``."""
        ...

    def text_logprob(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Mean log-prob per token, end token included, of each text in its context, (batch,)."""
        ...

    def image_logprob(
        self,
        contexts: Sequence[Parts],
        images: Sequence[Image],
        draws: int,
        seeds: Sequence[int],
        times: tuple[float, float] = ...,
    ) -> torch.Tensor:
        """Estimates of the log-likelihood of each image after its context, (batch, draws).

        In nats, up to a constant of the image. The random numbers of a draw depend on the row's seed alone: give rows
        that are compared the same seed. ``times``: the interval of flow times to integrate over; the default is the
        policy's own.
        """
        ...

    def hidden_states(self, parts: Sequence[Part], layer: int) -> list[torch.Tensor]:
        """Hidden states of texts and images, each read alone: (N, D), a row per text token or image patch.

        After ``layer`` layers; 0: input embeddings. Without gradient and without special tokens. Raises InputError
        for a layer that does not exist.
        """
        ...


@runtime_checkable
class SavedPolicy(Protocol):
    """Copies, saves and loads itself."""

    def make_reference(self) -> Self:
        """A frozen copy, for the reference and the judge; with an adapter, the base without it."""
        ...

    def save(self, folder: Path) -> None:
        """Writes config.json, safetensors and tokenizer files (Hub layout)."""
        ...

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """Reads what ``save`` wrote at a dtype (None: the policy's own choice for the device).

        Raises InputError on another model's folder or a truncated file.
        """
        ...


@runtime_checkable
class FlowPolicy(RolloutPolicy, Protocol):
    """A policy that generates images by a flow; flow losses train its velocity."""

    def velocity(
        self, trajectories: Sequence[Trajectory], x_t: torch.Tensor, t: torch.Tensor, guidance_scale: float = 1.0
    ) -> torch.Tensor:
        """Velocity (B, N, C) of the generated image at states ``x_t`` (B, N, C), times ``t`` (B,), after its context.

        ``guidance_scale`` s: v_no_text + s (v - v_no_text); 0: the branch without text alone.
        """
        ...

    def timestep_shift(self) -> float:
        """The shift of times that the flow was trained with; sampling uses it unless another is given."""
        ...


@runtime_checkable
class Policy(FlowPolicy, Judge, SavedPolicy, Protocol):
    """One model that understands and generates text and images: all parts of the interface."""

    def check_text(self, text: str) -> None:
        """Raises InputError where the policy cannot tokenize a text."""
        ...

    def check_sampling(self, sampling: Sampling) -> None:
        """Raises InputError for settings that the policy cannot follow, such as the size of an image."""
        ...

    def limit_tokens(self, limit: int | None) -> None:
        """Limits the tokens of one transformer pass to ``limit`` (None: the policy's own limit)."""
        ...

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether activations are recomputed in the backward pass (gradient checkpointing)."""
        ...


@runtime_checkable
class SupervisedPolicy(Policy, Protocol):
    """A policy that learns from rows to imitate, as ``lvrpo pretrain`` trains it."""

    def supervised_losses(
        self, examples: Sequence[Example], generator: torch.Generator, represent: Any = None
    ) -> Mapping[str, torch.Tensor]:
        """Differentiable losses of a batch, scalars: "text" and "image", those that it has outputs for.

        Random numbers (times, noise, masks) come from ``generator``. ``represent``: a loss on hidden states, of
        policies that have such states (``mot.likelihood.FeatureLoss``; Any: it is theirs), which adds
        "representation".
        """
        ...


@runtime_checkable
class EstimablePolicy(Protocol):
    """A policy whose memory is estimated before its weights are loaded (``training.memory_estimate``)."""

    max_tokens: int
    """The most tokens of a batch without gradient, as ``Policy.limit_tokens`` sets it."""

    @classmethod
    def from_config(cls, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Self:
        """The policy of a folder without its weights: parameters are on the meta device, tokenizers are read.

        ``device``: the one whose default dtype is taken where ``dtype`` is None. Raises InputError as ``load`` does.
        """
        ...


USED_BY: Mapping[str, str] = {
    "velocity": "objectives of flows",
    "timestep_shift": "objectives of flows",
    "text_logprob": "rewards of the judge's likelihoods (self_vqa, agreement, knowledge) and judge.refresh_every",
    "image_logprob": "judge.refresh_every",
    "hidden_states": "the reward semantic",
    "limit_tokens": "limits.forward_tokens",
    "checkpoint_gradients": "limits.gradient_checkpointing",
}
"""Methods that a class may leave out, and what calls them."""


def former_name(policy: object, name: str) -> str:
    """The name of a tensor before 2026-12, which fingerprints hash: adapters and records of before keep their base.

    A class may have ``former_names``: parts of names, and what they were, in order of replacement.
    """
    for now, before in getattr(type(policy), "former_names", {}).items():
        name = name.replace(now, before)
    return name


def current_name(policy: object, name: str) -> str:
    """The inverse of ``former_name``, for files of before; other names stay as they are."""
    for now, before in getattr(type(policy), "former_names", {}).items():
        name = name.replace(before, now)
    return name


def missing_members(policy: object) -> list[str]:
    """The members of ``RolloutPolicy`` and ``SavedPolicy`` that a class lacks; every policy needs these."""
    names = dict.fromkeys(name for part in (RolloutPolicy, SavedPolicy) for name in vars(part) if name[0] != "_")
    return [name for name in names if not hasattr(policy, name)]


def missing_method(policy: object, method: str) -> InputError:
    """The error of a policy without an optional method."""
    return InputError(
        f"{type(policy).__name__}: has no method {method!r}: write it, or configure the run without {USED_BY[method]}"
    )


P = TypeVar("P")


def require_method(policy: P, method: str) -> P:
    """The policy itself; raises InputError where it lacks a method of ``USED_BY``."""
    if not hasattr(policy, method):
        raise missing_method(policy, method)
    return policy
