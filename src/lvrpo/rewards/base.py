"""The reward protocol, and what rewards of images and of judges share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

import torch
from torch import (
    _foreach_norm,  # pyright: ignore[reportPrivateImportUsage]  # of torch.optim
    nn,
)
from torch.distributed.fsdp import FSDPModule

from lvrpo.errors import LvrpoError, describe_error
from lvrpo.policies.base import Judge, former_name
from lvrpo.sampling import derive_seed
from lvrpo.types import FlowSegment, Group, Image, Part, Prompt, Segment, TextSegment, Trajectory

SampleIndex = tuple[int, int]
"""(group, member)."""
Failures = dict[SampleIndex, str]
"""Why outputs have no score."""
Side = Literal["read", "draw"]
"""read: the understanding side judges, by log-probs of texts; draw: the generation side, by log-probs of images."""
SIDES: tuple[Side, ...] = get_args(Side)
ROUNDING = 1e-3
"""Tolerance of a log-prob above 0."""


@dataclass(frozen=True)
class Scores:
    """The scores that one reward gave to groups of equal size."""

    values: torch.Tensor
    """float32 (P, G)."""
    failures: Mapping[SampleIndex, str] = field(default_factory=dict)
    """Reasons of missing scores, by (group, member); the value there is never used."""

    @classmethod
    def of(
        cls, groups: Sequence[Group], found: Mapping[SampleIndex, float | torch.Tensor], failures: Failures
    ) -> Scores:
        """The scores ``found``; all others are missing."""
        values = torch.full((len(groups), len(groups[0])), math.nan)
        for cell, value in found.items():
            values[cell] = torch.as_tensor(value, dtype=torch.float32)  # beyond its range inf, which is masked
        return cls(values, failures)


class Reward(Protocol):
    """Scores outputs. The table calls it only with groups that it applies to.

    Optional attributes:

    - ``judges``: ("text",), ("image",) or both, the segments that it scores if a trajectory has a text and an image
      (default: both).
    - ``sides``: a tuple of "read" (understanding) and "draw" (generation), the sides of the judge that it calls; () for
      rules and for other models (default: both). Judge drift is measured, and the judge refreshed, only for these.
    - ``judged_by``: the model that judges instead of the frozen policy, such as an endpoint or a folder. It is written
      into the records of the run, so it must not contain a key.
    - ``waits``: true if it waits for another program, such as a server, and has no ``sides``. It is then called in a
      thread, for some groups of a step while others are sampled, so it must read only prompts and outputs, score each
      group by itself, not use the GPU, and not change what the process shares, such as random generators.
    - ``batch_failures``: a method (prompts, texts, scores) that names groups of a whole batch, of all processes, that
      have no score after all, as {group: reason}. Texts are those of the members, "" where one is empty or cut off;
      scores are nan where they are missing.
    - ``relative``: true if scores only compare the members of a group. Held-out outputs, one per prompt, are then not
      scored.
    """

    def applies(self, prompt: Prompt) -> bool:
        """Whether outputs of this prompt can be scored."""
        ...

    def score(self, groups: Sequence[Group], judge: Judge) -> Scores:
        """Scores every member; ``judge`` is a frozen policy, never the one that is trained."""
        ...


def score_each(groups: Sequence[Group], score: Callable[[Trajectory], float | str]) -> Scores:
    """Scores of a function of one trajectory, which returns a number, or the reason why there is none."""
    found = [[score(trajectory) for trajectory in group.trajectories] for group in groups]
    failures = {(p, g): one for p, row in enumerate(found) for g, one in enumerate(row) if isinstance(one, str)}
    values = [[math.nan if isinstance(one, str) else one for one in row] for row in found]
    return Scores(torch.tensor(values, dtype=torch.float32), failures)


def score_images(groups: Sequence[Group], score: Callable[[Prompt, Image], float], failed: str) -> Scores:
    """Scores of a function of a prompt and its image; ``failed``: what another error of it says, beside its words."""

    def scored(trajectory: Trajectory) -> float | str:
        image, problem = trajectory.image, image_problem(trajectory)
        if image is None or problem:
            return str(problem)
        try:
            return score(trajectory.prompt, image)
        except LvrpoError:
            raise
        except Exception as error:  # code of the user, and models of transformers, raise anything
            return f"{failed}: {describe_error(error)}"

    return score_each(groups, scored)


# --- checks of outputs and of log-probs ---


def image_problem(trajectory: Trajectory, judge: object = None) -> str | None:
    """Why the last image of a trajectory cannot be scored; None where it can.

    ``judge``: the model that reads it; a policy may read images of one size only.
    """
    return image_problems([trajectory], judge)[0]


def image_problems(trajectories: Sequence[Trajectory], judge: object = None) -> list[str | None]:
    """``image_problem`` of each; on a GPU one wait for all."""
    images = [trajectory.image for trajectory in trajectories]
    drawn = [image for image in images if image is not None]
    # one pass over each: nan and inf are kept by the maximum
    largest = iter(torch.stack(_foreach_norm(drawn, math.inf)).tolist() if drawn else [])
    side = getattr(judge, "image_size", None)  # a judge that is no policy reads any size
    problems: list[str | None] = []
    for image in images:
        if image is None:
            problems.append("nothing was drawn")
            continue
        finite = math.isfinite(next(largest))
        if side is not None and tuple(image.shape[1:]) != (side, side):
            problems.append(f"an image of {image.shape[2]} x {image.shape[1]}: the judge reads {side} x {side}")
        else:
            problems.append(None if finite else "the image holds values that are no numbers")
    return problems


def scorable_images(groups: Sequence[Group], judge: object = None) -> tuple[dict[SampleIndex, Image], Failures]:
    """The last image of every trajectory that has no ``image_problem``, and the problems of the others."""
    found: dict[SampleIndex, Image] = {}
    failures: Failures = {}
    for p, group in enumerate(groups):
        problems = image_problems(group.trajectories, judge)
        for g, (trajectory, problem) in enumerate(zip(group.trajectories, problems, strict=True)):
            if problem is None and trajectory.image is not None:
                found[p, g] = trajectory.image
            else:
                failures[p, g] = str(problem)
    return found, failures


def logprob_problem(value: float) -> str | None:
    """Why a value is no log-prob of a text; None where it is one."""
    return None if math.isfinite(value) and value <= ROUNDING else f"the judge gave {value:g} for a log-prob"


def first_problem(logprobs: Iterable[float]) -> str | None:
    """The first ``logprob_problem`` of several values; None where there is none."""
    return next((problem for value in logprobs if (problem := logprob_problem(value))), None)


def probabilities(logprobs: torch.Tensor) -> torch.Tensor:
    """exp(log-prob), in [0, 1]; nan where ``logprob_problem`` holds, as a judge that gives -inf or + 3 is broken."""
    known = logprobs.isfinite() & (logprobs <= ROUNDING)
    return torch.where(known, logprobs.clamp(max=0).exp(), math.nan)


# --- names of judges ---


SAMPLED = 4096
"""Values taken of each tensor."""

_stand_in: ContextVar[str | None] = ContextVar("stand_in", default=None)


@contextmanager
def override_fingerprint(identity: str) -> Iterator[None]:
    """Inside, every ``judge_fingerprint`` is ``identity``: the trained weights score in the place of that judge.

    Cached questions of the judge (``rewards.questions``) are then used for the trained weights too, and none are added.
    """
    token = _stand_in.set(identity)
    try:
        yield
    finally:
        _stand_in.reset(token)


def is_fingerprint_overridden() -> bool:
    """Whether other weights score in the place of the judge (``override_fingerprint``)."""
    return _stand_in.get() is not None


def join_judges(*sources: object) -> str:
    """The models that judge for several rewards, each given as a name or as an object with ``judged_by``; "" for none
    beside the policy."""
    found = [source if isinstance(source, str) else getattr(source, "judged_by", "") for source in sources]
    return "; ".join(dict.fromkeys(name for name in found if name))


def judge_fingerprint(judge: object) -> str:
    """``TinyPolicy:3f2a91c0d4e7``: the class and a hash of names, shapes and evenly spaced values of the weights.

    Two judges of one name have the same weights: an update, an average or another checkpoint moves whole tensors. A
    judge that is not a module (an endpoint, a double in a test) is named by its ``identity``, or by its class alone.
    """
    if (named := _stand_in.get()) is not None:
        return named
    if not isinstance(judge, nn.Module) and (of_weights := getattr(type(judge), "judge_fingerprint", None)) is not None:
        return of_weights(judge)  # one of several sets of weights
    # a class whose weights are divided among ranks is derived from its own
    name = next(cls.__name__ for cls in type(judge).__mro__ if not issubclass(cls, FSDPModule))
    if not isinstance(judge, nn.Module):
        own = getattr(judge, "identity", None)  # optional in a judge of the user
        return f"{name}:{own}" if own else name
    digest = hashlib.blake2b(digest_size=6)
    values = []
    for key, tensor in judge.state_dict().items():
        digest.update(f"{former_name(judge, key)}{tuple(tensor.shape)}{tensor.dtype}".encode())
        flat = tensor.reshape(-1)
        values.append(flat[:: max(1, flat.numel() // SAMPLED)].float())
    if values:
        digest.update(torch.cat(values).cpu().numpy().tobytes())
    return f"{name}:{digest.hexdigest()}"


# --- outputs that no policy sampled ---


def offline_group(prompt: Prompt, outputs: Sequence[Sequence[Part]]) -> Group:
    """One member per entry of ``outputs``, each a text or an image for every entry of ``prompt.output``.

    They can be scored, not replayed: their log-probs are empty. Seeds are a function of the prompt and the member.
    """
    members = []
    for member, parts in enumerate(outputs):
        segments = tuple(_text(part) if isinstance(part, str) else _drawn(part) for part in parts)
        members.append(Trajectory(prompt, member, segments, derive_seed(prompt.id, "given", member)))
    return Group(prompt, tuple(members))


def _text(text: str) -> Segment:
    return TextSegment(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 1.0, text, True)


def _drawn(image: Image) -> Segment:
    none = torch.zeros(0, 0, 0)
    return FlowSegment(
        latent=torch.zeros(0, 0),
        timesteps=torch.zeros(0),
        trained_steps=(),
        states=none,
        next_states=none,
        behavior_logprobs=torch.zeros(0),
        sampler="ode",
        noise_level=0.0,
        guidance_scale=1.0,
        image_guidance_scale=1.0,
        guidance_renorm="none",
        logprob_reduction="mean",
        image=image,
    )
