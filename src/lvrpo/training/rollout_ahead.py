"""Rollouts that an engine samples one step ahead, while the policy trains on those of the step before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from lvrpo.distributed import device, rank, relay_errors
from lvrpo.training.checkpoint import load_state, save_state
from lvrpo.types import (
    FlowSegment,
    ImageTokenSegment,
    MaskedSegment,
    MaskedTextSegment,
    Prompt,
    Segment,
    TextSegment,
    Trajectory,
)

Rows = Mapping[int, Sequence[Trajectory]]
"""Trajectories of groups, by the index of their prompt in the step."""
SEGMENT_TYPES: Mapping[str, type[Segment]] = {
    cls.__name__: cls for cls in (TextSegment, MaskedTextSegment, FlowSegment, ImageTokenSegment, MaskedSegment)
}


class RolloutAhead:
    """The rollouts of the current and the next step, of this rank's prompts.

    That of the current step is kept until the next but one starts, since a step that fails is repeated from a
    checkpoint. A checkpoint holds the rollout of its next step: the weights that sampled it are gone.
    """

    def __init__(self) -> None:
        self._rollouts: dict[int, Future[Rows]] = {}
        self._restored: tuple[int, dict[str, Any]] | None = None
        """Step and encoded rows, of all ranks. Any: as of ``load_state``."""

    def start(self, step: int, sample: Callable[[], Rows]) -> None:
        """Calls ``sample`` in a thread, without gradients; what was started before must have been taken."""
        self._rollouts = {s: rows for s, rows in self._rollouts.items() if s == step - 1}
        self._rollouts[step] = _in_thread(sample)

    def take(self, step: int, prompts: Sequence[Prompt]) -> Rows | None:
        """The rollout of a step, of its ``prompts`` of all ranks; None: there is none. Collective.

        Waits for it, and raises the error of its sampling. A restored one has the rows of all ranks.
        """
        if self._restored is not None and self._restored[0] == step:
            rows = {int(p): group for p, group in self._restored[1].items()}
            if sorted(rows) == list(range(len(prompts))):  # else some rank could not save its part
                rollout: Future[Rows] = Future()
                rollout.set_result({p: [_decoded(tree, prompts[p]) for tree in group] for p, group in rows.items()})
                self._rollouts[step] = rollout
        self._restored = None
        with relay_errors():
            return self._rollouts[step].result() if step in self._rollouts else None

    def wait(self) -> None:
        """Returns when nothing is being sampled."""
        for rollout in self._rollouts.values():
            with suppress(Exception):  # of whoever takes it
                rollout.result()

    def save(self, folder: Path, step: int) -> None:
        """Writes this rank's rows of the rollout of a step to a new folder, once they are sampled, if they are."""
        self.wait()
        rollout = self._rollouts.get(step)
        if rollout is None or rollout.exception() is not None:
            return
        own = folder / f"rollout_{rank()}"
        own.mkdir()
        save_state(own, {str(p): [_encoded(one) for one in group] for p, group in rollout.result().items()})

    def load(self, folder: Path, step: int) -> None:
        """Restores the rollout of a step, which any number of ranks saved; forgets all others."""
        self.wait()
        parts = [load_state(part) for part in sorted(folder.glob("rollout_*"))]
        self._rollouts, self._restored = {}, (step, {p: group for part in parts for p, group in part.items()})


def _in_thread(sample: Callable[[], Rows]) -> Future[Rows]:
    """The result of a call in a daemon thread: an interpreter that ends does not wait for an engine."""
    rollout: Future[Rows] = Future()

    def run() -> None:
        try:
            if device().type == "cuda":
                torch.cuda.set_device(device())  # of each thread its own
            with torch.no_grad():
                rows = sample()
        except BaseException as error:  # raised where the rollout is taken
            rollout.set_exception(error)
        else:
            rollout.set_result(rows)

    threading.Thread(target=run, name="rollout", daemon=True).start()
    return rollout


def _encoded(trajectory: Trajectory) -> dict[str, Any]:
    """The outputs of a trajectory as values that ``save_state`` takes. Any: such values."""
    segments = [{"type": type(segment).__name__, **vars(segment)} for segment in trajectory.segments]
    return {"member": trajectory.member, "seed": trajectory.seed, "segments": segments}


def _decoded(tree: Mapping[str, Any], prompt: Prompt) -> Trajectory:
    """The trajectory of ``_encoded``. Any: values of ``load_state``, where tuples are lists."""
    segments: list[Segment] = []
    for saved in tree["segments"]:
        values: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in saved.items()}
        segments.append(SEGMENT_TYPES[values.pop("type")](**values))
    return Trajectory(prompt, tree["member"], tuple(segments), tree["seed"])
