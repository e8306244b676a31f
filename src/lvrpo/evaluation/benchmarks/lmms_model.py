"""The model ``lvrpo`` of lmms-eval 0.7; imported inside its environment alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult  # type: ignore[reportMissingImports]  # its own environment
from lmms_eval.api.model import lmms  # type: ignore[reportMissingImports]  # its own environment

from lvrpo.evaluation.benchmarks.lmms import Answers, Options
from lvrpo.policies.loading import load_policy

NUMBERS = {
    **dict.fromkeys(("seed", "num_steps", "max_new_tokens"), int),
    **dict.fromkeys(("guidance_scale", "image_guidance_scale", "temperature"), float),
}


class Lvrpo(Answers, lmms):
    """``--model lvrpo --model_args pretrained=MODEL[,mode=generate][,think=True][,base=MODEL] ...``"""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        base: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        mode: Any = "understand",
        think: bool = False,
        output_dir: str = "lmms_images",
        answers: str | None = None,
        max_batch_size: int | None = None,
        **numbers: Any,
    ) -> None:
        """Raises InputError for a model that cannot be loaded, and TypeError for an unknown argument.

        ``numbers``: seed, num_steps, guidance_scale, image_guidance_scale, max_new_tokens, temperature.
        ``answers``: see ``Options``. Any: lmms-eval's arguments.
        """
        lmms.__init__(self)
        if unknown := sorted(set(numbers) - set(NUMBERS)):
            raise TypeError(
                f"{unknown[0]}: unknown: there are pretrained, base, dtype, mode, think, {', '.join(NUMBERS)}"
            )
        values = {name: NUMBERS[name](value) for name, value in numbers.items()}
        values["answers"] = None if answers is None else Path(answers)
        options = Options(mode, think in (True, "True"), Path(output_dir), int(batch_size), **values)
        self._rank, self._world_size = (int(os.environ.get(name, default)) for name, default in RANKS)
        if self._world_size > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator()
            device = str(self.accelerator.device)
        Answers.__init__(self, load_policy(pretrained, device or "auto", dtype, base), options)

    def loglikelihood(self, requests: Any) -> Any:
        """As ``Answers.loglikelihood``."""
        # 0.7.3 turns every other pair than (text, counts) into a text, which tasks of multiple choice cannot read
        return [GenerationResult(pair) for pair in Answers.loglikelihood(self, requests)]


RANKS = (("RANK", "0"), ("WORLD_SIZE", "1"))
