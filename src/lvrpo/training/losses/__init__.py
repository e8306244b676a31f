"""The losses, a file per method: ``text.kind``, ``flow.kind``, ``tokens.kind`` and ``masked.kind`` choose one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from lvrpo.config import default_kind
from lvrpo.training.losses.awm import AWM, AWMConfig
from lvrpo.training.losses.base import Objective
from lvrpo.training.losses.best_of import FlowBestOf, FlowBestOfConfig, TextBestOf, TextBestOfConfig
from lvrpo.training.losses.dpo import FlowDPO, FlowDPOConfig, TextDPO, TextDPOConfig
from lvrpo.training.losses.flow import FlowLossConfig, FlowObjective
from lvrpo.training.losses.flow_grpo import FlowGRPO, FlowGRPOConfig, MixGRPOConfig
from lvrpo.training.losses.grpo import GRPO, DAPOConfig, DrGRPOConfig, GRPOConfig
from lvrpo.training.losses.nft import NFT, NFTConfig
from lvrpo.training.losses.tokens import TokenObjective
from lvrpo.types import SegmentKind

if TYPE_CHECKING:
    from lvrpo.training.config import TrainConfig

TokenLoss = Annotated[
    GRPOConfig | DAPOConfig | DrGRPOConfig | TextDPOConfig | TextBestOfConfig,
    Field(discriminator="kind"),
    default_kind("grpo"),
]
"""Losses of text, image tokens and masked image tokens."""
FlowLoss = Annotated[
    NFTConfig | AWMConfig | FlowGRPOConfig | MixGRPOConfig | FlowDPOConfig | FlowBestOfConfig,
    Field(discriminator="kind"),
    default_kind("nft"),
]
"""Losses of flows."""

TOKEN_LOSSES: Mapping[str, type[TokenObjective]] = {
    "grpo": GRPO,
    "dapo": GRPO,
    "dr_grpo": GRPO,
    "gspo": GRPO,
    "cispo": GRPO,
    "dpo": TextDPO,
    "best_of": TextBestOf,
}
"""Objectives of text, image tokens and masked image tokens, by the ``kind`` of their sections."""

FLOW_LOSSES: Mapping[str, type[FlowObjective]] = {
    "nft": NFT,
    "awm": AWM,
    "flow_grpo": FlowGRPO,
    "mix_grpo": FlowGRPO,
    "dance_grpo": FlowGRPO,
    "dpo": FlowDPO,
    "best_of": FlowBestOf,
}
"""Objectives of flows, by ``flow.kind``."""


def objectives_of(config: TrainConfig, segment_kinds: Sequence[SegmentKind]) -> list[Objective]:
    """The objective of each kind of segment that the policy generates and whose weight is positive."""
    objectives: list[Objective] = [
        FLOW_LOSSES[section.kind](section)
        if isinstance(section, FlowLossConfig)
        else TOKEN_LOSSES[section.kind](section, config.rollout.max_new_tokens, kind)
        for kind, section in config.sections(segment_kinds).items()
    ]
    return [objective for objective in objectives if objective.weight]


def uses_old_policy(config: TrainConfig, segment_kinds: Sequence[SegmentKind]) -> bool:
    """Whether an objective samples with the old policy."""
    return any(objective.samples_with == "old" for objective in objectives_of(config, segment_kinds))
