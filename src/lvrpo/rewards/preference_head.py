"""A Bradley-Terry head on the features of a policy's own frozen reading side."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import torch

from lvrpo.data.scenes.grammar import DESCRIBE
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.reading import read_json_object
from lvrpo.rewards.identity import judge_identity
from lvrpo.rewards.written import text_problem
from lvrpo.storing import read_weights, write_tensors, write_whole
from lvrpo.types import Parts, Task, Trajectory

MODEL_TYPE = "lvrpo_preference_head"
FEATURES = "text_states/1"
"""The name of what ``ReadsTexts.text_states`` gives; another recipe of features needs another name."""
TENSORS = ("weight", "mean", "deviation")
AT_ONCE = 64
"""Outputs that are read at once."""


@runtime_checkable
class ReadsTexts(Protocol):
    """A policy whose reading side gives features."""

    def text_states(self, contexts: Sequence[Parts], texts: Sequence[str]) -> torch.Tensor:
        """Features of each text in its context, float32 (batch, F)."""
        ...


@dataclass(frozen=True)
class Reading:
    """How an output is put to the reading side."""

    instruction: str = DESCRIBE
    """What stands between a drawing and the description that it is to be found in."""
    lead_ins: tuple[str, ...] = ("draw ", "a picture of ")
    """Beginnings of a prompt that no description has."""

    def case(self, trajectory: Trajectory) -> tuple[Parts, str] | str:
        """(context, text), or why there is none: a drawing's own prompt after it, an answer after its question."""
        parts = trajectory.prompt.parts
        words = " ".join(part for part in parts if isinstance(part, str)).strip()
        if "image" not in trajectory.prompt.output:
            return text_problem(trajectory) or (parts, (trajectory.text or "").strip())
        if trajectory.image is None:
            return "nothing was drawn"
        sources = [part for part in parts if not isinstance(part, str)]
        if sources:
            return ((*sources, trajectory.image), words) if words else "the prompt has no words"
        for lead_in in self.lead_ins:
            words = words.removeprefix(lead_in)
        return ((trajectory.image, self.instruction), words) if words else "the prompt has no words"


@dataclass(frozen=True)
class PreferenceHead:
    """Scores s = scale * w . (f - mean) / deviation, such that p(first is preferred) = sigmoid(s_1 - s_2)."""

    policy: str
    """``judge_identity`` of the policy whose features it reads."""
    weight: torch.Tensor
    """float32 (F,)"""
    mean: torch.Tensor
    deviation: torch.Tensor
    tasks: tuple[Task, ...]
    """Of the pairs that it was fitted on."""
    scale: float = 1.0
    """1, or what calibration found."""
    reading: Reading = Reading()
    measured: dict[str, Any] = field(default_factory=dict)
    """Numbers of the fit, for people. Any: JSON values."""

    @property
    def identity(self) -> str:
        """A hash of what it makes of features."""
        numbers = torch.cat([self.weight, self.mean, self.deviation, torch.tensor([self.scale])])
        return f"PreferenceHead:{hashlib.blake2b(numbers.numpy().tobytes(), digest_size=6).hexdigest()}"

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F) to log-odds (B,)."""
        return self.scale * ((features - self.mean) / self.deviation) @ self.weight

    def require(self, judge: Policy) -> None:
        """Raises InputError unless this is the policy that it was fitted on."""
        found = judge_identity(judge)
        if found != self.policy:
            raise InputError(
                f"preference head: fitted on the features of {self.policy}, but this run's judge is {found}: fit it "
                "again with `lvrpo fit-preference DATA --model MODEL`"
            )

    def save(self, folder: Path) -> None:
        """Writes config.json and model.safetensors into an existing folder."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}  # three tensors by their names
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        config = {"model_type": MODEL_TYPE, "features": FEATURES, "policy": self.policy, "tasks": list(self.tasks)}
        config |= {"scale": self.scale, "reading": asdict(self.reading), "measured": self.measured}
        write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str | Path) -> PreferenceHead:
        """Reads what ``save`` wrote; raises InputError, one line, on anything else."""
        folder, remedy = Path(folder), "make it with `lvrpo fit-preference DATA`"
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise InputError(f"head={str(folder)!r}: holds no {name}: {remedy}")
        try:
            config = read_json_object(folder / "config.json", remedy)
            if config["model_type"] != MODEL_TYPE or config["features"] != FEATURES:
                raise InputError(
                    f"{folder}: holds {config['model_type']!r} of features {config['features']!r}, not {MODEL_TYPE!r} "
                    f"of {FEATURES!r}: {remedy}"
                )
            tensors, _ = read_weights(folder / "model.safetensors", remedy)
            weight, mean, deviation = (tensors[name].float() for name in TENSORS)
            if not (weight.ndim == 1 and weight.shape == mean.shape == deviation.shape):
                raise ValueError("shapes")
            reading = Reading(str(config["reading"]["instruction"]), tuple(map(str, config["reading"]["lead_ins"])))
            tasks = tuple(task for task in get_args(Task) if task in config["tasks"])
            if not math.isfinite(float(config["scale"])) or not tasks:
                raise ValueError("not finite")
            policy, scale = str(config["policy"]), float(config["scale"])
            return cls(policy, weight, mean, deviation, tasks, scale, reading, dict(config["measured"]))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{folder}: damaged, or no preference head: {remedy}") from None


def features_of(judge: Policy, cases: Sequence[tuple[Parts, str]]) -> torch.Tensor:
    """Features (B, F) on the CPU; raises InputError for a policy that gives none."""
    if not isinstance(judge, ReadsTexts):
        raise InputError(f"{type(judge).__name__} gives no features of its reading side: use another policy")
    parts = [cases[start : start + AT_ONCE] for start in range(0, len(cases), AT_ONCE)]
    return torch.cat([judge.text_states([c for c, _ in part], [t for _, t in part]).float().cpu() for part in parts])
