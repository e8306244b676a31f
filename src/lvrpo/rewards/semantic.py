"""The published semantic reward: how near a drawing is to its prompt in a space of embeddings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch.nn import functional

from lvrpo.errors import InputError
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores, Side, problem_of
from lvrpo.rewards.external import OWN, Embedded, SiglipTower, check_tower, folder_identity, once
from lvrpo.rewards.options import Count, Natural
from lvrpo.rewards.questions import words_of
from lvrpo.types import Group, Prompt

Form = Literal["dense", "global"]


class Semantic:
    """Cosine of picture and text (LVRPO, arXiv:2603.27693, the term r_sem). Range [-1, 1].

        global:  r = cos(picture, text)
        dense:   r = mean over words w of the mean of the ``top`` largest cos(w, patch_n)

    ``source``: "own", the frozen reading side of the policy, no encoder being added: states of picture and text, each
    read alone, after ``layer`` layers (0: what goes into the transformer), their mean for the global form. Or a local
    folder of a SigLIP or SigLIP 2 of ``transformers``, the published choice (``pip install 'lvrpo[external]'``).

    ``top``: 1 is the published maximum, which one patch can satisfy; a number above that of patches is all of them.
    A model that was never trained to match embeddings orders drawings only a little better than chance in this way
    (docs/rewards.md has the numbers): ``own_vqa`` asks the same reading side and hears much more.

    Of texts written about a picture this term is one number for the whole group: it does not apply to them and says so
    once. It does not apply to edits, whose instruction describes no picture.

    Differs from the paper: the own source; ``top`` above 1; the paper leaves open how patches and words enter the
    common space (here: see ``rewards.external``).
    """

    judges = ("image",)

    def __init__(
        self,
        form: Form = "dense",
        top: Count = 4,
        source: str = OWN,
        layer: Natural = 1,
        lead_ins: Sequence[str] = ("draw ", "a picture of "),
        device: str = "auto",
    ) -> None:
        if form not in get_args(Form):
            raise InputError(f"semantic.form={form!r}: unknown: use {', '.join(get_args(Form))}")
        if not isinstance(top, int) or isinstance(top, bool) or top < 1:
            raise InputError(f"semantic.top={top!r}: must be a whole number >= 1 (1: the maximum)")
        if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
            raise InputError(f"semantic.layer={layer!r}: must be a whole number >= 0")
        self.form, self.top, self.layer, self.lead_ins = form, top, layer, tuple(lead_ins)
        self.sides: tuple[Side, ...] = ("read",) if source == OWN else ()
        self.judged_by, self.tower = "", None
        if source != OWN:
            self.judged_by = folder_identity(check_tower(source))
            self.tower = once(lambda: SiglipTower(source, device))
        self._told = False

    def applies(self, prompt: Prompt) -> bool:
        if "image" in prompt.output:
            return prompt.task != "edit" and bool(words_of(prompt))
        if not self._told:
            self._told = True
            warnings.warn(
                f"semantic: of texts (task {prompt.task}) it is one number for the whole group, and masked: set tasks",
                stacklevel=2,
            )
        return False

    def score(self, groups: Sequence[Group], judge: Policy) -> Scores:
        values = torch.full((len(groups), len(groups[0])), math.nan)
        failures: dict[tuple[int, int], str] = {}
        cells = []
        for p, group in enumerate(groups):
            for g, trajectory in enumerate(group.trajectories):
                problem = problem_of(trajectory, judge if self.tower is None else None)
                if problem:
                    failures[p, g] = problem
                else:
                    cells.append((p, g, trajectory.image))
        if not cells:
            return Scores(values, failures)
        texts = [self._text(group.prompt) for group in groups]
        pictures = [image for _, _, image in cells if image is not None]
        if self.tower is None:
            states = [Embedded(s.mean(dim=0), s) for s in self._own([*texts, *pictures], judge)]
            of_text, of_picture = states[: len(texts)], states[len(texts) :]
        else:
            of_text, of_picture = self.tower().texts(texts), self.tower().images(pictures)
        for (p, g, _), picture in zip(cells, of_picture, strict=True):
            values[p, g] = self.of(of_text[p], picture)
        return Scores(values, failures)

    def of(self, text: Embedded, picture: Embedded) -> float:
        """The score of one picture."""
        if self.form == "global":
            return float(functional.cosine_similarity(text.whole, picture.whole, dim=0))
        similar = functional.normalize(text.parts, dim=-1) @ functional.normalize(picture.parts, dim=-1).T
        return float(similar.topk(min(self.top, similar.shape[1]), dim=1).values.mean())

    def _own(self, parts: Sequence[str | torch.Tensor], judge: Policy) -> list[torch.Tensor]:
        return [states.float().cpu() for states in judge.reading_states(parts, self.layer)]

    def _text(self, prompt: Prompt) -> str:
        words = words_of(prompt)
        for lead_in in self.lead_ins:
            words = words.removeprefix(lead_in)
        return words
