from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lvrpo.policies.tiny import TinyPolicy
from lvrpo.training.gradients import GradientsByTask
from lvrpo.training.losses.base import Metrics
from lvrpo.types import Prompt

ALL = [[1.0, -0.5, 0.25, -0.75], [0.5, -1.0, 1.5, -1.0], [2.0, 0.5, -1.0, -1.5]] * 2


def test_the_audit_changes_no_bit_of_the_gradient(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts, sampler="ode")
    plain = bench.gradient(groups, ALL, bench.config())
    audited = bench.config(gradient_audit={"every": 2})
    assert torch.equal(plain, bench.gradient(groups, ALL, audited, 0))
    again = bench.config()
    assert torch.equal(bench.gradient(groups, ALL, again, 1), bench.gradient(groups, ALL, audited, 1))


def test_the_audit_reports_every_expert_and_layer_on_its_steps(bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts, sampler="ode")
    config = bench.config(gradient_audit={"every": 2}, flow={"kl_coef": 0.1})
    found = {k: v for k, v in bench.update(groups, ALL, config, 0).items() if k.startswith("gradient/")}
    assert not any(k.startswith("gradient/") for k in bench.update(groups, ALL, config, 1))
    cosines = {k: v for k, v in found.items() if "/cosine/" in k}
    parts = {k.split("/", 3)[3] for k in cosines}
    assert {"all", "understand", "generate", "shared", "understand/layer_0", "generate/layer_1"} <= parts
    assert all(-1 <= v <= 1 for v in cosines.values())
    assert len({k.split("/")[2] for k in cosines}) == 6  # pairs of four tasks
    # of one task alone the norm is that of its gradient
    understand = bench.gradient([g for g in groups if g.prompt.task == "understand"], ALL[:2], config, 1)
    assert found["gradient/norm/understand/all"] == pytest.approx(float(understand.norm()), rel=1e-4)
    squares = [found[f"gradient/norm/understand/{part}"] ** 2 for part in ("understand", "generate", "shared")]
    assert found["gradient/norm/understand/all"] ** 2 == pytest.approx(sum(squares), rel=1e-5)
    assert found["gradient/norm/understand/generate"] == 0  # no answer needs the generation expert
    assert "gradient/cosine/understand+generate/generate" not in found


def two_tasks(
    policy: TinyPolicy, sign: float
) -> tuple[GradientsByTask, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random gradients of two tasks; the second is ``sign`` times the first plus noise."""
    generator = torch.Generator().manual_seed(0)
    one = {name: torch.randn(p.shape, generator=generator) for name, p in policy.named_parameters()}
    other = {name: sign * g + 0.5 * torch.randn(g.shape, generator=generator) for name, g in one.items()}
    apart = GradientsByTask(policy)
    for task, gradients in (("understand", one), ("generate", other)):
        for name, p in policy.named_parameters():
            p.grad = gradients[name].clone()
        apart.store(task)  # type: ignore[arg-type]  # the two are tasks
        assert all(p.grad is None for p in policy.parameters())
    return apart, one, other


def inner(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], names: list[str]) -> float:
    return sum(float((one[name] * other[name]).sum()) for name in names)


def by_expert(apart: GradientsByTask) -> dict[str, list[str]]:
    return {e: [n for n, own in apart.expert_of.items() if own == e] for e in ("understand", "generate", "shared")}


def given_back(apart: GradientsByTask, policy: TinyPolicy, mixing: Any) -> dict[str, torch.Tensor]:
    apart.write_mixed(mixing, 0)
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def test_projection_leaves_no_conflict_in_any_expert(lively_policy: Callable[..., TinyPolicy]) -> None:
    policy = lively_policy()
    apart, one, other = two_tasks(policy, -0.3)
    mixed = given_back(apart, policy, "pcgrad")
    for names in by_expert(apart).values():
        a, b = inner(one, one, names), inner(other, other, names)
        conflict = inner(one, other, names)
        assert conflict < 0
        for name in names:
            by_hand = (1 - conflict / a) * one[name] + (1 - conflict / b) * other[name]
            torch.testing.assert_close(mixed[name], by_hand, rtol=1e-4, atol=1e-5)
        assert inner(mixed, one, names) > 0
        assert inner(mixed, other, names) > 0


def test_projection_leaves_agreement_alone(lively_policy: Callable[..., TinyPolicy]) -> None:
    policy = lively_policy()
    apart, one, other = two_tasks(policy, 0.8)
    mixed = given_back(apart, policy, "pcgrad")
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, one[name] + other[name], rtol=1e-5, atol=1e-6)


def test_balance_gives_the_tasks_one_norm_in_every_expert(lively_policy: Callable[..., TinyPolicy]) -> None:
    policy = lively_policy()
    apart, one, other = two_tasks(policy, 3.0)
    mixed = given_back(apart, policy, "norm_balanced")
    for names in by_expert(apart).values():
        a, b = inner(one, one, names) ** 0.5, inner(other, other, names) ** 0.5
        m = (a + b) / 2
        for name in names:
            torch.testing.assert_close(mixed[name], m / a * one[name] + m / b * other[name], rtol=1e-4, atol=1e-5)


def test_cosines_by_hand(lively_policy: Callable[..., TinyPolicy]) -> None:
    policy = lively_policy()
    apart, one, other = two_tasks(policy, -0.3)
    metrics = Metrics()
    apart.report(metrics)
    found = metrics.means()
    for expert, names in by_expert(apart).items():
        by_hand = inner(one, other, names) / (inner(one, one, names) * inner(other, other, names)) ** 0.5
        assert found[f"gradient/cosine/understand+generate/{expert}"] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize("mixing", ["pcgrad", "norm_balanced"])
def test_an_update_mixes_as_configured(mixing: str, bench: Any, prompts: list[Prompt]) -> None:
    groups = bench.sample(prompts, sampler="ode")
    plain = bench.gradient(groups, ALL, bench.config())
    mixed = bench.gradient(groups, ALL, bench.config(gradient_mixing=mixing))
    assert mixed.isfinite().all()
    assert float((mixed - plain).norm()) > 1e-3 * float(plain.norm())
    assert torch.equal(mixed, bench.gradient(groups, ALL, bench.config(gradient_mixing=mixing)))
