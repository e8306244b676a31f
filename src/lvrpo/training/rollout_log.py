"""The rollout log: scores of all outputs of a run, for the audit, in the folder ``scores/`` of the run directory.

``step_000001.npz`` holds the groups of a training step, ``control_000001.npz`` those of the reference on the same
prompts, ``validation_000020.npz`` the held-out prompts of one validation. At most ``MAX_RECORDS`` files of each kind
are kept: beyond that every other file is deleted, and from then on only every other one is written. The kept steps are
a function of the current step, so a resumed run has the same files as an uninterrupted one.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from lvrpo.distributed import is_main, relay_errors
from lvrpo.errors import InputError
from lvrpo.reading import MIB, read_bytes
from lvrpo.rewards.table import NOT_APPLICABLE
from lvrpo.training.checkpoint import disk_errors
from lvrpo.training.data_parallel import local_rows, merge_ranks
from lvrpo.training.run_directory import SCORES, RunDirectory
from lvrpo.types import Group, RewardTable, TaskKind, TextSegment

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

Kind = Literal["step", "control", "validation"]

MAX_RECORDS = 1024
"""Maximum number of files of a kind."""

FIRST_STEP: Mapping[Kind, int] = {"step": 1, "control": 1, "validation": 0}
"""The step of the first record of a kind."""

TRAITS = ("tokens", "cut_off", "red", "green", "blue", "contrast")
"""Measurements of every output: number of text tokens, whether a text was truncated, mean color and contrast (root mean
square distance of the pixels from the mean color) of the image, colors in [0, 1]."""

SHAPES: Mapping[str, str] = {
    "weights": "K",
    "scores": "PGK",
    **dict.fromkeys(("applies", "judged"), "PK"),
    **dict.fromkeys(("success", "advantages"), "PG"),
    "traits": "PGT",
    **dict.fromkeys(("text_diversity", "picture_diversity"), "P"),
}
"""Shapes of the arrays of a ``RolloutRecord``; T is the number of traits."""

MAX_RECORD_BYTES = 1024 * MIB
"""Size limit of an unpacked record."""
MAX_MEASURED_SIDE = 64
"""Images are subsampled to at most this many pixels per side before they are measured."""


@dataclass(frozen=True)
class RolloutRecord:
    """The groups of one step. Masked scores are nan."""

    step: int
    names: tuple[str, ...]
    """K rewards."""
    weights: NDArray[np.float32]
    """(K,), those of this step; 0 for a reward that is only logged."""
    tasks: tuple[str, ...]
    """P tasks, one per group."""
    scores: NDArray[np.float32]
    """(P, G, K)."""
    applies: NDArray[np.bool_]
    """(P, K): whether the reward applies to the group; nan scores are then failed ones."""
    judged: NDArray[np.bool_]
    """(P, K): whether the reward contributes to ``advantages``; False if it scores another segment."""
    success: NDArray[np.float32]
    """(P, G): 1 for success, 0 for failure, nan if it cannot be verified."""
    traits: NDArray[np.float32]
    """(P, G, 6): ``TRAITS``, nan if not applicable."""
    text_diversity: NDArray[np.float32]
    """(P,): share of the pairs of members with different texts."""
    picture_diversity: NDArray[np.float32]
    """(P,): root mean square difference of two members' images over all pairs, colors in [0, 1]."""
    advantages: NDArray[np.float32]
    """(P, G), before members are selected (``flow.top_bottom_k``); nan in a control."""
    normalize: tuple[str, ...] = ()
    """K choices of ``rewards.normalize``, "" for the default of ``advantages.kind``; empty: the default for all."""
    cut: NDArray[np.float32] = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    """(P, K): share of the scores clipped by ``rewards.clip``, nan for rewards without; empty if there are none.
    ``scores`` are the clipped ones."""
    judge: str = ""
    """The judge policy: class and hash of the weights; "" in records of older versions."""
    judged_by: tuple[str, ...] = ()
    """(K,): external judge of each reward, an endpoint or a folder, or "". Empty in records of older versions."""
    categories: tuple[str, ...] = ()
    """P prompt categories, or "". Empty in records of older versions."""


# --- writing ---


def write_step(
    run: RunDirectory,
    step: int,
    groups: Sequence[Group],
    table: RewardTable,
    successes: Mapping[int, Sequence[float]],
    advantages: Float[torch.Tensor, "P G"],
    judged: Bool[torch.Tensor, "P K"] | None = None,
) -> None:
    """Writes the groups of a training step.

    ``successes``: ``group_successes``; ``judged``: which rewards contribute to ``advantages`` (None: all).
    """
    _write(run, "step", step, 1, lambda: _arrays(groups, table, successes, advantages, judged))


def write_control(
    run: RunDirectory,
    step: int,
    groups: Sequence[Group],
    table: RewardTable,
    successes: Mapping[int, Sequence[float]],
    every: int,
) -> None:
    """Writes the reference's groups on the prompts of ``step``; ``every``: steps between two controls."""
    no_advantages = torch.full(table.scores.shape[:2], torch.nan)
    _write(run, "control", step, every, lambda: _arrays(groups, table, successes, no_advantages, None))


def write_validation(run: RunDirectory, step: int, scores: Mapping[TaskKind, Sequence[float]], every: int) -> None:
    """Writes the score of every held-out prompt by task; ``every``: steps between two validations."""
    if scores:
        _write(run, "validation", step, every, lambda: {str(task): _floats(row) for task, row in scores.items()})


def truncate(run: RunDirectory, step: int) -> None:
    """Deletes the records after ``step``, which a resumed run writes again."""
    for kind in FIRST_STEP if is_main() else ():
        _delete([path for at, path in _files(run.path, kind) if at > step])


def stride(number: int) -> int:
    """The spacing of the kept records 0 ... ``number``: the smallest power of 2 for at most ``MAX_RECORDS``."""
    return 1 << (number // MAX_RECORDS).bit_length()


# --- reading ---


def read_steps(run: Path) -> Iterator[RolloutRecord]:
    """The recorded training steps in order; raises InputError for a broken file."""
    return _read(run, "step")


def read_controls(run: Path) -> Iterator[RolloutRecord]:
    """The recorded controls in order; raises InputError for a broken file."""
    return _read(run, "control")


def read_validations(run: Path) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
    """(step, scores of the held-out prompts by task) in order; raises InputError for a broken file."""
    for step, path in _files(run, "validation"):
        yield step, _load(path)


def has_records(run: Path) -> bool:
    """Whether any training step is recorded."""
    return bool(_files(run, "step"))


# --- implementation ---


def _write(
    run: RunDirectory, kind: Kind, step: int, every: int, arrays: Callable[[], Mapping[str, NDArray[Any]]]
) -> None:
    number = _record_index(kind, step, every)
    spacing = stride(number)
    if is_main() and number and spacing != stride(number - 1):
        _delete([path for at, path in _files(run.path, kind) if _record_index(kind, at, every) % spacing])
    if number % spacing == 0:
        found, buffer = arrays(), io.BytesIO()
        np.savez_compressed(buffer, allow_pickle=False, **found)
        run.write_bytes(f"{SCORES}/{kind}_{step:06d}.npz", buffer.getvalue())


def _delete(paths: Sequence[Path]) -> None:
    for path in paths:
        with disk_errors(path):
            path.unlink()


def _record_index(kind: Kind, step: int, every: int) -> int:
    """0, 1, 2, ... for the records of a kind; rounded up, as the last validation may be early."""
    return -(-(step - FIRST_STEP[kind]) // every)


def _arrays(
    groups: Sequence[Group],
    table: RewardTable,
    successes: Mapping[int, Sequence[float]],
    advantages: Float[torch.Tensor, "P G"],
    judged: Bool[torch.Tensor, "P K"] | None,
) -> Mapping[str, NDArray[Any]]:
    P, G, K = table.scores.shape
    applies = [[table.reasons.get((p, 0, k)) != NOT_APPLICABLE for k in range(K)] for p in range(P)]
    with relay_errors():
        local = {p: _measure(groups[p]) for p in local_rows(groups)}
    measured = list(merge_ranks(local).values())
    optional: dict[str, NDArray[Any]] = {}
    if table.normalize:
        optional["normalize"] = np.array([table.normalize.get(name, "") for name in table.names], dtype=np.str_)
    if table.cut:
        optional["cut"] = np.stack([_clipped_share(table, k) for k in range(K)], axis=1)
    return {
        **optional,
        "names": np.array(table.names, dtype=np.str_),
        "weights": table.weights.float().cpu().numpy(),
        "tasks": np.array(table.tasks, dtype=np.str_),
        "categories": np.array([group.prompt.category for group in groups], dtype=np.str_),
        "judge": np.array(table.judge, dtype=np.str_),
        "judged_by": np.array([table.judged_by.get(name, "") for name in table.names], dtype=np.str_),
        "scores": torch.where(table.mask, table.scores, torch.nan).float().cpu().numpy(),
        "applies": np.array(applies, dtype=np.bool_).reshape(P, K),
        "judged": np.ones((P, K), dtype=np.bool_) if judged is None else judged.cpu().numpy(),
        "success": _floats([successes.get(p, [np.nan] * G) for p in range(P)]),
        "traits": np.stack([traits for traits, _, _ in measured]),
        "text_diversity": _floats([texts for _, texts, _ in measured]),
        "picture_diversity": _floats([images for _, _, images in measured]),
        "advantages": advantages.detach().float().cpu().numpy(),
    }


def _clipped_share(table: RewardTable, k: int) -> NDArray[np.float32]:
    """(P,): the share of a reward's valid scores that were clipped; nan without a cap, or without scores."""
    name, mask = table.names[k], table.mask[..., k]
    if name not in table.cut:
        return np.full(len(mask), np.nan, dtype=np.float32)
    count = mask.sum(dim=1)
    shares = (table.cut[name] & mask).sum(dim=1) / count
    return torch.where(count > 0, shares, torch.nan).float().numpy()


def _floats(values: ArrayLike) -> NDArray[np.float32]:
    return np.asarray(values, dtype=np.float32)


def _measure(group: Group) -> tuple[NDArray[np.float32], float, float]:
    """Traits of the members, diversity of the texts, diversity of the images."""
    images = _images(group)
    return _traits(group, images), _text_diversity(group), _image_diversity(images)


def _traits(group: Group, images: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """(G, 6)"""
    out = np.full((len(group), len(TRAITS)), np.nan, dtype=np.float32)
    for g, trajectory in enumerate(group.trajectories):
        texts = [segment for segment in trajectory.segments if isinstance(segment, TextSegment)]
        if texts:
            out[g, :2] = sum(len(s.tokens) for s in texts), any(not s.ended for s in texts)
    if images is not None:
        out[:, 2:5] = images.mean(axis=2)
        out[:, 5] = np.sqrt(images.var(axis=2).mean(axis=1))
    return out


def _text_diversity(group: Group) -> float:
    G = len(group)
    if G < 2 or group.trajectories[0].text is None:
        return float("nan")
    equal = sum(n * (n - 1) for n in Counter(t.text for t in group.trajectories).values())
    return 1 - equal / (G * (G - 1))


def _image_diversity(images: NDArray[np.float32] | None) -> float:
    """The mean squared difference over all pairs is twice the sample variance."""
    if images is None or len(images) < 2:
        return float("nan")
    return float(np.sqrt(2 * images.var(axis=0, ddof=1).mean()))


def _images(group: Group) -> NDArray[np.float32] | None:
    """Subsampled images, (G, 3, pixels)."""
    images = [t.image for t in group.trajectories if t.image is not None]
    if not images:
        return None
    every = -(-max(images[0].shape[1:]) // MAX_MEASURED_SIDE)
    return torch.stack([image[:, ::every, ::every] for image in images]).flatten(2).float().cpu().numpy()


def _files(run: Path, kind: Kind) -> list[tuple[int, Path]]:
    found = ((re.fullmatch(rf"{kind}_(\d+)\.npz", path.name), path) for path in (run / SCORES).glob(f"{kind}_*.npz"))
    return sorted((int(match[1]), path) for match, path in found if match)


def _read(run: Path, kind: Kind) -> Iterator[RolloutRecord]:
    for step, path in _files(run, kind):
        arrays = _load(path)
        try:
            names, tasks = (tuple(map(str, arrays.pop(name))) for name in ("names", "tasks"))
            judge = str(arrays.pop("judge", ""))
            optional = {n: tuple(map(str, arrays.pop(n, ()))) for n in ("normalize", "judged_by", "categories")}
            values: Any = {"judge": judge, **optional, **arrays}  # Any: bool or float, by the field
            record = RolloutRecord(step=step, names=names, tasks=tasks, **values)
            _require_shapes(record)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{path}: lacks what a record of scores holds: delete it") from None
        yield record


def _require_shapes(record: RolloutRecord) -> None:
    """Raises ValueError for inconsistent shapes or arrays that are not numeric."""
    P, K = len(record.tasks), len(record.names)
    sizes = {"P": P, "K": K, "G": record.scores.shape[1], "T": len(TRAITS)} if record.scores.ndim == 3 else {}
    for name, letters in SHAPES.items():
        array = getattr(record, name)  # a field of RolloutRecord
        if array.dtype.kind not in "fb" or array.shape != tuple(sizes.get(letter, -1) for letter in letters):
            raise ValueError(name)


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with disk_errors(path, "read"):
        try:
            content = io.BytesIO(read_bytes(path, "delete it", MAX_RECORD_BYTES))
            with zipfile.ZipFile(content) as packed:
                if sum(entry.file_size for entry in packed.infolist()) > MAX_RECORD_BYTES:
                    raise InputError(f"{path}: unpacks to more than {MAX_RECORD_BYTES / MIB:.0f} MiB: delete it")
            with np.load(content, allow_pickle=False) as arrays:
                return dict(arrays)
        except (ValueError, EOFError, zipfile.BadZipFile):
            raise InputError(f"{path}: is not a whole record of scores: delete it") from None
