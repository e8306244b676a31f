"""Compute of a run in floating-point operations of its models and in forward passes: budgets that no machine moves.

Counted is what the models do, forward and backward, whoever of them it is: the trained one, its averages, judge and
reference. What an optimizer does with gradients is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import FlopCounterMode

from lvrpo.policies.mot.transformer import Cache, MoT


@dataclass(frozen=True)
class Compute:
    """What was done."""

    flops: float = 0.0
    """Floating-point operations in matrix products, convolutions and attention; a multiply-add is two."""
    passes: float = 0.0
    """Sequences taken through the transformer; a token that is written after a kept context costs FLOPs alone."""

    def __add__(self, other: Compute) -> Compute:
        return Compute(self.flops + other.flops, self.passes + other.passes)

    def __sub__(self, other: Compute) -> Compute:
        return Compute(self.flops - other.flops, self.passes - other.passes)

    def __mul__(self, times: float) -> Compute:
        return Compute(self.flops * times, self.passes * times)

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return {"flops": self.flops, "passes": self.passes}


NO_COMPUTE = Compute()


def attention_flops(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    """Of attention over queries (B, H, L, E), keys (B, K, S, E) and values (B, K, S, F): 2 B H L S (E + F).

    Shapes, as ``FlopCounterMode`` gives them; masked scores count, as they are computed.
    """
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    """Of its backward pass: scores again, and the gradients of scores, values, queries and keys.

    2 B H L S (3 E + 2 F): five products where the forward pass has two.
    """
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


_ATEN = torch.ops.aten
ATTENTION = {
    **dict.fromkeys(
        (
            _ATEN._scaled_dot_product_flash_attention_for_cpu,
            _ATEN._scaled_dot_product_flash_attention,
            _ATEN._scaled_dot_product_efficient_attention,
            _ATEN._scaled_dot_product_cudnn_attention,
        ),
        attention_flops,
    ),
    **dict.fromkeys(
        (
            _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
            _ATEN._scaled_dot_product_flash_attention_backward,
            _ATEN._scaled_dot_product_efficient_attention_backward,
            _ATEN._scaled_dot_product_cudnn_attention_backward,
        ),
        attention_backward_flops,
    ),
}
"""torch counts neither the CPU's kernel nor heads that share keys."""


class ComputeCounter:
    """While the context lasts, whatever models do is counted; ``now`` says how much it is."""

    def __init__(self) -> None:
        self._flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
        self._passes = 0
        self._left_out = 0
        self._before_step = 0
        self._hooks: list[Any] = []  # handles of torch, of several private classes

    @property
    def now(self) -> Compute:
        """Since the context was entered."""
        return Compute(self._flops.get_total_flops() - self._left_out, self._passes)

    def __enter__(self) -> Self:
        self._hooks = [
            register_module_forward_pre_hook(self._count_pass),
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]
        self._flops.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flops.__exit__(kind, error, trace)
        for hook in self._hooks:
            hook.remove()

    def _count_pass(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, MoT):
            cache = next(each for each in arguments if isinstance(each, Cache))
            self._passes += len(cache.rope)

    def _begin_step(self, *_: object) -> None:
        self._before_step = self._flops.get_total_flops()

    def _end_step(self, *_: object) -> None:
        self._left_out += self._flops.get_total_flops() - self._before_step


__all__ = ["ATTENTION", "NO_COMPUTE", "Compute", "ComputeCounter", "attention_backward_flops", "attention_flops"]
