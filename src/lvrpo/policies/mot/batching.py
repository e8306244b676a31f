"""What goes through the transformer at once: members of groups, cut where a limit is reached."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

MAX_ROWS = 512
"""Rows that go through the transformer at once when sampling, replaying or judging."""


def runs(keys: Sequence[object]) -> list[int]:
    """The number of the run of equal neighbors that each key lies in: a a b a -> 0 0 1 2."""
    out: list[int] = []
    for i, key in enumerate(keys):
        out.append(out[-1] + (key != keys[i - 1]) if out else 0)
    return out


def alike(keys: Sequence[object], size: int) -> list[list[int]]:
    """Indices of equal keys together, in order of first appearance, at most ``size`` each."""
    classes: dict[object, list[int]] = {}
    for i, key in enumerate(keys):
        classes.setdefault(key, []).append(i)
    return [indices[i : i + size] for indices in classes.values() for i in range(0, len(indices), size)]


def cut(groups: Sequence[Hashable], contexts: Sequence[int], new: Sequence[int], limit: int) -> list[list[int]]:
    """Parts of a sequence of members, as indices, in order; equal neighbors in ``groups`` share one context.

    A part costs its contexts, each padded to the longest, and what its members add: at most ``limit``, unless one
    member alone costs more. Groups stay whole as long as one fits; a group that does not is cut by itself.
    """
    members: list[list[int]] = [[] for _ in range(runs(groups)[-1] + 1)] if groups else []
    for i, group in enumerate(runs(groups)):
        members[group].append(i)
    parts: list[list[int]] = []
    longest = held = added = 0
    for group in members:
        context, own = contexts[group[0]], sum(new[i] for i in group)
        if parts and max(longest, context) * (held + 1) + added + own <= limit:
            parts[-1] += group
            longest, held, added = max(longest, context), held + 1, added + own
            continue
        for k, i in enumerate(group):
            if k == 0 or context + added + new[i] > limit:
                parts.append([])
                longest, held, added = context, 1, 0
            parts[-1].append(i)
            added += new[i]
    return parts
