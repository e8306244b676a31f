"""Audit of a judge: AUC on minimal pairs, a right output and the same with one fact corrupted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from lvrpo.audit_records import JudgeAudit, JudgeScore
from lvrpo.data.scenes import edits, facts, grammar, reasoning
from lvrpo.data.scenes.grammar import OPPOSITE, Mention
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
    cells_mask,
    digit_indices,
    render,
)
from lvrpo.data.scenes.prompts import ScenePrompts, ScenesConfig
from lvrpo.data.scenes.verifier import fact_results, read
from lvrpo.policies.base import Judge
from lvrpo.rewards.base import Reward, judge_fingerprint, offline_group
from lvrpo.rewards.config import ConfiguredReward, RewardConfig
from lvrpo.statistics import mean_interval
from lvrpo.types import Fact, Group, OutputKind, Part, Prompt


@dataclass(frozen=True)
class MinimalPair:
    """A group of two: the right output (member 0) and a corrupted one."""

    output: OutputKind
    """The modality of the two outputs."""
    kind: str
    """A kind of fact, a category of questions, or prompt, instruction, thought, caption."""
    error: str
    """The error of member 1."""
    cluster: str
    """The scene, the unit of the bootstrap."""
    group: Group


def minimal_pairs(per_category: int, seed: int = 0, size: int = DEFAULT_SIZE) -> list[MinimalPair]:
    """The pairs of ``per_category`` scenes for every category of prompts; deterministic."""
    builder = _PairBuilder(per_category, seed, size)
    return [*builder.drawings(), *builder.edits(), *builder.thoughts(), *builder.answers(), *builder.captions()]


@dataclass(frozen=True)
class _PairBuilder:
    n: int
    seed: int
    size: int

    def _layouts(self, what: str, categories: Sequence[str]) -> Iterator[tuple[str, str, Layout]]:
        for category in categories:
            for i in range(self.n):
                cluster = f"judge/{what}/{category}/{i}"
                rng = random.Random(f"{self.seed}/validation/{cluster}")
                yield cluster, category, Layout(rng, "validation", self.size // CELL)

    def drawings(self) -> Iterator[MinimalPair]:
        """Images for a caption: one object changed, and the facts that this breaks."""
        for cluster, category, layout in self._layouts("drawing", grammar.GENERATE):
            d = layout.describe(category)
            prompt = Prompt(cluster, "generate", (d.caption.text(),), ("image",))
            stated = facts.caption_facts(d.caption)
            yield from self._images(prompt, "prompt", stated, d.scene, _corrupted_scenes(d.scene, layout))

    def edits(self) -> Iterator[MinimalPair]:
        """Results of an edit: the unedited source, and the right result with a further change."""
        for cluster, category, layout in self._layouts("edit", grammar.EDIT):
            e = edits.edit(category, layout)
            changed = _corrupted_scenes(e.target, layout)
            wrong = {"left as it was": e.source}
            if changed:
                name = layout.rng.choice(list(changed))
                wrong["also changed"] = changed[name]
            parts, edited = (render(e.source, self.size), e.instruction), cells_mask(e.cells, self.size)
            prompt = Prompt(cluster, "edit", parts, ("image",), edited=edited)
            yield from self._images(prompt, "instruction", e.facts, e.target, wrong)

    def thoughts(self) -> Iterator[MinimalPair]:
        """A drawn digit that is, or is not, the one in the thought."""
        for cluster, category, layout in self._layouts("thought", ("draw_answer",)):
            r = reasoning.reason(category, layout)
            assert r.drawing is not None
            o = r.drawing.objects[0]
            wrong = r.drawing.with_object(o, _another_digit(o, layout))
            prompt = Prompt(cluster, "reason", (r.text,), ("text", "image"))
            images = [(r.answer, render(scene, self.size)) for scene in (r.drawing, wrong)]
            yield MinimalPair("image", "thought", "digit", cluster, offline_group(prompt, images))

    def answers(self) -> Iterator[MinimalPair]:
        """Answers to questions: the right one and a wrong one of the same kind."""
        source = ScenePrompts(ScenesConfig(size=self.size, questions_per_picture=1), "validation", self.seed)
        for i in range(self.n * len(grammar.UNDERSTAND)):
            prompt = source.prompt("understand", i)
            right, rng = str(prompt.answer), random.Random(f"judge/answer/{prompt.id}")
            others = next(kind for kind in grammar.ANSWERS if right in kind)
            wrong = rng.choice([answer for answer in others if answer != right])
            error = "denial" if right == "yes" else "assertion" if right == "no" else "another answer"
            group = offline_group(prompt, [(right,), (wrong,)])
            yield MinimalPair("text", prompt.category, error, prompt.id, group)

    def captions(self) -> Iterator[MinimalPair]:
        """Captions with one word, or one object, changed."""
        for cluster, category, layout in self._layouts("caption", grammar.GENERATE):
            d = layout.describe(category)
            image = render(d.scene, self.size)
            prompt = Prompt(cluster, "understand", (image, grammar.DESCRIBE), ("text",), None, (), "caption")
            right = d.caption.text()
            for error, wrong in _corrupted_captions(d, layout.rng).items():
                yield MinimalPair("text", "caption", error, cluster, offline_group(prompt, [(right,), (wrong,)]))

    def _images(
        self, prompt: Prompt, whole: str, stated: Sequence[Fact], right: Scene, wrong: Mapping[str, Scene]
    ) -> Iterator[MinimalPair]:
        """Pairs for the whole prompt, and for every single fact that only the right image satisfies."""
        images = {name: render(scene, self.size) for name, scene in {"": right, **wrong}.items()}
        readings = dict(zip(images, read(list(images.values())), strict=True))
        for name in wrong:
            pair: list[tuple[Part, ...]] = [(images[""],), (images[name],)]
            holds, broken = (fact_results(stated, readings[which]) for which in ("", name))
            lost = [fact for fact, before, after in zip(stated, holds, broken, strict=True) if before and not after]
            if lost:
                yield MinimalPair("image", whole, name, prompt.id, offline_group(prompt, pair))
            for fact in lost:
                single = replace(prompt, facts=(fact,))
                yield MinimalPair("image", fact.kind, name, prompt.id, offline_group(single, pair))


# --- scenes with one thing changed ---


def _another_digit(o: SceneObject, layout: Layout) -> SceneObject:
    value = int(grammar.other(layout.rng, DIGITS, o.shape))
    return replace(o, shape=str(value), sample=layout.rng.choice(digit_indices(layout.split)[value]))


def _corrupted_scenes(scene: Scene, layout: Layout) -> dict[str, Scene]:
    """The scene with one or two objects changed, by name of the error."""
    rng, objects = layout.rng, scene.objects
    o = rng.choice(objects)
    changed = {"color": scene.with_object(o, replace(o, color=grammar.other(rng, COLORS, o.color)))}
    if o.is_digit:
        changed["digit"] = scene.with_object(o, _another_digit(o, layout))
    else:
        changed["shape"] = scene.with_object(o, replace(o, shape=grammar.other(rng, SHAPES, o.shape)))
    several = len(objects) > 1
    if several:
        changed["missing"] = replace(scene, objects=tuple(p for p in objects if p is not o))
    free = [cell for cell in layout.cells(layout.grid**2) if all(p.cell != cell for p in objects)]
    if len(objects) < MAX_OBJECTS and free:
        alike = several and len({p.shape for p in objects}) == 1
        shape = o.shape if alike else grammar.other(rng, SHAPES, o.shape)
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


def _corrupted_captions(d: Description, rng: random.Random) -> dict[str, str]:
    """Captions with one statement changed, by name of the error."""
    right = d.caption
    i = rng.randrange(len(right.mentions))
    m = right.mentions[i]

    def stated(*mentions: Mention) -> str:
        return replace(right, mentions=mentions).text()

    def instead(new: Mention) -> str:
        return stated(*(new if k == i else other for k, other in enumerate(right.mentions)))

    wrong = {"digit" if m.is_digit else "shape": instead(replace(m, shape=_absent_shape(d, m, rng)))}
    if m.color is not None:
        wrong["color"] = instead(replace(m, color=grammar.other(rng, COLORS, m.color)))
    if m.count > 1:
        near = [n for n in (m.count - 1, m.count + 1) if 2 <= n <= MAX_OBJECTS]
        wrong["count"] = instead(replace(m, count=rng.choice(near)))
    if len(right.mentions) == 2 and right.relation is None:
        first, second = right.mentions
        wrong["missing"] = stated(m)
        if first.color and second.color:
            wrong["binding"] = stated(replace(first, color=second.color), replace(second, color=first.color))
    if len(right.mentions) == 1 and m.count == 1 and not m.is_digit and right.place is None:
        wrong["extra"] = stated(m, Mention(_absent_shape(d, m, rng), rng.choice(COLORS)))
    if right.relation is not None:
        wrong["position"] = replace(right, relation=OPPOSITE[right.relation]).text()
    if right.place is not None:
        wrong["place"] = replace(right, place=grammar.other(rng, grammar.PLACES, right.place)).text()
    if right.ground is not None:
        wrong["ground"] = replace(right, ground=grammar.other(rng, GROUNDS, right.ground)).text()
    return wrong


def _absent_shape(d: Description, m: Mention, rng: random.Random) -> str:
    there = {o.shape for o in d.scene.objects}
    return rng.choice([shape for shape in (DIGITS if m.is_digit else SHAPES) if shape not in there])


BATCH_SIZE = 64
"""Pairs per call of a reward."""
GRAMMAR_QUESTIONS = {"questions": {"by": "grammar"}}

REWARDS = (
    RewardConfig(name="self_vqa", options=GRAMMAR_QUESTIONS),
    RewardConfig(name="edit_consistency", options=GRAMMAR_QUESTIONS),
    RewardConfig(name="caption_back"),
    RewardConfig(name="knowledge", tasks=("understand",)),
)
"""The default rewards; ``knowledge`` is the judge's likelihood of a text about an image."""


def audit_judge(
    judge: Judge,
    pairs: Sequence[MinimalPair],
    sources: Sequence[ConfiguredReward],
    progress: Callable[[str, int], None] = lambda reward, pairs: None,
) -> JudgeAudit:
    """Scores every pair with every reward that applies to it."""
    rows: list[JudgeScore] = []
    milliseconds: dict[str, float] = {}
    for source in sources:
        name, scored_pairs = source.config.title, [pair for pair in pairs if source.scores(pair.group.prompt)]
        if not scored_pairs:
            continue
        progress(name, len(scored_pairs))
        started = time.perf_counter()
        ranked = _pair_ranks(source.judge or judge, scored_pairs, source.reward)
        milliseconds[name] = 1000 * (time.perf_counter() - started) / (2 * len(scored_pairs))
        rows += _rows(name, scored_pairs, ranked)
    return JudgeAudit(judge_fingerprint(judge), tuple(rows), milliseconds)


def _pair_ranks(judge: Judge, pairs: Sequence[MinimalPair], reward: Reward) -> list[float]:
    """1 where the right output scores higher, .5 for a tie, 0 where lower, nan where one of the two failed."""
    ranked: list[float] = []
    for start in range(0, len(pairs), BATCH_SIZE):
        scores = reward.score([pair.group for pair in pairs[start : start + BATCH_SIZE]], judge)
        values = torch.as_tensor(scores.values, dtype=torch.float64).clone()
        for p, g in scores.failures:
            values[p, g] = torch.nan
        right, wrong = values[:, 0], values[:, 1]
        rank = torch.where(right == wrong, 0.5, (right > wrong).double())
        ranked += torch.where((right + wrong).isfinite(), rank, torch.nan).tolist()
    return ranked


def _rows(reward: str, pairs: Sequence[MinimalPair], ranked: Sequence[float]) -> list[JudgeScore]:
    members: dict[tuple[OutputKind, str, str], list[int]] = {}
    for i, pair in enumerate(pairs):
        members.setdefault((pair.output, pair.kind, ""), []).append(i)
        members.setdefault((pair.output, pair.kind, pair.error), []).append(i)
    rows = []
    for (output, kind, error), indices in members.items():
        known = [i for i in indices if not np.isnan(ranked[i])]
        auc = mean_interval([ranked[i] for i in known], [pairs[i].cluster for i in known])
        rows.append(JudgeScore(reward, output, kind, error, auc, len(indices) - len(known)))
    return rows
