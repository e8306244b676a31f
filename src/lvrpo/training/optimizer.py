"""Optimizers of a policy: AdamW and Muon with per-expert learning rates, gradient clipping and a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import _foreach_copy_, _foreach_lerp_, _foreach_mul_, nn  # pyright: ignore[reportPrivateImportUsage]  # of torch.optim

from lvrpo.config import Config, NonNegative
from lvrpo.distributed import ShardedMuon, gradient_norms, local
from lvrpo.errors import InputError, optional_package
from lvrpo.policies.adapter import is_adapter
from lvrpo.policies.base import Policy

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of the quintic x <- a x + b x^3 + c x^5, torch's own: singular values end in about [0.7, 1.2]."""
ITERATIONS = 5


def orthogonalize(matrices: torch.Tensor, eps: float = 1e-7) -> torch.Tensor:
    """Newton-Schulz: roughly U V^T of each matrix U S V^T, in the dtype of the input.

        X <- X / |X|_F,  then 5 times  X <- a X + (b A + c A^2) X  with A = X X^T

    ``matrices`` (B, M, N) -> (B, M, N). Source: https://kellerjordan.github.io/posts/muon
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(ShardedMuon):
    """``torch.optim.Muon``, but with the Newton-Schulz iteration in float32 on a CPU.

    CPUs without bfloat16 instructions multiply bfloat16 some twenty times slower than float32. State, learning rates
    and defaults are torch's.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        """See ``torch.optim.Muon``. Any: torch's own types."""
        super().__init__(params, orthogonalize, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; parameters without a gradient are skipped. On a CPU the gradients are overwritten."""
        if any(p.device.type != "cpu" for group in self.param_groups for p in group["params"]):
            return torch.optim.Muon.step(self, closure)
        return super().step(closure)


Norms = dict[str, float]
"""Gradient norms by expert."""
Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """One learning rate per optimizer, one multiplier per expert."""

    hints: ClassVar[Mapping[str, str]] = {
        "lr": "Muon has a rate and AdamW another: set {section}.muon_lr and {section}.adamw_lr",
    }
    kind: Literal["adamw", "muon", "adamw_8bit"] = "muon"
    """muon: Muon on the transformer's matrices, AdamW on the rest and on LoRA matrices; adamw: AdamW on everything;
    adamw_8bit: AdamW with 8-bit moments (bitsandbytes, arXiv:2110.02861), which saves 6 bytes per trained parameter."""
    adamw_lr: float = Field(default=5e-4, gt=0)
    """Learning rate of parameters that AdamW steps; with kind muon, those that are no matrices of layers."""
    muon_lr: float = Field(default=5e-3, gt=0)
    """Learning rate of matrices of layers with kind muon."""
    expert_lr: dict[Literal["understand", "generate", "shared"], NonNegative] = Field(default_factory=dict)
    """Multipliers of the learning rates per expert; 1 where absent."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay rates of AdamW's moments."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Maximum gradient norm, clipped per expert, so that a spike of one does not shrink the step of the other."""
    warmup_steps: int = Field(default=5, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    decay_start: float = Field(default=0.4, ge=0, le=1)
    """Fraction of the run after which the learning rates decay linearly ..."""
    final_lr: float = Field(default=0.05, ge=0, le=1)
    """... to this fraction of the base rate at the end."""


class Optimizers:
    """The optimizers of all trainable parameters of a policy, stepped together."""

    def __init__(self, policy: Policy, config: OptimizerConfig, total_steps: int) -> None:
        """``policy``: outside ``whole_weights`` if sharded."""
        assert isinstance(policy, nn.Module)
        self.config = config
        self.total_steps = total_steps
        self.experts = policy.parameter_groups()
        self.named = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
        matrices = {
            id(p)
            for name, p in self.named
            if config.kind == "muon" and p.ndim == 2 and ".layers." in name and not is_adapter(name)
        }
        multipliers = {str(expert): value for expert, value in config.expert_lr.items()}
        self.optimizers: list[torch.optim.Optimizer] = []
        for muon in (True, False):
            lr = config.muon_lr if muon else config.adamw_lr
            groups = [
                {"params": chosen, "lr": lr * multipliers.get(expert, 1.0)}
                for expert, parameters in self.experts.items()
                if (chosen := [p for p in parameters if (id(p) in matrices) == muon])
            ]
            if not groups:
                continue
            if config.kind == "adamw_8bit":
                self.optimizers.append(
                    eight_bit_library().optim.AdamW8bit(
                        groups, lr=config.adamw_lr, betas=config.betas, weight_decay=config.weight_decay
                    )
                )
            elif muon:
                self.optimizers.append(Muon(groups, lr=config.muon_lr, weight_decay=config.weight_decay))
            else:
                self.optimizers.append(
                    torch.optim.AdamW(
                        groups, lr=config.adamw_lr, betas=config.betas, weight_decay=config.weight_decay, fused=True
                    )
                )
        self.base_rates = [[group["lr"] for group in o.param_groups] for o in self.optimizers]

    def rate(self, step: int) -> float:
        """The schedule: fraction of the base rate at a step, counted from 0."""
        config = self.config
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        start = config.decay_start * self.total_steps
        if step <= start:
            return warm
        fraction = min(1.0, (step - start) / max(1.0, self.total_steps - start))
        return warm * (1 + fraction * (config.final_lr - 1))

    def step(self, step: int, scale: float = 1.0) -> Norms:
        """Clips the gradients, steps and clears them; returns the gradient norm per expert before clipping. Collective.

        The step is skipped if a norm is not finite.
        """
        norms = gradient_norms(self.experts)
        for expert, norm in norms.items():
            factor = torch.clamp(self.config.clip_norm / (torch.tensor(norm) + 1e-6), max=1.0)
            _foreach_mul_([local(p.grad) for p in self.experts[expert] if p.grad is not None], factor)
        if all(norm == norm and norm < float("inf") for norm in norms.values()):
            rate = self.rate(step) * scale
            for optimizer, base in zip(self.optimizers, self.base_rates, strict=True):
                for group, lr in zip(optimizer.param_groups, base, strict=True):
                    group["lr"] = lr * rate
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return norms

    def moments(self) -> dict[str, dict[str, Any]]:
        """Optimizer state by parameter name: moments, sharded like the parameter, and step counts."""
        return optimizer_moments(self.optimizers, self.named)

    def set_moments(self, moments: Mapping[str, Mapping[str, Any]]) -> None:
        """Restores ``moments``; see ``set_optimizer_moments``."""
        set_optimizer_moments(self.optimizers, self.named, moments)

    @torch.no_grad()
    def allocate_moments(self, dtypes: Mapping[str, Mapping[str, torch.dtype]]) -> None:
        """Adds moments of zeros, shaped and sharded like their parameters, by the names of parameters and moments."""
        for optimizer in self.optimizers:
            params = {p for group in optimizer.param_groups for p in group["params"]}
            for name, p in self.named:
                if p in params and name in dtypes:
                    zeros = {key: torch.zeros_like(p, dtype=dtype) for key, dtype in dtypes[name].items()}
                    optimizer.state[p].update(zeros)


def optimizer_moments(
    optimizers: Sequence[torch.optim.Optimizer], named: Sequence[tuple[str, nn.Parameter]]
) -> dict[str, dict[str, Any]]:
    """The state of optimizers by the names of their parameters. Any: tensors and counts."""
    states = [optimizer.state for optimizer in optimizers]
    return {name: dict(state[p]) for name, p in named for state in states if p in state}


def set_optimizer_moments(
    optimizers: Sequence[torch.optim.Optimizer],
    named: Sequence[tuple[str, nn.Parameter]],
    moments: Mapping[str, Mapping[str, Any]],
) -> None:
    """Restores ``optimizer_moments`` on the devices of the parameters; the state of missing parameters is reset.

    Raises InputError for unknown parameters. Any: tensors and counts.
    """
    unknown = sorted(moments.keys() - {name for name, _ in named})
    if unknown:
        raise InputError(
            f"the checkpoint has moments of {unknown[0]}: resume with the configuration of the run and the version of "
            "lvrpo in its manifest.json"
        )
    for optimizer in optimizers:
        params = {p for group in optimizer.param_groups for p in group["params"]}
        optimizer.state.clear()
        for name, p in named:
            if p in params and name in moments:
                optimizer.state[p] = {key: _placed(value, p.device) for key, value in moments[name].items()}


def _placed(value: Any, device: torch.device) -> Any:
    """Any: a tensor, which is copied, or a count."""
    return value.detach().to(device, copy=True) if isinstance(value, torch.Tensor) else value


def eight_bit_library() -> Any:
    """bitsandbytes. Any: an optional package."""
    return optional_package("bitsandbytes", "optimizer.kind=adamw_8bit needs bitsandbytes", "eight-bit")


@torch.no_grad()
def update_ema(ema: nn.Module, policy: nn.Module, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * policy, parameter by parameter."""
    slow: list[torch.Tensor] = list(ema.parameters())
    fast: list[torch.Tensor] = list(policy.parameters())
    if decay == 0:
        _foreach_copy_(slow, fast)
    else:
        _foreach_lerp_(slow, fast, 1 - decay)
