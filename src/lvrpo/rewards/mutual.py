"""Encoder-free reward for every kind of output: how much a text and a picture tell of each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lvrpo.data.scenes.grammar import DESCRIBE
from lvrpo.data.scenes.statements import Statement, statement
from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores
from lvrpo.rewards.drawn import problem_of
from lvrpo.rewards.gate import read_gate
from lvrpo.rewards.identity import judge_identity, judged_by
from lvrpo.rewards.logprobs import no_logprob
from lvrpo.rewards.options import Count, Share, Size
from lvrpo.rewards.own_vqa import BOTH_ORDERS, OwnVQA
from lvrpo.rewards.questions import UNTOLD, Splitter
from lvrpo.rewards.written import text_problem
from lvrpo.sampling import derive_seed
from lvrpo.types import Group, Image, Parts, Prompt, Trajectory

About = Literal["auto", "facts", "prompt"]
Cell = tuple[int, int]

DRAWS = 8
"""Of the drawing side, where neither the configuration nor a gate says how many."""
BLANK = 0.5
"""The level of the blank picture."""


@dataclass(frozen=True)
class Claim:
    """A text that the reading side is to find in a context, and the same context without what was drawn."""

    context: Parts
    blank: Parts
    text: str


class Mutual:
    """Pointwise mutual information of text c and picture x, estimated by the side of the model that did not make it.

        pmi(x; c) = log p(x, c) / (p(x) p(c)) = log p(c | x) - log p(c) = log p(x | c) - log p(x).

    One number, two estimates. A drawing is judged through the first form by the frozen reading side:

        r(x) = mean_k [ log p_read(c_k | x, q_k) - log p_read(c_k | blank, q_k) ],

    with c_k the answers to the prompt's questions q_k (``about: facts``) or the prompt itself as a caption
    (``about: prompt``; of an edit, the instruction given source and result against source and source; of a drawing that
    follows a thought, the thought given prompt and picture). ``about: auto`` takes the prompt itself for drawings from
    a description, which costs one pass instead of one per fact and ranks no worse, and facts for the others. A text is
    judged through the second form by the frozen drawing side:

        r(c) = log p_draw(x | claim(q, c)) - log p_draw(x | claim(q)),

    the claim being question and answer as a caption would put them ("a red circle" against "a circle"). An answer "no"
    gets minus the score of the claim it denies.

    What is approximate: log p_read is a mean per token (texts of any length weigh the same); p_read(c | blank) stands
    for the marginal p(c), a blank picture being one picture rather than their average; log p_draw is a bound, taken
    over part of the times and by ``draws`` samples (those of the gate, or 8; see ``Policy.image_logprob``), and the
    bound's gap does not cancel exactly; for "no", log (1 - p(c | x)) is replaced by a falling function of pmi. The
    subtracted terms are constant in a group but for yes-no answers; they make groups comparable and a blank picture
    exactly 0.

    All members of a group are judged under the same noise at the same times, a function of the group's own seed; the
    variance that is left goes into ``Scores.noise``. A text that is empty or was cut off has no score. Units: nats, per
    token for drawings, per picture for texts; single terms of a drawing are cut at +- ``cap``.

    What each side can tell is measured, not assumed: with a ``gate`` (``lvrpo audit --judge MODEL --gate FILE``) kinds
    of fact that the side cannot tell are left out, and prompts of which nothing is left do not get this reward.

    ``split``: a drawing's prompt that has no facts, and is not judged as a whole (``about: facts``, or a gate that
    closes whole prompts), is split into questions (``rewards.questions``; {} for its defaults); of an edit also into
    questions about what should stay.

    Neighbours: GvU (arXiv:2603.06043) rewards drawings by token probabilities without the marginal; SUDER trains on
    dual likelihoods.
    """

    judges = ("image",)
    sides = ("read", "draw")

    def __init__(
        self,
        about: About = "auto",
        draws: Count | None = None,
        times: tuple[Share, Share] | None = None,
        gate: str | None = None,
        instruction: str = DESCRIBE,
        lead_ins: Sequence[str] = ("draw ", "a picture of "),
        cap: Size = 5.0,
        split: Mapping[str, Any] | None = None,
    ) -> None:
        if about not in get_args(About):
            raise InputError(f"mutual.about={about!r}: unknown: use {', '.join(get_args(About))}")
        if draws is not None and (not isinstance(draws, int) or draws < 1):
            raise InputError(f"mutual.draws={draws!r}: must be a whole number >= 1")
        if times is not None and not (len(times) == 2 and 0 < times[0] < times[1] <= 1):
            raise InputError(f"mutual.times={times}: must be [low, high] with 0 < low < high <= 1")
        if not cap > 0:
            raise InputError(f"mutual.cap={cap}: must be > 0 (.inf for none)")
        if split is not None and about == "prompt":
            raise InputError("mutual.split: has no effect with about=prompt: leave one of the two out")
        self.about, self.cap = about, cap
        self.splitter = None if split is None else Splitter.read(split, "mutual.split")
        self.judged_by = judged_by(self.splitter)
        self.times = {} if times is None else {"times": (times[0], times[1])}
        self.gate = None if gate is None else read_gate(gate)
        self.draws = draws or (DRAWS if self.gate is None else self.gate.draws)
        self.instruction, self.lead_ins = instruction, tuple(lead_ins)
        self._blanks: dict[torch.Size, Image] = {}

    def applies(self, prompt: Prompt) -> bool:
        if "image" in prompt.output:
            return bool(self._facts(prompt)) or self._whole(prompt) or self._splits(prompt)
        kind = prompt.category or "answer"
        shown = any(not isinstance(part, str) for part in prompt.parts)
        return shown and bool(_words(prompt)) and (self.gate is None or self.gate.admits("draw", kind))

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        if self.gate is not None:
            self.gate.require(judge_identity(judge))
        shape = (len(groups), len(groups[0]))
        values, noise = torch.full(shape, math.nan), torch.full(shape, math.nan)
        failures: dict[Cell, str] = {}
        self._score_drawings(self._split(groups, judge, failures), judge, values, failures)
        self._score_texts(groups, judge, values, noise, failures)
        return Scores(values, failures, noise)

    # --- drawings, by the reading side ---

    def _splits(self, prompt: Prompt) -> bool:
        """Whether it takes questions of its own to judge a drawing of this prompt."""
        drawn = "image" in prompt.output and self.splitter is not None and self.splitter.applies(prompt)
        return drawn and not self._whole(prompt)

    def _split(self, groups: Sequence[Group], judge: Policy, failures: dict[Cell, str]) -> Sequence[Group]:
        """The groups with questions where they need some; cells of those that got none fail."""
        places = [p for p, group in enumerate(groups) if self._splits(group.prompt)]
        if self.splitter is None or not places:
            return groups
        reader = OwnVQA(choices=BOTH_ORDERS)
        found, missing = self.splitter.with_questions(
            [groups[p] for p in places], judge, lambda pairs: reader.confirm(pairs, judge)
        )
        out = list(groups)
        for i, p in enumerate(places):
            out[p] = found[i]
            if not self._facts(found[i].prompt):
                reason = missing.get(i, UNTOLD)
                failures |= {(p, g): reason for g in range(len(groups[p]))}
        return out

    def _facts(self, prompt: Prompt) -> list[tuple[str, str]]:
        """Questions with their answers, of the kinds that the reading side can tell."""
        if self.about == "prompt" or (self.about == "auto" and _is_caption(prompt) and self._admits(prompt)):
            return []
        known = [f for f in prompt.facts if self.gate is None or self.gate.admits("read", f.kind)]
        return [(fact.question, fact.answer) for fact in known]

    def _whole(self, prompt: Prompt) -> bool:
        """Whether the prompt itself is to be found in the picture."""
        if self.about == "facts" or not _words(prompt):
            return False
        return self._admits(prompt) and (self.about == "prompt" or _is_caption(prompt) or not prompt.facts)

    def _admits(self, prompt: Prompt) -> bool:
        """Whether the reading side can tell pictures apart by such a prompt as a whole."""
        kind = "thought" if "text" in prompt.output else "instruction" if prompt.task == "edit" else "prompt"
        return self.gate is None or self.gate.admits("read", kind)

    def _claims(self, trajectory: Trajectory, image: Image) -> list[Claim]:
        prompt = trajectory.prompt
        blank = self._blanks.setdefault(image.shape, torch.full_like(image, BLANK))
        facts = self._facts(prompt)
        if facts:
            return [Claim((image, question), (blank, question), answer) for question, answer in facts]
        words = _words(prompt)
        if "text" in prompt.output:
            return [Claim((image, words), (blank, words), trajectory.text or "")]
        sources = [part for part in prompt.parts if not isinstance(part, str)]
        if sources:
            return [Claim((*sources, image), (*sources, sources[-1]), words)]
        for lead_in in self.lead_ins:
            words = words.removeprefix(lead_in)
        return [Claim((image, self.instruction), (blank, self.instruction), words)]

    def _claims_problem(self, trajectory: Trajectory, claims: Sequence[Claim]) -> str | None:
        """Why these cannot be looked for in the picture: one is empty, or a thought that was cut off."""
        if not all(claim.text.strip() for claim in claims):
            return "the text to be found in the picture is empty"
        thought = "text" in trajectory.prompt.output and not self._facts(trajectory.prompt)
        return text_problem(trajectory) if thought else None

    def _score_drawings(
        self, groups: Sequence[Group], judge: Policy, values: torch.Tensor, failures: dict[Cell, str]
    ) -> None:
        claims: list[Claim] = []
        cells: list[Cell] = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories if "image" in group.prompt.output else ()):
                if (p, g) in failures:
                    continue
                image, problem = trajectory.image, problem_of(trajectory, judge)
                if image is None or problem:
                    failures[p, g] = str(problem)
                    continue
                found = self._claims(trajectory, image)
                if problem := self._claims_problem(trajectory, found):
                    failures[p, g] = problem
                    continue
                claims += found
                cells += [(p, g)] * len(found)
        if not claims:
            return
        blanks = {_key(claim.blank, claim.text): claim for claim in claims}  # one pass for all members
        contexts = [claim.context for claim in claims] + [claim.blank for claim in blanks.values()]
        texts = [claim.text for claim in claims] + [claim.text for claim in blanks.values()]
        logprobs = judge.text_logprob(contexts, texts).detach().cpu()
        marginal = dict(zip(blanks, logprobs[len(claims) :], strict=True))
        terms: dict[Cell, list[torch.Tensor]] = {}
        for cell, claim, logprob in zip(cells, claims, logprobs, strict=False):
            blank = marginal[_key(claim.blank, claim.text)]
            # the cap must not make a number of an infinite one
            if problem := no_logprob(float(logprob)) or no_logprob(float(blank)):
                failures[cell] = problem
            terms.setdefault(cell, []).append((logprob - blank).clamp(-self.cap, self.cap))
        for cell, found in terms.items():
            if cell not in failures:
                values[cell] = torch.stack(found).mean()

    # --- texts, by the drawing side ---

    def _score_texts(
        self,
        groups: Sequence[Group],
        judge: Policy,
        values: torch.Tensor,
        noise: torch.Tensor,
        failures: dict[Cell, str],
    ) -> None:
        rows: dict[tuple[int, str], int] = {}  # (group, text) -> row: what members share is judged once
        claims: dict[Cell, Statement] = {}
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(() if "image" in group.prompt.output else group.trajectories):
                if problem := text_problem(trajectory):
                    failures[p, g] = problem
                    continue
                answer = (trajectory.text or "").strip()
                question = _words(group.prompt)
                claims[p, g] = statement(question, answer) or Statement(f"{question} {answer}", question)
                for text in (claims[p, g].text, claims[p, g].known):
                    rows.setdefault((p, text), len(rows))
        if not claims:
            return
        contexts: list[Parts] = [(text,) if text else () for _, text in rows]
        images = [_picture(groups[p].prompt) for p, _ in rows]
        seeds = [derive_seed(groups[p].trajectories[0].seed, "mutual") for p, _ in rows]
        logprobs = judge.image_logprob(contexts, images, self.draws, seeds, **self.times).detach().cpu()
        scores: dict[Cell, torch.Tensor] = {}
        for (p, g), claim in claims.items():
            pmi = logprobs[rows[p, claim.text]] - logprobs[rows[p, claim.known]]  # (draws,)
            scores[p, g] = -pmi if claim.denied else pmi
            values[p, g] = scores[p, g].mean()
        for p in {p for p, _ in scores}:
            members = [g for q, g in scores if q == p]
            noise[p, members] = estimate_noise(torch.stack([scores[p, g] for g in members]))


def estimate_noise(draws: torch.Tensor) -> torch.Tensor:
    """Variance of the mean over draws, once what all members share is taken away.

    d_gk = r_gk - mean_g r_gk;  noise_g = var_k(d_gk) / K, unbiased; nan for a single draw.

    Shapes: (G, K) to (G,). Draws at different times are not alike, so that it is an upper bound. A member with a draw
    that is no number has nan, and no part in the mean.
    """
    noise = torch.full((len(draws),), math.nan)
    known = draws.isfinite().all(dim=1)
    if draws.shape[1] > 1 and known.any():
        own = draws[known]
        noise[known] = (own - own.mean(dim=0)).var(dim=1) / draws.shape[1]
    return noise


def _is_caption(prompt: Prompt) -> bool:
    """Whether the prompt says what the picture shows, so that a caption of the picture would say the same."""
    return prompt.task == "generate" and prompt.output == ("image",)


def _words(prompt: Prompt) -> str:
    return " ".join(part for part in prompt.parts if isinstance(part, str)).strip()


def _picture(prompt: Prompt) -> Image:
    return next(part for part in prompt.parts if not isinstance(part, str))


def _key(context: Parts, text: str) -> tuple[object, ...]:
    return (*(part if isinstance(part, str) else id(part) for part in context), text)
