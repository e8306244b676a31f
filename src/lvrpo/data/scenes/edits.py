"""Edits: a source scene, an instruction, the target scene, and facts about the target."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lvrpo.data.scenes import facts
from lvrpo.data.scenes.grammar import EDGES, Mention, mention
from lvrpo.data.scenes.layout import Layout
from lvrpo.data.scenes.objects import COLORS, MAX_OBJECTS, SHAPES, Scene, SceneObject
from lvrpo.types import Fact

_ATTEMPTS = 12


@dataclass(frozen=True)
class Edit:
    """One edit."""

    source: Scene
    instruction: str
    target: Scene
    facts: tuple[Fact, ...]
    cells: frozenset[tuple[int, int]]
    """(row, col) of all cells that may look otherwise in a result that obeys."""


def _source(layout: Layout) -> Scene:
    """Two to four objects; one in four scenes has two of one shape in different colors."""
    rng = layout.rng
    scene = layout.objects(rng.randint(2, 4))
    if len(scene.objects) < 3 or rng.random() < 0.6:
        return scene
    first, second, *rest = scene.objects
    twin = replace(second, shape=first.shape)
    return replace(scene, objects=(first, twin, *rest))


def _reference(scene: Scene, layout: Layout) -> tuple[SceneObject, Mention] | None:
    """An object and words that single it out."""
    o = layout.rng.choice(scene.objects)
    same = [p for p in scene.objects if p.shape == o.shape]
    if len(same) == 1:
        return o, Mention(o.shape, o.color if layout.rng.random() < 0.3 else None)
    return (o, mention(o)) if sum(p.color == o.color for p in same) == 1 else None


def _free_pair(scene: Scene, color: str, shape: str) -> bool:
    return all((o.color, o.shape) != (color, shape) for o in scene.objects)


def _recolor(scene: Scene, layout: Layout) -> Edit | None:
    reference = _reference(scene, layout)
    color = layout.rng.choice(COLORS)
    if reference is None or not _free_pair(scene, color, reference[0].shape):
        return None
    o, m = reference
    unique = sum(p.shape == o.shape for p in scene.objects) == 1
    said = Mention(o.shape, color)
    changed = facts.exists(said, cell=o.cell, kind="color")
    if unique:
        changed = replace(changed, question=facts.color(said).question, answer=color)
    target = scene.with_object(o, replace(o, color=color))
    kept = facts.bystander_facts(scene, o)
    said_of = (changed, *kept, facts.total(len(target.objects)))
    return Edit(scene, f"make the {m.bare} {color}", target, said_of, frozenset({o.cell}))


def _add(scene: Scene, layout: Layout) -> Edit | None:
    ((color, shape),) = layout.pairs(1)
    free = [c for c in layout.cells(layout.grid**2) if all(o.cell != c for o in scene.objects)]
    if len(scene.objects) >= MAX_OBJECTS or not free or not _free_pair(scene, color, shape):
        return None
    m = Mention(shape, color)
    target = replace(scene, objects=(*scene.objects, SceneObject(shape, color, *free[0])))
    kept = facts.bystander_facts(scene, None)
    said_of = (facts.exists(m), *kept, facts.total(len(target.objects)))
    return Edit(scene, f"add {m.phrase}", target, said_of, frozenset(free))  # the instruction does not say where


def _remove(scene: Scene, layout: Layout) -> Edit | None:
    reference = _reference(scene, layout)
    if reference is None:
        return None
    o, m = reference
    target = replace(scene, objects=tuple(p for p in scene.objects if p is not o))
    kept = facts.bystander_facts(scene, o)
    gone = facts.exists(m, present=False)
    said_of = (gone, *kept, facts.total(len(target.objects)))
    return Edit(scene, f"remove the {m.bare}", target, said_of, frozenset({o.cell}))


def _move(scene: Scene, layout: Layout) -> Edit | None:
    reference = _reference(scene, layout)
    if reference is None:
        return None
    o, m = reference
    edge, last = layout.rng.choice(EDGES), layout.grid - 1
    cell = {"left": (o.row, 0), "right": (o.row, last), "top": (0, o.col), "bottom": (last, o.col)}[edge]
    taken = {p.cell for p in scene.objects}
    if cell in taken:
        return None
    along = [(cell[0], k) if edge in ("top", "bottom") else (k, cell[1]) for k in range(layout.grid)]
    target = scene.with_object(o, replace(o, row=cell[0], col=cell[1]))
    kept = facts.bystander_facts(scene, o)
    moved = facts.edge(m, o, edge)
    said_of = (moved, *kept, facts.total(len(target.objects)))
    free = frozenset({o.cell, *along} - (taken - {o.cell}))  # any place at the edge is one
    return Edit(scene, f"move the {m.bare} to the {edge}", target, said_of, free)


def _replace(scene: Scene, layout: Layout) -> Edit | None:
    reference = _reference(scene, layout)
    shape = layout.rng.choice(SHAPES)
    if reference is None or not _free_pair(scene, reference[0].color, shape):
        return None
    o, m = reference
    target = scene.with_object(o, replace(o, shape=shape))
    changed = facts.exists(Mention(shape, o.color), cell=o.cell, kind="shape")
    kept = facts.bystander_facts(scene, o)
    text = f"replace the {m.bare} with {Mention(shape).phrase}"
    return Edit(scene, text, target, (changed, *kept, facts.total(len(target.objects))), frozenset({o.cell}))


_EDIT = {"recolor": _recolor, "add": _add, "remove": _remove, "move": _move, "replace": _replace}


def edit(category: str, layout: Layout) -> Edit:
    """A random edit whose source and target both belong to the layout's split (KeyError for another category).

    With held-out combinations asked for, the target shows one; the source never does unless the target does.
    """
    build = _EDIT[category]
    for _ in range(20000):
        source = _source(layout)
        if source.split() != layout.split or (source.held_out() and not layout.held_out):
            continue
        for _ in range(_ATTEMPTS):
            made = build(source, layout)
            if made is not None and layout.belongs(made.target):
                return made
    raise RuntimeError(f"no {category} edit in split {layout.split!r}")
