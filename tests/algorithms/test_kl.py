from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lvrpo.algorithms import corrected_k3, gaussian_kl, k1, k2, k3, kl, velocity_regularizer
from lvrpo.errors import InputError
from lvrpo.sampling import step_logprob


@pytest.mark.parametrize(("estimator", "expected"), [(k1, 0.5), (k2, 0.125), (k3, 0.1065307)])
def test_estimators_by_hand(estimator, expected: float) -> None:
    value = estimator(torch.tensor([-1.0]), torch.tensor([-1.5]))  # d = -1/2
    torch.testing.assert_close(value, torch.tensor([expected]))


POLICY = torch.tensor([0.5, 0.5])
REFERENCE = torch.tensor([0.9, 0.1])


def kl_of(logits: torch.Tensor) -> torch.Tensor:
    logprobs = logits.log_softmax(0)
    return (logprobs.exp() * (logprobs - REFERENCE.log())).sum()


@pytest.mark.parametrize("estimator", [k1, k3])
def test_k1_and_k3_are_unbiased(estimator) -> None:
    expectation = (POLICY * estimator(POLICY.log(), REFERENCE.log())).sum()
    torch.testing.assert_close(expectation, torch.tensor(0.5108256))
    torch.testing.assert_close(kl_of(POLICY.log()), torch.tensor(0.5108256))


def test_the_gradient_of_k2_is_that_of_the_kl_and_the_gradient_of_k1_is_nothing() -> None:
    logits = POLICY.log().requires_grad_()
    (exact,) = torch.autograd.grad(kl_of(logits), logits)
    for estimator, expected in ((k2, exact), (k1, torch.zeros(2))):
        logprobs = logits.log_softmax(0)
        (gradient,) = torch.autograd.grad((POLICY * estimator(logprobs, REFERENCE.log())).sum(), logits)
        torch.testing.assert_close(gradient, expected)


def test_the_gradient_of_k3_is_that_of_the_forward_kl() -> None:
    logits = POLICY.log().requires_grad_()
    logprobs = logits.log_softmax(0)
    (gradient,) = torch.autograd.grad((POLICY * k3(logprobs, REFERENCE.log())).sum(), logits)
    forward = (REFERENCE * (REFERENCE.log() - logits.log_softmax(0))).sum()
    torch.testing.assert_close(gradient, *torch.autograd.grad(forward, logits))


def test_corrected_k3_by_hand() -> None:
    value = corrected_k3(torch.tensor([-1.0]), torch.tensor([-1.5]), torch.tensor([-1.0 - 0.6931472]))
    torch.testing.assert_close(value, torch.tensor([0.2130613]))  # ratio 2


@pytest.mark.parametrize("behavior", [POLICY, torch.tensor([0.3, 0.7])])
def test_corrected_k3_has_the_value_and_gradient_of_the_kl_whoever_sampled(behavior: torch.Tensor) -> None:
    logits = POLICY.log().requires_grad_()
    estimate = (behavior * corrected_k3(logits.log_softmax(0), REFERENCE.log(), behavior.log())).sum()
    exact = kl_of(logits)
    torch.testing.assert_close(estimate, exact)
    torch.testing.assert_close(*torch.autograd.grad(estimate, logits), *torch.autograd.grad(exact, logits))


@pytest.mark.parametrize("estimator", [k1, k2, k3])
def test_the_reference_gets_no_gradient(estimator) -> None:
    logprobs = torch.tensor([-1.0], requires_grad=True)
    reference = torch.tensor([-2.0], requires_grad=True)
    estimator(logprobs, reference).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.abs() > 0
    assert reference.grad is None


def test_gaussian_kl_by_hand() -> None:
    mean = torch.zeros(1, 2, 3)
    std = torch.tensor(0.5)
    torch.testing.assert_close(gaussian_kl(mean, mean + 0.2, std), torch.tensor([0.08]))  # .04 / (2 * .25)
    torch.testing.assert_close(gaussian_kl(mean, mean + 0.2, std, "sum"), torch.tensor([0.48]))


def test_gaussian_kl_is_that_of_torch_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 3, 4, 5, generator=generator)
    std = torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1)
    exact = kl_divergence(Normal(mean, std.expand_as(mean)), Normal(other, std.expand_as(mean)))
    torch.testing.assert_close(gaussian_kl(mean, other, std, "sum"), exact.sum(dim=(1, 2)))
    torch.testing.assert_close(gaussian_kl(mean, other, std), exact.mean(dim=(1, 2)))


def test_gaussian_kl_by_monte_carlo() -> None:
    """The mean log-ratio of samples of the policy's step; k3 of the same samples is the same number with less noise."""
    generator = torch.Generator().manual_seed(0)
    mean, other, std = torch.tensor([[0.1, -0.2, 0.3]]), torch.tensor([[0.0, 0.0, 0.0]]), torch.tensor(0.5)
    x_next = mean + std * torch.randn(100_000, 3, generator=generator)
    logprobs = step_logprob(x_next, mean.expand_as(x_next), std, "sum")
    ref_logprobs = step_logprob(x_next, other.expand_as(x_next), std, "sum")
    exact = gaussian_kl(mean, other, std, "sum").item()
    assert exact == pytest.approx(0.28)  # (.01 + .04 + .09) / (2 * .25)
    for estimator in (k1, k3):
        samples = estimator(logprobs, ref_logprobs)
        assert samples.mean().item() == pytest.approx(exact, abs=5 * samples.std().item() / 100_000**0.5)


def test_gaussian_kl_has_a_gradient_to_the_policy_alone() -> None:
    mean, mean_ref = (torch.full((1, 2), value, requires_grad=True) for value in (0.2, 0.0))
    gaussian_kl(mean, mean_ref, torch.tensor(0.5), "sum").sum().backward()
    torch.testing.assert_close(mean.grad, torch.full((1, 2), 0.8))  # .2 / .25
    assert mean_ref.grad is None


def test_gaussian_kl_refuses_an_unknown_reduction() -> None:
    with pytest.raises(InputError, match="use mean or sum"):
        kl.gaussian_kl.__wrapped__(torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(()), "max")


def test_velocity_regularizer_by_hand_and_with_a_gradient_to_the_policy_alone() -> None:
    v = torch.tensor([[[1.0, 5.0]], [[0.0, 0.0]]], requires_grad=True)
    v_ref = torch.tensor([[[0.0, 2.0]], [[0.0, 0.0]]], requires_grad=True)
    distance = velocity_regularizer(v, v_ref)
    assert distance.tolist() == [5.0, 0.0]  # (1 + 9) / 2
    distance.sum().backward()
    assert v.grad is not None
    assert v.grad[0].tolist() == [[1.0, 3.0]]
    assert v_ref.grad is None
