"""Whether an output is right as a whole: what the benchmarks and validation count."""

from __future__ import annotations

from collections.abc import Sequence

from lvrpo.errors import ContractError, LvrpoError
from lvrpo.rewards.exact_answer import answers_rightly
from lvrpo.rewards.foreign import described
from lvrpo.rewards.scene_facts import fact_table
from lvrpo.types import Group, Prompt


def scorable(prompt: Prompt) -> bool:
    """Whether right and wrong can be told: a text with an answer, a drawing with facts that a verifier can check."""
    if "image" in prompt.output and not (prompt.facts and all(fact.check for fact in prompt.facts)):
        return False
    return "image" in prompt.output or prompt.answer is not None


def successes(groups: Sequence[Group]) -> list[list[float]]:
    """Per group and member 1.0 or 0.0: the text is the answer, where there is one, and all facts hold of the picture.

    A text that was cut off at the length limit is not the answer. Only for prompts that are ``scorable``. Raises
    ContractError where a world of one's own fails.
    """
    drawn = [group for group in groups if "image" in group.prompt.output]
    facts = iter(_fact_table(drawn))
    out = []
    for group in groups:
        row = []
        for trajectory in group.trajectories:
            right = True
            if trajectory.prompt.answer is not None and "text" in trajectory.prompt.output:
                right = answers_rightly(trajectory)
            if "image" in group.prompt.output:
                right = all(next(facts)) and right
            row.append(float(right))
        out.append(row)
    return out


def _fact_table(groups: Sequence[Group]) -> list[list[bool]]:
    try:
        return fact_table(groups) if groups else []
    except LvrpoError:
        raise
    except (Exception, SystemExit) as error:  # anybody's world may raise anything
        worlds = ", ".join(dict.fromkeys(group.prompt.world for group in groups))
        raise ContractError(f"world {worlds}: could not check a picture: {described(error)}: correct it") from error
