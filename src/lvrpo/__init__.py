"""RL post-training of unified multimodal models by group-relative policy optimization.

The names below are imported when they are first used, so that ``import lvrpo`` is quick.
"""

import os
import sys

# `python -m lvrpo` puts the working directory before everything else: no file that happens to lie there is a module
# that we mean. It stays where lvrpo itself was found in it, and where PYTHONPATH names it.
if (
    sys.argv[:1] == ["-m"]  # which it is until the module is found
    and sys.orig_argv[-len(sys.argv)] in ("lvrpo", "-mlvrpo")
):
    try:
        _here = os.getcwd()
    except FileNotFoundError:  # it was deleted
        _here = ""
    if sys.path[:1] in ([""], [_here]) and _here != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
        del sys.path[0]

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_MODULES = {
    "lvrpo.api": ("Trained", "train"),
    "lvrpo.config": ("Config", "load_config"),
    "lvrpo.data.base": ("Task",),
    "lvrpo.errors": ("ContractError", "InputError", "LvrpoError"),
    "lvrpo.policies.base": ("Policy", "Sampling"),
    "lvrpo.policies.loading": ("load_policy",),
    "lvrpo.rewards.function": ("reward",),
    "lvrpo.training.config": ("TrainConfig",),
}
"""Where a name of ``__all__`` is from; all others are from ``lvrpo.types``."""

__all__ = [
    "Config",
    "ContractError",
    "Example",
    "Fact",
    "FlowSegment",
    "Group",
    "ImageTokenSegment",
    "InputError",
    "LvrpoError",
    "MaskedSegment",
    "MaskedTextSegment",
    "Policy",
    "Prompt",
    "RewardTable",
    "Sampling",
    "SegmentLogprobs",
    "Task",
    "TextSegment",
    "TrainConfig",
    "Trained",
    "Trajectory",
    "__version__",
    "load_config",
    "load_policy",
    "reward",
    "train",
]

if TYPE_CHECKING:
    from lvrpo.api import Trained, train
    from lvrpo.config import Config, load_config
    from lvrpo.data.base import Task
    from lvrpo.errors import ContractError, InputError, LvrpoError
    from lvrpo.policies.base import Policy, Sampling
    from lvrpo.policies.loading import load_policy
    from lvrpo.rewards.function import reward
    from lvrpo.training.config import TrainConfig
    from lvrpo.types import (
        Example,
        Fact,
        FlowSegment,
        Group,
        ImageTokenSegment,
        MaskedSegment,
        MaskedTextSegment,
        Prompt,
        RewardTable,
        SegmentLogprobs,
        TextSegment,
        Trajectory,
    )


def __getattr__(name: str) -> Any:  # Any: the type checker reads the imports above
    if name not in __all__:
        raise AttributeError(f"module 'lvrpo' has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "lvrpo.types")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
