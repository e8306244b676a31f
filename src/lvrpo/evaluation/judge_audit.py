"""What a judge can tell: AUC on minimal pairs, a right output and the same with a single fact corrupted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lvrpo.audit_records import JudgeAudit, JudgeScore
from lvrpo.data.scenes import edits, facts, grammar, reasoning
from lvrpo.data.scenes.grammar import NUMBER_WORDS, OPPOSITE, RELATIONS, Mention
from lvrpo.data.scenes.layout import Description, Layout
from lvrpo.data.scenes.objects import (
    CELL,
    COLORS,
    DEFAULT_SIZE,
    DIGITS,
    GROUNDS,
    MAX_OBJECTS,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    cells_mask,
    digit_indices,
    render,
)
from lvrpo.data.scenes.prompts import ScenePrompts, ScenesConfig
from lvrpo.data.scenes.verifier import fact_results, read
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import Reward, judge_fingerprint, offline_group
from lvrpo.rewards.row import RewardConfig, RewardSource
from lvrpo.statistics import mean_interval
from lvrpo.types import Fact, Group, OutputKind, Part, Prompt


@dataclass(frozen=True)
class JudgeCase:
    """One right output, member 0, and one that errs."""

    output: OutputKind
    """What is to be told apart: pictures, or texts."""
    kind: str
    """A kind of fact, a category of questions, or prompt, instruction, thought, caption."""
    error: str
    """What is wrong with member 1."""
    cluster: str
    """The scene: cases of one scene are no independent evidence."""
    group: Group


def judge_cases(
    per_category: int, split: Split = "validation", seed: int = 0, size: int = DEFAULT_SIZE
) -> list[JudgeCase]:
    """All cases of ``per_category`` scenes for every category of prompts; a pure function of its arguments."""
    world = _Cases(per_category, split, seed, size)
    return [*world.drawings(), *world.edits(), *world.thoughts(), *world.answers(), *world.captions()]


@dataclass(frozen=True)
class _Cases:
    n: int
    split: Split
    seed: int
    size: int

    def _layouts(self, what: str, categories: Sequence[str]) -> Iterator[tuple[str, str, Layout]]:
        for category in categories:
            for i in range(self.n):
                cluster = f"judge/{what}/{category}/{i}"
                rng = random.Random(f"{self.seed}/{self.split}/{cluster}")
                yield cluster, category, Layout(rng, self.split, self.size // CELL)

    def drawings(self) -> Iterator[JudgeCase]:
        """Pictures for a caption: one object changed, and whatever facts that breaks."""
        for cluster, category, layout in self._layouts("drawing", grammar.GENERATE):
            d = layout.describe(category)
            prompt = Prompt(cluster, "generate", (d.caption.text(),), ("image",))
            said = facts.of_caption(d.caption)
            yield from self._pictures(prompt, "prompt", said, d.scene, _changed(d.scene, layout))

    def edits(self) -> Iterator[JudgeCase]:
        """Results of an edit: the source as it was, and the right result with something else changed."""
        for cluster, category, layout in self._layouts("edit", grammar.EDIT):
            e = edits.edit(category, layout)
            changed = _changed(e.target, layout)
            wrong = {"left as it was": e.source}
            if changed:
                name = layout.rng.choice(list(changed))
                wrong["also changed"] = changed[name]
            parts, edited = (render(e.source, self.size), e.instruction), cells_mask(e.cells, self.size)
            prompt = Prompt(cluster, "edit", parts, ("image",), edited=edited)
            yield from self._pictures(prompt, "instruction", e.facts, e.target, wrong)

    def thoughts(self) -> Iterator[JudgeCase]:
        """A drawn digit that is, or is not, the one written before."""
        for cluster, category, layout in self._layouts("thought", ("draw_answer",)):
            r = reasoning.reason(category, layout)
            assert r.drawing is not None
            o = r.drawing.objects[0]
            wrong = _with(r.drawing, o, _another_digit(o, layout))
            prompt = Prompt(cluster, "reason", (r.text,), ("text", "image"))
            pictures = [(r.answer, render(scene, self.size)) for scene in (r.drawing, wrong)]
            yield JudgeCase("image", "thought", "digit", cluster, offline_group(prompt, pictures))

    def answers(self) -> Iterator[JudgeCase]:
        """Answers to questions: the right one and another of its kind."""
        source = ScenePrompts(ScenesConfig(size=self.size, questions_per_picture=1), self.split, self.seed)
        for i in range(self.n * len(grammar.UNDERSTAND)):
            prompt = source.prompt("understand", i)
            right, rng = str(prompt.answer), random.Random(f"judge/answer/{prompt.id}")
            others = next(kind for kind in ANSWERS if right in kind)
            wrong = rng.choice([answer for answer in others if answer != right])
            error = "denial" if right == "yes" else "assertion" if right == "no" else "another answer"
            group = offline_group(prompt, [(right,), (wrong,)])
            yield JudgeCase("text", prompt.category, error, prompt.id, group)

    def captions(self) -> Iterator[JudgeCase]:
        """Captions with one word, or one object, changed."""
        for cluster, category, layout in self._layouts("caption", grammar.GENERATE):
            d = layout.describe(category)
            image = render(d.scene, self.size)
            prompt = Prompt(cluster, "understand", (image, grammar.DESCRIBE), ("text",), None, (), "caption")
            right = d.caption.text()
            for error, wrong in _misdescribed(d, layout.rng).items():
                yield JudgeCase("text", "caption", error, cluster, offline_group(prompt, [(right,), (wrong,)]))

    def _pictures(
        self, prompt: Prompt, whole: str, said: Sequence[Fact], right: Scene, wrong: Mapping[str, Scene]
    ) -> Iterator[JudgeCase]:
        """The prompt as a whole, and by itself every fact that holds of the right picture only."""
        pictures = {name: render(scene, self.size) for name, scene in {"": right, **wrong}.items()}
        readings = dict(zip(pictures, read(list(pictures.values())), strict=True))
        for name in wrong:
            pair: list[tuple[Part, ...]] = [(pictures[""],), (pictures[name],)]
            holds, broken = (fact_results(said, readings[which]) for which in ("", name))
            lost = [fact for fact, before, after in zip(said, holds, broken, strict=True) if before and not after]
            if lost:
                yield JudgeCase("image", whole, name, prompt.id, offline_group(prompt, pair))
            for fact in lost:
                asked = replace(prompt, facts=(fact,))
                yield JudgeCase("image", fact.kind, name, prompt.id, offline_group(asked, pair))


ANSWERS = (
    COLORS,
    SHAPES,
    DIGITS,
    NUMBER_WORDS[1 : MAX_OBJECTS + 1],
    ("yes", "no"),
    RELATIONS,
    grammar.PLACES,
    GROUNDS,
)
"""The answers of each kind."""


# --- scenes with one thing changed ---


def _with(scene: Scene, old: SceneObject, new: SceneObject) -> Scene:
    return replace(scene, objects=tuple(new if o is old else o for o in scene.objects))


def _other(rng: random.Random, options: Sequence[str], value: str) -> str:
    return rng.choice([option for option in options if option != value])


def _another_digit(o: SceneObject, layout: Layout) -> SceneObject:
    value = int(_other(layout.rng, DIGITS, o.shape))
    return replace(o, shape=str(value), sample=layout.rng.choice(digit_indices(layout.split)[value]))


def _changed(scene: Scene, layout: Layout) -> dict[str, Scene]:
    """Whatever can be changed about one or two objects, by name."""
    rng, objects = layout.rng, scene.objects
    o = rng.choice(objects)
    changed = {"color": _with(scene, o, replace(o, color=_other(rng, COLORS, o.color)))}
    if o.is_digit:
        changed["digit"] = _with(scene, o, _another_digit(o, layout))
    else:
        changed["shape"] = _with(scene, o, replace(o, shape=_other(rng, SHAPES, o.shape)))
    several = len(objects) > 1
    if several:
        changed["missing"] = replace(scene, objects=tuple(p for p in objects if p is not o))
    free = [cell for cell in layout.cells(layout.grid**2) if all(p.cell != cell for p in objects)]
    if len(objects) < MAX_OBJECTS and free:
        alike = several and len({p.shape for p in objects}) == 1
        shape = o.shape if alike else _other(rng, SHAPES, o.shape)
        extra = SceneObject(shape, o.color if alike else rng.choice(COLORS), *free[0])
        changed["extra"] = replace(scene, objects=(*objects, extra))
    if len(objects) == 2:
        a, b = objects
        if a.color != b.color:
            changed["binding"] = replace(scene, objects=(replace(a, color=b.color), replace(b, color=a.color)))
        swapped = (replace(a, row=b.row, col=b.col), replace(b, row=a.row, col=a.col))
        changed["position"] = replace(scene, objects=swapped)
    return changed


# --- captions with one thing changed ---


def _misdescribed(d: Description, rng: random.Random) -> dict[str, str]:
    """Captions that err in one thing that the right one says, by name."""
    right = d.caption
    i = rng.randrange(len(right.mentions))
    m = right.mentions[i]

    def said(*mentions: Mention) -> str:
        return replace(right, mentions=mentions).text()

    def instead(new: Mention) -> str:
        return said(*(new if k == i else other for k, other in enumerate(right.mentions)))

    wrong = {"digit" if m.is_digit else "shape": instead(replace(m, shape=_another(d, m, rng)))}
    if m.color is not None:
        wrong["color"] = instead(replace(m, color=_other(rng, COLORS, m.color)))
    if m.count > 1:
        near = [n for n in (m.count - 1, m.count + 1) if 2 <= n <= MAX_OBJECTS]
        wrong["count"] = instead(replace(m, count=rng.choice(near)))
    if len(right.mentions) == 2 and right.relation is None:
        first, second = right.mentions
        wrong["missing"] = said(m)
        if first.color and second.color:
            wrong["binding"] = said(replace(first, color=second.color), replace(second, color=first.color))
    if len(right.mentions) == 1 and m.count == 1 and not m.is_digit and right.place is None:
        wrong["extra"] = said(m, Mention(_another(d, m, rng), rng.choice(COLORS)))
    if right.relation is not None:
        wrong["position"] = replace(right, relation=OPPOSITE[right.relation]).text()
    if right.place is not None:
        wrong["place"] = replace(right, place=_other(rng, grammar.PLACES, right.place)).text()
    if right.ground is not None:
        wrong["ground"] = replace(right, ground=_other(rng, GROUNDS, right.ground)).text()
    return wrong


def _another(d: Description, m: Mention, rng: random.Random) -> str:
    there = {o.shape for o in d.scene.objects}
    return rng.choice([shape for shape in (DIGITS if m.is_digit else SHAPES) if shape not in there])


AT_ONCE = 64
"""Pairs that a reward scores in one call."""
FROM_WORDS = {"questions": {"by": "grammar"}}

REWARDS = (
    RewardConfig(name="self_vqa", options=FROM_WORDS),
    RewardConfig(name="edit_consistency", options=FROM_WORDS),
    RewardConfig(name="caption_back"),
    RewardConfig(name="knowledge", tasks=("understand",)),
)
"""What is tried unless told otherwise; ``knowledge``: how likely the judge finds a text about a picture."""


def audit_judge(
    judge: Judge,
    cases: Sequence[JudgeCase],
    sources: Sequence[RewardSource],
    progress: Callable[[str, int], None] = lambda reward, pairs: None,
) -> JudgeAudit:
    """Scores every pair with every reward that applies to it."""
    rows: list[JudgeScore] = []
    milliseconds: dict[str, float] = {}
    for source in sources:
        name, tried = source.config.title, [case for case in cases if source.scores(case.group.prompt)]
        if not tried:
            continue
        progress(name, len(tried))
        started = time.perf_counter()
        ranked = _ranked(source.judge or judge, tried, source.reward)
        milliseconds[name] = 1000 * (time.perf_counter() - started) / (2 * len(tried))
        rows += _rows(name, tried, ranked)
    return JudgeAudit(judge_fingerprint(judge), tuple(rows), milliseconds)


def _ranked(judge: Judge, cases: Sequence[JudgeCase], reward: Reward) -> list[float]:
    """1 where the right output scores higher, .5 for a tie, 0 where lower, nan where one of the two failed."""
    ranked: list[float] = []
    for start in range(0, len(cases), AT_ONCE):
        scores = reward.score([case.group for case in cases[start : start + AT_ONCE]], judge)
        values = torch.as_tensor(scores.values, dtype=torch.float64).clone()
        for p, g in scores.failures:
            values[p, g] = torch.nan
        right, wrong = values[:, 0], values[:, 1]
        rank = torch.where(right == wrong, 0.5, (right > wrong).double())
        ranked += torch.where((right + wrong).isfinite(), rank, torch.nan).tolist()
    return ranked


def _rows(reward: str, cases: Sequence[JudgeCase], ranked: Sequence[float]) -> list[JudgeScore]:
    members: dict[tuple[OutputKind, str, str], list[int]] = {}
    for i, case in enumerate(cases):
        members.setdefault((case.output, case.kind, ""), []).append(i)
        members.setdefault((case.output, case.kind, case.error), []).append(i)
    rows = []
    for (output, kind, error), indices in members.items():
        known = [i for i in indices if not np.isnan(ranked[i])]
        auc = mean_interval([ranked[i] for i in known], [cases[i].cluster for i in known])
        rows.append(JudgeScore(reward, output, kind, error, auc, len(indices) - len(known)))
    return rows
