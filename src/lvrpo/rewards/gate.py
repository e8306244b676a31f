"""What a judge was measured to tell: which kinds of fact each side of the model may reward."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Literal, get_args

from lvrpo.errors import InputError
from lvrpo.policies import BUILT_IN
from lvrpo.reading import read_json_object

Side = Literal["read", "draw"]
"""read: the reading side judges pictures; draw: the drawing side judges texts."""
SIDES: tuple[Side, ...] = get_args(Side)

FILE = "judge.json"
"""The gate of a built-in model, in its folder."""


@dataclass(frozen=True)
class Sensitivity:
    """How well one side ranks a right output above one that errs in one kind of fact."""

    auc: float
    """Share of the pairs ranked right, a tie counting one half; .5 is chance."""
    low: float | None
    """Lower end of the 95 % interval, prompts as units; None: one prompt has none."""
    n: int
    """Prompts."""


@dataclass(frozen=True)
class Gate:
    """The kinds of fact that a judge may reward: those whose interval lies above the threshold."""

    judge: str
    """``judge_identity`` of the model that was measured."""
    threshold: float
    draws: int
    """Of the drawing side."""
    measured: Mapping[Side, Mapping[str, Sensitivity]]

    def admits(self, side: Side, kind: str) -> bool:
        """Whether a kind was measured and can be told; a kind that nobody measured cannot."""
        found = self.measured[side].get(kind)
        return found is not None and found.low is not None and found.low > self.threshold

    def require(self, judge: str) -> None:
        """Raises InputError unless this is the judge that was measured."""
        if judge != self.judge:
            raise InputError(
                f"gate: measured on judge {self.judge}, but this run's is {judge}: measure it with "
                f"`lvrpo audit --judge MODEL --gate FILE`"
            )

    def text(self) -> str:
        """As it stands in a file."""
        return json.dumps(asdict(self), indent=1) + "\n"


def read_gate(name: str | Path) -> Gate:
    """The gate in a file, or that of a built-in model; raises InputError with one line."""
    path = Path(name)
    if str(name) in BUILT_IN:
        path = Path(str(resources.files("lvrpo"))) / "assets" / BUILT_IN[str(name)] / FILE
    if not path.is_file():
        raise InputError(f"gate={str(name)!r}: no such file: make it with `lvrpo audit --judge MODEL --gate FILE`")
    try:
        found = read_json_object(path)
        measured: dict[Side, dict[str, Sensitivity]] = {
            side: {kind: Sensitivity(**row) for kind, row in found["measured"][side].items()}
            for side in ("read", "draw")
        }
        return Gate(str(found["judge"]), float(found["threshold"]), int(found["draws"]), measured)
    except (InputError, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: is no gate: make it with `lvrpo audit --judge MODEL --gate FILE`") from None
