from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.errors import InputError
from lvrpo.sampling import sample_tokens, token_entropy, token_logprobs, token_scores
from lvrpo.sampling import tokens as sampling_tokens
from lvrpo.training.memory_estimate import LiveBytes

LOGITS = torch.tensor([0.1, 0.2, 0.7]).log()
ALMOST_ONE = 1 - 2**-24


def test_sample_tokens_by_hand() -> None:
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.29, 0.31, ALMOST_ONE])
    assert sample_tokens(LOGITS.expand(6, 3), uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    # at temperature 1/2 the odds are squared: 1 : 4 : 49, cumulated .0185, .0926
    assert sample_tokens(LOGITS.expand(6, 3), torch.tensor([0.018, 0.019, 0.092, 0.093, 0.5, 0.9]), 0.5).tolist() == [
        0, 1, 1, 2, 2, 2,
    ]  # fmt: skip


def test_sample_tokens_greedy_and_allowed() -> None:
    uniforms = torch.tensor([0.0, 0.32, 0.34, ALMOST_ONE])
    allowed = torch.tensor([True, True, False])
    assert sample_tokens(LOGITS.expand(4, 3), uniforms, 1.0, allowed).tolist() == [0, 0, 1, 1]  # odds 1 : 2
    assert sample_tokens(LOGITS.expand(4, 3), uniforms, 0.0, allowed).tolist() == [1] * 4
    assert sample_tokens(LOGITS.expand(4, 3), uniforms, 0.0).tolist() == [2] * 4
    rows = torch.tensor([[True, False, False], [False, True, False], [False, False, True], [True, True, True]])
    assert sample_tokens(LOGITS.expand(4, 3), uniforms, 1.0, rows).tolist() == [0, 1, 2, 2]


def test_sample_tokens_frequencies() -> None:
    count = 30_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens = sample_tokens(LOGITS.expand(count, 3), uniforms)
    shares = torch.bincount(tokens, minlength=3) / count
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.01)


@given(st.integers(0, 2**30), st.integers(2, 40), st.floats(0, 1, exclude_max=True, width=32), st.data())
def test_a_token_is_allowed_and_independent_of_its_batch(seed: int, V: int, u: float, data: st.DataObject) -> None:
    logits = 5 * torch.randn(3, V, generator=torch.Generator().manual_seed(seed))
    uniforms = torch.tensor([u, 0.0, ALMOST_ONE])
    allowed = torch.tensor(data.draw(st.lists(st.booleans(), min_size=V, max_size=V)))
    allowed[data.draw(st.integers(0, V - 1))] = True
    tokens = sample_tokens(logits, uniforms, 0.7, allowed)
    assert allowed[tokens].all()
    assert torch.equal(sample_tokens(logits.flip(0), uniforms.flip(0), 0.7, allowed).flip(0), tokens)
    assert torch.equal(sample_tokens(logits[1:2], uniforms[1:2], 0.7, allowed), tokens[1:2])


def test_token_logprobs_by_hand() -> None:
    tokens = torch.tensor([[0, 1], [2, 1]])
    logits = LOGITS.expand(2, 2, 3)
    expected = torch.tensor([[0.1, 0.2], [0.7, 0.2]]).log()
    torch.testing.assert_close(token_logprobs(logits, tokens), expected)
    torch.testing.assert_close(token_logprobs(logits, tokens, 0.0), expected)
    torch.testing.assert_close(token_logprobs(logits, tokens, 0.5)[0], torch.tensor([1 / 54, 4 / 54]).log())
    allowed = torch.tensor([True, True, False])
    torch.testing.assert_close(token_logprobs(logits, tokens, 1.0, allowed)[0], torch.tensor([1 / 3, 2 / 3]).log())


def test_both_scores_are_those_of_the_two_functions() -> None:
    logits = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    tokens, allowed = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.arange(8) < 6
    logprobs, entropy = token_scores(logits, tokens, 0.7, allowed)
    assert torch.equal(logprobs, token_logprobs(logits, tokens, 0.7, allowed))
    assert torch.equal(entropy, token_entropy(logits, 0.7, allowed))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows_of_allowed", [0, 1, 2, 3])
def test_scores_in_parts_are_those_of_one_pass(
    temperature: float, rows_of_allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients, for no mask, one of all rows, one per row, one per place of every sequence."""
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(3, 7, 12, generator=generator), torch.randn(2, 3, 7, generator=generator)
    tokens = torch.randint(0, 6, (3, 7), generator=generator)
    last = torch.randint(6, 12, (3, 7, 1), generator=generator)
    masks = (None, torch.arange(12) < 6, torch.arange(12) < last, torch.arange(12) < last[0])
    found = []
    for rows in (21, 4):  # in one part, in six
        monkeypatch.setitem(sampling_tokens.PART_BYTES, "cpu", 4 * 12 * rows)
        x = logits.clone().requires_grad_()
        logprobs, entropy = token_scores(x, tokens, temperature, masks[rows_of_allowed])
        (weights[0] * logprobs + weights[1] * entropy).sum().backward()
        assert x.grad is not None
        found.append((logprobs, entropy, x.grad, token_logprobs(logits, tokens, temperature, masks[rows_of_allowed])))
    for whole, parted in zip(*found, strict=True):
        torch.testing.assert_close(whole, parted, rtol=1e-6, atol=1e-6)
        assert whole.isfinite().all()
    assert torch.equal(found[0][0], found[1][0])  # the replay law: no bit of a log-prob depends on the batch
    assert torch.equal(found[0][0], found[0][3])
    assert found[0][2].abs().max() > 0.1


@pytest.mark.parametrize("differentiated", ["log-probs", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_autograd(differentiated: str, temperature: float, dtype: torch.dtype) -> None:
    """Its own bits for log-probs alone; the entropy of tokens that are not allowed, or never, has a gradient of 0."""
    generator = torch.Generator().manual_seed(0)
    logits, weights = torch.randn(5, 12, generator=generator), torch.randn(2, 5, generator=generator)
    logits[0, 3] = 1e6  # all others have probability 0
    tokens, allowed = torch.arange(5)[:, None], torch.arange(12) < 9
    weights[0] *= differentiated != "entropy"
    weights[1] *= differentiated != "log-probs"
    found = []
    for by_autograd in (True, False):
        x = logits.to(dtype, copy=True).requires_grad_()
        if by_autograd:
            scaled = x.float() if temperature == 1 else x.float() / temperature
            distribution = scaled.masked_fill(~allowed, -torch.inf).log_softmax(-1)
            logprobs = distribution.gather(-1, tokens)[:, 0]
            entropy = -(distribution.exp() * distribution.clamp(min=-1e4)).sum(-1)
        else:
            logprobs, entropy = token_scores(x, tokens[:, 0], temperature, allowed)
        terms = {"log-probs": weights[0] * logprobs, "entropy": weights[1] * entropy}
        sum(term.sum() for name, term in terms.items() if differentiated in (name, "both")).backward()  # type: ignore[union-attr]
        assert x.grad is not None
        found.append(x.grad)
    if differentiated == "log-probs":
        assert torch.equal(*found)
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(*found, rtol=rounding, atol=rounding / 10)
    assert found[1][1:, :9].abs().min() > 0
    assert not found[1][:, 9:].any()


def test_an_entropy_that_is_not_differentiated_needs_no_memory() -> None:
    x = torch.randn(512, 4096, requires_grad=True)
    with LiveBytes([x]) as live:
        logprobs, _entropy = token_scores(x, torch.zeros(512, dtype=torch.int64))
        logprobs.sum().backward()
    parts = 4 * sampling_tokens.PART_BYTES["cpu"]
    assert x.nbytes < live.peak < x.nbytes + parts  # the gradient, and a part's distribution


def test_no_scores_of_no_tokens() -> None:
    logprobs, entropy = token_scores(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.int64))
    assert logprobs.shape == entropy.shape == (2, 0)


def test_token_entropy_by_hand() -> None:
    torch.testing.assert_close(token_entropy(LOGITS[None]), torch.tensor([0.8018186]))
    torch.testing.assert_close(token_entropy(torch.zeros(2, 3, 8)), torch.full((2, 3), math.log(8)))
    allowed = torch.tensor([True, True, False])
    torch.testing.assert_close(token_entropy(LOGITS[None], 1.0, allowed), torch.tensor([0.6365142]))


def test_a_forbidden_token_leaves_all_gradients_finite() -> None:
    logits = LOGITS[None].clone().requires_grad_()
    allowed = torch.tensor([True, True, False])
    loss = token_entropy(logits, 1.0, allowed) + token_logprobs(logits, torch.tensor([0]), 1.0, allowed)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
    assert gradient[0, 2] == 0


def test_a_negative_temperature_is_refused() -> None:
    with pytest.raises(InputError, match="use 0"):
        sample_tokens(LOGITS[None], torch.zeros(1), -1.0)
