"""A run directory with invented numbers, for the tests of the report only."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from lvrpo.report import Tile, image_grid

COLORS = {"red": (214, 54, 46), "blue": (46, 92, 214), "green": (40, 150, 70), "yellow": (236, 190, 40)}
CATEGORIES = {
    "generate": ["single_object", "two_object", "counting", "colors", "position", "color_attr", "digits"],
    "understand": ["color", "count", "shape", "exists", "position", "digit"],
    "edit": ["recolor", "add", "remove", "move"],
    "reason": ["sum", "compare", "draw_answer"],
}
BEFORE = {
    "generate": 0.24,
    "generate_guided": 0.38,
    "understand": 0.71,
    "understand_sampled": 0.55,
    "edit": 0.33,
    "reason": 0.42,
}
AFTER = {
    "generate": 0.5237,
    "generate_guided": 0.61,
    "understand": 0.722,
    "understand_sampled": 0.66,
    "edit": 0.41,
    "reason": 0.36,
}
CONTINUED = {
    "generate": 0.31,
    "generate_guided": 0.42,
    "understand": 0.715,
    "understand_sampled": 0.57,
    "edit": 0.35,
    "reason": 0.43,
}


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Call it with a folder to be made: it becomes a finished run."""
    return write_run


def write_run(folder: Path, steps: int = 60, seed: int = 7) -> Path:
    """Everything that a finished run leaves behind."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    config = "# resolved\nrun:\n  seed: 0\npolicy:\n  name: tiny\nsampling:\n  num_steps: 10\n  guidance_scale: 1.0\n"
    (folder / "config.yaml").write_text(config + "objective:\n  clip_low: 0.2\n" * 6, encoding="utf-8")
    write_json(folder / "manifest.json", manifest())
    write_json(folder / "contract.json", contract())
    lines = [json.dumps(metrics_row(step, steps, rng)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "summary.json", summary(rng))
    for phase, quality in (("before", 0.35), ("step_000030", 0.6), ("after", 0.75)):
        cases = [case(folder, phase, i, task, category, quality) for i, (task, category) in enumerate(kinds(2))]
        write_json(folder / "eval" / f"{phase}.json", {"prompts": cases})
    for step in (10, 20, 30):
        grid = folder / "samples" / f"step_{step:06d}" / "grid.png"
        grid.parent.mkdir(parents=True)
        captions = ["two red circles left of a blue star", "a large handwritten 7 under three small yellow squares"]
        rows = [(c, [Tile(draw_scene(rng, 2), f"facts {k / 8:.2f}", k > 4) for k in range(8)]) for c in captions]
        image_grid(rows).save(grid)
        (grid.parent / "groups.jsonl").write_text('{"id": "train-1", "members": [{"image": null}]}\n', encoding="utf-8")
    return folder


def kinds(each: int) -> list[tuple[str, str]]:
    return [(task, category) for task, names in CATEGORIES.items() for category in names for _ in range(each)]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def manifest() -> dict[str, Any]:
    return {
        "command": "lvrpo quickstart --seed 0 --out runs/example",
        "policy": "tiny-base",
        "seeds": {"run": 0, "data": 1},
        "versions": {"lvrpo": "0.1.0", "torch": "2.6.0", "python": "3.11.9"},
        "hardware": {"processor": "example CPU", "cores": 2, "memory_gib": 24, "device": "cpu"},
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "fingerprints": {
            "config_sha256": "ab" * 32,
            "data_sha256": "cd" * 32,
            "files": ["policy.safetensors", "state.json"],
        },
    }


def contract() -> list[dict[str, Any]]:
    return [
        {"check": "replay, text", "value": 0.0, "limit": 1e-6, "ok": True, "detail": "own batch; 64 tokens"},
        {"check": "replay, flow", "value": 2.4e-7, "limit": 1e-6, "ok": True, "detail": "other batch compositions"},
        {"check": "ratio at step 0", "value": 1.0, "limit": 1e-6, "ok": True, "detail": "largest distance from 1 is 0"},
        {
            "check": "gradient reaches every expert",
            "value": 3,
            "limit": None,
            "ok": True,
            "detail": "understand, generate, shared",
        },
    ]


def metrics_row(step: int, steps: int, rng: random.Random) -> dict[str, Any]:
    t = step / steps
    drift = 0.05 * math.sin(step / 6)
    row: dict[str, Any] = {"step": step, "seconds": 8.0 * step, "seconds_left": 8.0 * (steps - step)}
    gains = {"generate/facts": (0.42, 0.28), "generate/all_facts": (0.24, 0.26), "understand/exact": (0.55, 0.1)}
    for key, (start, gain) in (gains | {"edit/facts": (0.33, 0.09), "reason/exact": (0.42, -0.05)}).items():
        row[f"control/{key}"] = start + drift + rng.gauss(0, 0.03)
        row[f"reward/{key}"] = row[f"control/{key}"] + gain * (1 - math.exp(-3 * t)) + rng.gauss(0, 0.025)
    for name, scale in (("loss/flow", 0.04), ("loss/text", 0.3), ("kl/flow", 2e-5), ("kl/text", 0.004)):
        row[name] = scale * (1 + 0.3 * t + rng.gauss(0, 0.15))
    for name in ("grad_norm/understand", "grad_norm/generate", "entropy/text", "distance/old"):
        row[name] = 1.5 - 0.6 * t + rng.gauss(0, 0.1)
    row |= {"signal/generate": 0.8 - 0.2 * t, "ratio/mean": 1 + rng.gauss(0, 0.002), "clip_fraction": 0.02 * t}
    if step % 10 == 0:
        row |= {f"validation/{task}": AFTER[task] - 0.2 * (1 - t) + rng.gauss(0, 0.02) for task in CATEGORIES}
        row["validation/action"] = "rolled back" if step == 40 else "kept best" if step in (20, 30, 60) else "no change"
    return row


def summary(rng: random.Random) -> dict[str, Any]:
    before, after, continued = (scores(table, rng) for table in (BEFORE, AFTER, CONTINUED))
    return {
        "before": before,
        "after": after,
        "difference": {t: difference(before[t], after[t]) for t in before},
        "baseline": {
            "name": "continued pretraining",
            "after": continued,
            "difference": {t: difference(before[t], continued[t]) for t in before},
        },
        "validation": {"best_step": 60, "rolled_back": 1},
        "seconds": 492.4,
        "peak_memory_gib": 1.37,
        "seed": 0,
        "config_sha256": "ab" * 32,
    }


def scores(table: dict[str, float], rng: random.Random) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for task, value in table.items():
        names = CATEGORIES[task.split("_")[0]]
        inside = {name: spread(min(0.98, max(0.02, value + rng.gauss(0, 0.15))), 0.07, 100) for name in names}
        made[task] = {**spread(value, 0.033, 100 * len(names)), "categories": inside}
    return made


def spread(value: float, half: float, n: int) -> dict[str, Any]:
    return {"score": value, "low": max(0.0, value - half), "high": min(1.0, value + half), "n": n}


def difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    value = after["score"] - before["score"]
    made: dict[str, Any] = {"score": value, "low": value - 0.031, "high": value + 0.031}
    if "categories" in before:
        made["categories"] = {
            k: difference(before["categories"][k], after["categories"][k]) for k in before["categories"]
        }
    return made


def case(folder: Path, phase: str, index: int, task: str, category: str, quality: float) -> dict[str, Any]:
    """One kept case; what is asked depends on the index only, what comes out on the phase too."""
    asked, made = random.Random(index), random.Random(f"{phase} {index}")
    color, other = asked.sample(list(COLORS), 2)
    count = asked.randint(1, 4)
    draws = task in ("generate", "edit") or category == "draw_answer"
    facts = (
        [(f"how many {color} circles are there?", str(count)), (f"is there a {other} square?", "yes")] if draws else []
    )
    held = [{"question": q, "answer": a, "holds": made.random() < quality} for q, a in facts]
    right = all(f["holds"] for f in held) if held else made.random() < quality
    texts = {
        "generate": f"{count} {color} circles above a {other} square",
        "edit": f"make the {color} circle {other} and change nothing else",
        "understand": f"what color is the circle left of the {other} square?",
        "reason": "what is the sum of the two digits?" if not draws else f"draw the answer of {count} + 3",
    }
    answer = None if task in ("generate", "edit") else str(count + 3) if task == "reason" else color
    image = source = None
    if draws:
        image = f"eval/{phase}/{index:05d}.png"
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        draw_scene(made if not right else asked, count).save(folder / image)
    if task in ("understand", "edit") or category in ("sum", "compare"):
        source = f"eval/sources/{index:05d}.png"
        (folder / source).parent.mkdir(parents=True, exist_ok=True)
        draw_scene(asked, count).save(folder / source)
    output = (answer if right else "a wrong answer") if answer else None
    score = sum(f["holds"] for f in held) / len(held) if held else float(right)
    return {
        "id": f"{task}-{index}",
        "task": task,
        "category": category,
        "text": texts[task],
        "answer": answer,
        "output_text": output,
        "score": score,
        "image": image,
        "source_image": source,
        "facts": held,
    }


def draw_scene(rng: random.Random, count: int) -> Image.Image:
    image = Image.new("RGB", (32, 32), (238, 236, 230))
    draw = ImageDraw.Draw(image)
    for i in range(count + 1):
        x, y = rng.randint(2, 22), rng.randint(2, 22)
        color = COLORS[rng.choice(list(COLORS))]
        (draw.rectangle if i == count else draw.ellipse)((x, y, x + 7, y + 7), fill=color)
    return image


if __name__ == "__main__":
    import sys

    print(write_run(Path(sys.argv[1])))
