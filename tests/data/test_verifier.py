"""The verifier against the renderer: every category, wrong captions, noise, blur, smudges, unseen handwriting."""

from __future__ import annotations

import random
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lvrpo.data.scenes import (
    CATEGORIES,
    COLOR,
    COLORS,
    DIGITS,
    GROUNDS,
    SHAPES,
    Reading,
    Scene,
    SceneObject,
    ScenePrompts,
    ScenesConfig,
    SeenObject,
    Verifier,
    fact_results,
    holds,
    read,
    render,
    verify,
)
from lvrpo.data.scenes.objects import digit_indices, digit_samples, shape_masks
from lvrpo.types import Fact, TaskKind

IMAGES = 200
"""Images per category."""


def random_scene(rng: random.Random, digits: float, split: str = "test") -> Scene:
    cells = rng.sample(range(16), rng.randint(1, 5))
    objects = []
    for cell in cells:
        place = divmod(cell, 4)
        if rng.random() < digits:
            value = rng.randrange(10)
            sample = rng.choice(digit_indices(split)[value])
            objects.append(SceneObject(str(value), rng.choice(COLORS), *place, sample))
        else:
            objects.append(SceneObject(rng.choice(SHAPES), rng.choice(COLORS), *place))
    return Scene(rng.choice(GROUNDS), tuple(objects))


def as_read(scene: Scene) -> Reading:
    objects = tuple(SeenObject(o.shape, o.color, o.row, o.col) for o in scene.objects)
    return Reading(scene.ground, objects, (), (4, 4))


def same(scene: Scene, reading: Reading) -> bool:
    found = {(o.shape, o.color, o.row, o.col) for o in reading.objects}
    there = {(o.shape, o.color, o.row, o.col) for o in scene.objects}
    return reading.clean and reading.ground == scene.ground and found == there


def share_right(scenes: list[Scene], readings: list[Reading]) -> float:
    return sum(same(*pair) for pair in zip(scenes, readings, strict=True)) / len(scenes)


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    kernel = torch.exp(-(torch.arange(-3, 4.0) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum()
    weight = (kernel[:, None] * kernel)[None, None].repeat(3, 1, 1, 1)
    return functional.conv2d(functional.pad(images, (3, 3, 3, 3), mode="replicate"), weight, groups=3)


def targets(source: ScenePrompts, task: TaskKind, category: str, n: int) -> tuple[list[tuple[Fact, ...]], torch.Tensor]:
    cycle = source.category_cycles[task]
    rows = [source.example(task, cycle.index(category) + k * len(cycle)) for k in range(n)]
    images = [o for row in rows for o in row.outputs if isinstance(o, torch.Tensor)]
    return [row.prompt.facts for row in rows], torch.stack(images)


DRAWN = [(t, c) for t in ("generate", "edit") for c in CATEGORIES[t]] + [("reason", "draw_answer")]


@pytest.mark.parametrize(("task", "category"), DRAWN)
def test_right_images_pass_and_wrong_captions_fail(task: TaskKind, category: str) -> None:
    source = ScenePrompts(ScenesConfig(), "test")
    facts, images = targets(source, task, category, IMAGES)
    cycle = source.category_cycles[task]
    built = [source._build(task, cycle.index(category) + k * len(cycle))[1][-1] for k in range(IMAGES)]
    scenes = [s for s in built if isinstance(s, Scene)]
    readings = read(images)
    accepted = sum(verify(f, r) for f, r in zip(facts, readings, strict=True)) / IMAGES
    pairs = [(facts[(i + 17 * k) % IMAGES], i) for i in range(IMAGES) for k in range(1, 11)]
    wrong_pairs = [(f, i) for f, i in pairs if not verify(f, as_read(scenes[i]))]
    wrong, accepted_wrong = len(wrong_pairs), sum(verify(f, readings[i]) for f, i in wrong_pairs)
    print(f"{task}/{category}: {accepted:.4f} of right images pass, {accepted_wrong}/{wrong} wrong captions pass")
    assert accepted >= 0.995
    assert wrong > 1000
    assert accepted_wrong <= 0.005 * wrong


def test_reads_every_clean_scene_of_every_split() -> None:
    rng = random.Random(1)
    scenes = [random_scene(rng, 0.3, split) for split in ("train", "validation", "test") for _ in range(700)]
    images = torch.stack([render(s) for s in scenes])
    assert share_right(scenes, read(images)) >= 0.999


def test_degraded_images() -> None:
    rng = random.Random(2)
    scenes = [random_scene(rng, 0.3) for _ in range(600)]
    images = torch.stack([render(s) for s in scenes])
    floors = {("noise", 0.05): 0.99, ("noise", 0.10): 0.98, ("noise", 0.15): 0.88, ("noise", 0.20): 0.5}
    floors |= {("blur", 0.4): 0.99, ("blur", 0.5): 0.98, ("blur", 0.6): 0.93, ("blur", 0.7): 0.75}
    for (kind, amount), floor in floors.items():
        worse = images + amount * torch.randn_like(images) if kind == "noise" else blurred(images, amount)
        readings = read(worse)
        right = share_right(scenes, readings)
        truth = [{o.cell: (o.shape, o.color) for o in s.objects} for s in scenes]
        wrong = sum(
            t.get((o.row, o.col)) != (o.shape, o.color) for t, r in zip(truth, readings, strict=True) for o in r.objects
        )
        total = sum(len(s.objects) for s in scenes)
        print(f"{kind} {amount:.2f}: {right:.4f} of images fully right, {wrong / total:.4f} of objects misread")
        assert right >= floor
        assert wrong <= 0.025 * total


def test_unseen_handwriting_is_read_with_training_templates_alone() -> None:
    verifier = Verifier([i for row in digit_indices("train") for i in row])
    labels = digit_samples()[1]
    rng = random.Random(3)
    samples = [i for split in ("validation", "test") for row in digit_indices(split) for i in row]
    scenes = [Scene(rng.choice(GROUNDS), (SceneObject(str(labels[i]), rng.choice(COLORS), 1, 2, i),)) for i in samples]
    readings = verifier.read(torch.stack([render(s) for s in scenes]))
    right = share_right(scenes, readings)
    unread = sum(bool(r.unreadable) for r in readings) / len(scenes)
    print(f"held-out handwriting: {right:.4f} of {len(scenes)} right, {unread:.4f} unreadable")
    assert right >= 0.975


@pytest.mark.parametrize("kind", ["static", "half", "two_colors", "two_shapes", "pixel_noise", "blob"])
def test_smudges_are_neither_objects_nor_empty(kind: str) -> None:
    rng, n = random.Random(4), 200
    masks = {name: torch.from_numpy(mask.copy()) for name, mask in shape_masks().items()}
    images = []
    for _ in range(n):
        image = render(Scene(rng.choice(GROUNDS), ()))
        cell = image[:, 8:16, 8:16]
        first, second = (torch.tensor(COLOR[c])[:, None, None] for c in rng.sample(COLORS, 2))
        a, b = (masks[s] for s in rng.sample(SHAPES, 2))
        color = first.expand(3, 8, 8).clone()
        if kind == "two_colors":
            color[:, :, 4:] = second
        if kind == "static":
            alpha, color = torch.ones(8, 8), torch.rand(3, 8, 8)
        elif kind == "half":
            alpha = a.clone()
            alpha[:, 4:] = 0
        elif kind == "two_shapes":
            alpha = (a + b) / 2
        elif kind == "pixel_noise":
            alpha = (torch.rand(8, 8) > 0.5).float()
        elif kind == "blob":
            alpha = functional.interpolate(torch.rand(1, 1, 4, 4), (8, 8), mode="bilinear")[0, 0]
        else:
            alpha = a
        image[:, 8:16, 8:16] = cell + alpha * (color - cell)
        images.append(image)
    readings = read(torch.stack(images))
    objects = sum(bool(r.objects) for r in readings) / n
    empty = sum(r.clean and not r.objects for r in readings) / n
    print(f"{kind}: {objects:.3f} read as an object, {empty:.3f} as empty")
    assert empty == 0
    assert objects <= {"two_shapes": 0.4, "blob": 0.2, "two_colors": 0.05}.get(kind, 0.0)
    assert not any(holds({"type": "total", "count": len(r.objects)}, r) for r in readings if r.unreadable)


def test_garbage_images_are_not_clean() -> None:
    images = torch.stack(
        [
            torch.rand(3, 32, 32),
            torch.full((3, 32, 32), float("nan")),
            torch.tensor(COLOR["red"])[:, None, None] + torch.zeros(3, 32, 32),
        ]
    )
    assert not any(r.clean for r in read(images))
    assert read(images[:0]) == []
    with pytest.raises(ValueError, match="8 rows"):
        read(torch.zeros(1, 3, 30, 32))


def test_reading_does_not_depend_on_the_batch() -> None:
    rng = random.Random(5)
    images = torch.stack([render(random_scene(rng, 0.5)) for _ in range(40)]) + 0.1 * torch.randn(40, 3, 32, 32)
    together = read(images)
    alone = [read(image[None])[0] for image in images]
    for a, b in zip(together, alone, strict=True):
        assert [(o.shape, o.color, o.row, o.col) for o in a.objects] == [
            (o.shape, o.color, o.row, o.col) for o in b.objects
        ]
        assert (a.ground, a.unreadable) == (b.ground, b.unreadable)


def test_larger_images() -> None:
    scene = Scene("white", (SceneObject("star", "pink", 5, 6), SceneObject("circle", "blue", 0, 7)))
    reading = read(render(scene, 64)[None])[0]
    assert same(scene, reading)
    assert reading.grid == (8, 8)


def test_speed() -> None:
    rng = random.Random(6)
    scenes = [random_scene(rng, 0.3) for _ in range(500)]
    start = time.process_time()
    images = torch.stack([render(s) for s in scenes])
    rendered = time.process_time()
    read(images)
    done = time.process_time()
    print(f"render {(rendered - start) / 500 * 1e6:.0f} us, read {(done - rendered) / 500 * 1e3:.3f} ms per image")
    assert (done - rendered) / 500 < 5e-3


def _broken(scene: Scene, how: str, k: int, rng: random.Random) -> Scene:
    o = scene.objects[k]
    rest = tuple(p for p in scene.objects if p is not o)
    free = [divmod(c, 4) for c in range(16) if all(p.cell != divmod(c, 4) for p in scene.objects)]
    if how == "missing":
        return replace(scene, objects=rest)
    if how == "extra":
        return replace(scene, objects=(*scene.objects, SceneObject("cross", "red", *rng.choice(free))))
    if how == "shape":
        other = rng.choice([s for s in SHAPES if all(p.shape != s for p in scene.objects)])
        return replace(scene, objects=(*rest, SceneObject(other, o.color, o.row, o.col)))
    other = rng.choice([c for c in COLORS if all(p.color != c for p in scene.objects)])
    return replace(scene, objects=(*rest, replace(o, color=other)))


@pytest.mark.parametrize(("task", "category"), DRAWN)
def test_facts_hold_of_the_target_and_fail_of_corrupted_targets(task: TaskKind, category: str) -> None:
    source, rng = ScenePrompts(ScenesConfig(), "train", seed=3), random.Random(7)
    facts, images = targets(source, task, category, 60)
    corrupted, said = [], []
    for f, reading in zip(facts, read(images), strict=True):
        assert all(fact_results(f, reading))
        digit = {
            o.shape: next(i for i in digit_indices("train")[int(o.shape)]) for o in reading.objects if o.shape in DIGITS
        }
        seen = tuple(SceneObject(o.shape, o.color, o.row, o.col, digit.get(o.shape, -1)) for o in reading.objects)
        scene = Scene(reading.ground or "", seen)
        for how in ("missing", "extra", "shape"):
            corrupted.append(render(_broken(scene, how, rng.randrange(len(seen)), rng)))
            said.append((how, f))
        colored = {f.check.get("color") for f in f} | {o["color"] for x in f for o in x.check.get("objects", ())}
        if seen[0].color in colored:
            corrupted.append(render(_broken(scene, "color", 0, rng)))
            said.append(("color", f))
    passed = Counter(how for (how, f), r in zip(said, read(torch.stack(corrupted)), strict=True) if verify(f, r))
    assert not passed


CHECKS = [
    ({"type": "exists", "shape": "circle"}, True),
    ({"type": "exists", "shape": "circle", "color": "blue"}, False),
    ({"type": "exists", "shape": "cross", "present": False}, True),
    ({"type": "exists", "shape": "circle", "present": False}, False),
    ({"type": "exists", "shape": "circle", "color": "red", "row": 0, "col": 0}, True),
    ({"type": "exists", "shape": "circle", "color": "red", "row": 0, "col": 1}, False),
    ({"type": "count", "shape": "circle", "count": 2}, True),
    ({"type": "count", "shape": "circle", "color": "red", "count": 2}, False),
    ({"type": "color", "shape": "star", "color": "blue"}, True),
    ({"type": "color", "shape": "circle", "color": "red"}, False),
    ({"type": "color", "shape": "digit", "color": "pink"}, True),
    ({"type": "color", "shape": "square", "color": "red"}, False),
    ({"type": "relation", "a": {"shape": "star"}, "b": {"shape": "7"}, "relation": "above"}, True),
    ({"type": "relation", "a": {"shape": "star"}, "b": {"shape": "7"}, "relation": "left"}, False),
    ({"type": "edge", "shape": "star", "color": "blue", "edge": "right"}, True),
    ({"type": "edge", "shape": "star", "color": "blue", "edge": "top"}, False),
    ({"type": "total", "count": 4}, True),
    ({"type": "total", "count": 3}, False),
    (
        {"type": "unchanged", "ground": "white", "objects": [{"shape": "star", "color": "blue", "row": 1, "col": 3}]},
        True,
    ),
    (
        {"type": "unchanged", "ground": "black", "objects": [{"shape": "star", "color": "blue", "row": 1, "col": 3}]},
        False,
    ),
]


@pytest.mark.parametrize(("check", "truth"), CHECKS)
def test_checks_by_hand(check: dict[str, object], truth: bool) -> None:
    objects = (
        SceneObject("circle", "red", 0, 0),
        SceneObject("circle", "green", 2, 2),
        SceneObject("star", "blue", 1, 3),
        SceneObject("7", "pink", 3, 1, digit_indices("train")[7][0]),
    )
    assert holds(check, as_read(Scene("white", objects))) is truth
    assert holds(check, read(render(Scene("white", objects))[None])[0]) is truth


def test_unknown_check() -> None:
    with pytest.raises(ValueError, match="unknown type 'smell'"):
        holds({"type": "smell"}, as_read(Scene("white", ())))
