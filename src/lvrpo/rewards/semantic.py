"""The published semantic reward: how near a drawing is to its prompt in a space of embeddings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn import functional

from lvrpo.config import Config, Natural
from lvrpo.policies.base import Policy
from lvrpo.rewards.base import Scores, Side, problem_of
from lvrpo.rewards.external import OWN, Embedded, SiglipTower, TowerSource, folder_identity
from lvrpo.rewards.questions import words_of
from lvrpo.types import Group, Prompt


class Semantic(Config):
    """Cosine of picture and text (LVRPO, arXiv:2603.27693, the term r_sem). Range [-1, 1].

        global:  r = cos(picture, text)
        dense:   r = mean over words w of the mean of the ``top`` largest cos(w, patch_n)

    A model that was never trained to match embeddings orders drawings only a little better than chance in this way
    (docs/reference/rewards.md has the numbers): ``own_vqa`` asks the same reading side and hears much more.

    Of texts written about a picture this term is one number for the whole group: it does not apply to them and says so
    once. It does not apply to edits, whose instruction describes no picture.

    Differs from the paper: the own source; ``top`` above 1; the paper leaves open how patches and words enter the
    common space (here: see ``rewards.external``).
    """

    judges: ClassVar = ("image",)

    form: Literal["dense", "global"] = "dense"
    top: int = Field(default=4, ge=1, le=100_000)
    """1 is the published maximum, which one patch can satisfy; a number above that of patches is all of them."""
    source: TowerSource = OWN
    """"own": the frozen reading side of the policy, no encoder being added: states of picture and text, each read
    alone, their mean for the global form. Or a local folder of a SigLIP or SigLIP 2 of ``transformers``, the published
    choice (``pip install 'lvrpo[external]'``)."""
    layer: Natural = 1
    """Layers of the policy after which its states are taken; 0: what goes into the transformer."""
    lead_ins: tuple[str, ...] = ("draw ", "a picture of ")
    """Beginnings that are no part of what a prompt describes."""
    device: str = "auto"
    """Where the model of ``source`` runs."""
    _warned: bool = False

    @property
    def sides(self) -> tuple[Side, ...]:
        return ("read",) if self.source == OWN else ()

    @cached_property
    def judged_by(self) -> str:
        return "" if self.source == OWN else folder_identity(Path(self.source))

    @cached_property
    def _tower(self) -> SiglipTower | None:
        """None: the judge embeds. Loaded when it is first asked."""
        return None if self.source == OWN else SiglipTower(self.source, self.device)

    def applies(self, prompt: Prompt) -> bool:
        if "image" in prompt.output:
            return prompt.task != "edit" and bool(words_of(prompt))
        if not self._warned:
            self._warned = True
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
                problem = problem_of(trajectory, judge if self.source == OWN else None)
                if problem:
                    failures[p, g] = problem
                else:
                    cells.append((p, g, trajectory.image))
        if not cells:
            return Scores(values, failures)
        texts = [self._text(group.prompt) for group in groups]
        pictures = [image for _, _, image in cells if image is not None]
        if self._tower is None:
            states = [Embedded(s.mean(dim=0), s) for s in self._own([*texts, *pictures], judge)]
            of_text, of_picture = states[: len(texts)], states[len(texts) :]
        else:
            of_text, of_picture = self._tower.texts(texts), self._tower.images(pictures)
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
