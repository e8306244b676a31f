"""Which class trains each kind of segment: the tables of methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lvrpo.training.best_of import BestDrawing, BestText
from lvrpo.training.dpo import FlowDPO, TextDPO
from lvrpo.training.flow import AWM, NFT, FlowConfig, FlowGRPO, FlowObjective
from lvrpo.training.objective import Objective
from lvrpo.training.text import TextObjective, TokenObjective
from lvrpo.types import SegmentKind

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

TEXT_OBJECTIVES: Mapping[str, type[TextObjective]] = {
    "grpo": TokenObjective,
    "dapo": TokenObjective,
    "dr_grpo": TokenObjective,
    "gspo": TokenObjective,
    "cispo": TokenObjective,
    "dpo": TextDPO,
    "best_of": BestText,
}
"""What trains text, image tokens and masked ones, by the ``kind`` of their sections."""

FLOW_OBJECTIVES: Mapping[str, type[FlowObjective]] = {
    "nft": NFT,
    "awm": AWM,
    "flow_grpo": FlowGRPO,
    "mix_grpo": FlowGRPO,
    "dance_grpo": FlowGRPO,
    "dpo": FlowDPO,
    "best_of": BestDrawing,
}
"""What trains flows, by ``flow.kind``."""


def objectives_of(config: TrainConfig, writes: Sequence[SegmentKind]) -> list[Objective]:
    """How each kind of segment that the policy writes is trained; a kind of weight 0 is not."""
    objectives: list[Objective] = [
        FLOW_OBJECTIVES[section.kind](section)
        if isinstance(section, FlowConfig)
        else TEXT_OBJECTIVES[section.kind](section, config.rollout.max_new_tokens, kind)
        for kind, section in config.sections(writes).items()
    ]
    return [objective for objective in objectives if objective.weight]


def asks_for_old(config: TrainConfig, writes: Sequence[SegmentKind]) -> bool:
    """Whether an objective samples with the short average of the weights."""
    return any(objective.samples_with == "old" for objective in objectives_of(config, writes))
