"""The rules of GenEval (arXiv:2310.11513) on the objects that a detector found in a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lvrpo.data.geneval import Clause, Metadata, Relation

MAX_OBJECTS = 16
"""Objects of a class that count, the surest first."""
POSITION_MARGIN = 0.1
"""Share of both objects' sizes that an offset must exceed."""
MIN_COSINE = 0.5
"""A relation holds where the remaining offset has more than this share of the whole one along its axis."""


@dataclass(frozen=True)
class Detection:
    """One object that a detector found."""

    score: float
    """In [0, 1]."""
    box: tuple[float, float, float, float]
    """Left, top, right, bottom in pixels."""
    mask: torch.Tensor | None = None
    """bool (height, width) of the picture; None from a detector of boxes."""


Colors = Callable[[str, Sequence[Detection]], Sequence[str]]
"""The color of each object of a class."""


def most_confident(found: Sequence[Detection], threshold: float) -> list[Detection]:
    """Up to ``MAX_OBJECTS`` detections with a score above a threshold, the surest first."""
    kept = [each for each in found if each.score > threshold]
    return sorted(kept, key=lambda each: -each.score)[:MAX_OBJECTS]


def relations(a: Detection, b: Detection) -> frozenset[Relation]:
    """Where ``a`` lies seen from ``b``: up to two relations, none where they are too close.

    The offset of the centers is shortened on each axis by ``POSITION_MARGIN`` times the sum of both sizes; what is
    left, divided by the length of the whole offset, must exceed ``MIN_COSINE``.
    """
    offset, left = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (a.box[low] + a.box[high] - b.box[low] - b.box[high]) / 2
        sizes = abs(a.box[high] - a.box[low]) + abs(b.box[high] - b.box[low])
        offset.append(distance)
        left.append(math.copysign(max(abs(distance) - POSITION_MARGIN * sizes, 0.0), distance))
    if all(abs(each) < 1e-3 for each in left):
        return frozenset()
    x, y = (each / math.hypot(*offset) for each in left)
    found: set[Relation] = set()
    if abs(x) > MIN_COSINE:
        found.add("left of" if x < 0 else "right of")
    if abs(y) > MIN_COSINE:
        found.add("above" if y < 0 else "below")
    return frozenset(found)


def problems(metadata: Metadata, objects: Mapping[str, Sequence[Detection]], colors: Colors) -> list[str]:
    """The requirements that a picture fails; [] if it is right.

    ``objects``: the detections of each class that count, the surest first. Colors and positions are checked of the
    surest ``count`` objects of a clause alone; a position holds where it does of every such object to every object of
    the clause that it refers to, which must itself be fulfilled.
    """
    found: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for clause in metadata.include:
        chosen = list(objects.get(clause.name, ()))[: clause.count]
        problem = _problem(clause, chosen, matched, metadata, colors)
        found += [problem] if problem else []
        matched.append(None if problem else chosen)
    for clause in metadata.exclude:
        count = len(objects.get(clause.name, ()))
        if count >= clause.count:
            found.append(f"{count} {clause.name}, fewer than {clause.count} are right")
    return found


def _problem(
    clause: Clause,
    chosen: Sequence[Detection],
    matched: Sequence[Sequence[Detection] | None],
    metadata: Metadata,
    colors: Colors,
) -> str | None:
    if len(chosen) < clause.count:
        return f"{len(chosen)} {clause.name}, at least {clause.count} are right"
    if clause.color is not None:
        seen = list(colors(clause.name, chosen))
        if seen.count(clause.color) < clause.count:
            return f"{clause.name} is {' and '.join(dict.fromkeys(seen))}, {clause.color} is right"
    if clause.position is not None:
        relation, target = clause.position
        other = matched[target]
        if other is None:
            return f"no {metadata.include[target].name} for {clause.name} to be {relation}"
        for one in chosen:
            for two in other:
                holds = relations(one, two)
                if relation not in holds:
                    return f"{clause.name} is {' and '.join(sorted(holds)) or 'at no side of it'}, {relation} is right"
    return None
