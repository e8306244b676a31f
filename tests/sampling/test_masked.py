from __future__ import annotations

import math
from itertools import combinations, pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.errors import InputError
from lvrpo.sampling import (
    block_steps,
    choose_revealed,
    derive_seed,
    mask_draws,
    masked,
    masked_counts,
    masked_input,
    monte_carlo_logprob,
    path_logprobs,
    sample_tokens,
    token_logprobs,
    with_complements,
)

NAN = float("nan")
MASK = 9

# A world of three tokens with three values each, and its exact conditionals.
JOINT = torch.softmax(torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0)) * 2, dim=0)
JOINT = JOINT / JOINT.sum()


def exact_logits(tokens: torch.Tensor) -> torch.Tensor:
    """log p(x_i | the tokens of the row that are not masked), (B, 3, V)."""
    out = torch.zeros(len(tokens), 3, 3)
    for b, row in enumerate(tokens.tolist()):
        table = JOINT.clone()
        for i, token in enumerate(row):
            if token != MASK:
                table.index_fill_(i, torch.tensor([j for j in range(3) if j != token]), 0.0)
        for i in range(3):
            out[b, i] = table.sum(dim=[j for j in range(3) if j != i]).clamp(min=1e-30).log()
    return out


# masked_counts, choose_revealed, masked_input


def test_masked_counts_by_hand() -> None:
    assert masked_counts(16, 4) == (14, 11, 6, 0)  # 14.78, 11.31, 6.12
    assert masked_counts(4, 4) == (3, 2, 1, 0)
    assert masked_counts(5, 1) == (0,)
    with pytest.raises(InputError, match=r"sampling.num_steps=5 for 4 masked tokens: use 1..4"):
        masked_counts(4, 5)


def test_block_steps_by_hand() -> None:
    """Blocks of 4, 4 and 2 places; ceil(4 / 3) = 2 steps fix 2 each, 5 tokens in 2 steps would be 3 and 2."""
    whole, last = (range(4), range(4, 8)), range(8, 10)
    assert block_steps(10, 4, 3) == (*((block, left) for block in whole for left in (2, 0)), (last, 0))
    assert block_steps(5, 5, 3) == ((range(5), 2), (range(5), 0))
    assert block_steps(3, 8, 1) == ((range(3), 2), (range(3), 1), (range(3), 0))
    with pytest.raises(InputError, match="block_length=0, tokens_per_step=1: use 1 or more of all"):
        block_steps(3, 0, 1)


def test_complements_by_hand() -> None:
    masks = torch.tensor([[[1, 0, 1], [1, 1, 1]]]).bool()
    assert with_complements(masks).int().tolist() == [[[1, 0, 1], [0, 1, 0], [1, 1, 1], [1, 1, 1]]]


@given(st.integers(1, 300), st.data())
def test_every_step_fixes_a_token(num_tokens: int, data: st.DataObject) -> None:
    num_steps = data.draw(st.integers(1, num_tokens))
    counts = (num_tokens, *masked_counts(num_tokens, num_steps))
    assert len(counts) == num_steps + 1
    assert counts[-1] == 0
    assert all(after < before for before, after in pairwise(counts))


def test_choose_revealed_by_hand() -> None:
    logprobs = torch.tensor([[-0.1, -0.5, -0.2, -0.5], [0.0, -1.0, -2.0, NAN]])
    still = torch.tensor([[True, True, True, True], [False, True, True, False]])
    assert choose_revealed(logprobs, still, 1).tolist() == [[True, True, True, False], [False, True, False, False]]
    assert choose_revealed(logprobs, still, 0).tolist() == still.tolist()
    alike = torch.zeros(2, 256)  # so many that PyTorch's sort, unless it is asked to be stable, mixes them
    assert choose_revealed(alike, alike == 0, 156).tolist() == [[True] * 100 + [False] * 156] * 2
    # Gumbel of 1/2 is .3665, of .9 it is 2.2504: the third overtakes all
    uniforms = torch.tensor([[0.5, 0.5, 0.9, 0.5], [0.5] * 4])
    assert choose_revealed(logprobs, still, 3, uniforms, 1.0)[0].tolist() == [False, False, True, False]
    with pytest.raises(InputError, match="needs random numbers"):
        choose_revealed(logprobs, still, 1, None, 1.0)


def test_masked_input_by_hand() -> None:
    tokens, steps = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, -1, 0, 2]])
    assert masked_input(tokens, steps, 0, MASK).tolist() == [[MASK, 6, MASK, MASK]]
    assert masked_input(tokens, steps, 1, MASK).tolist() == [[MASK, 6, 7, MASK]]
    assert masked_input(tokens, steps, 2, MASK).tolist() == [[5, 6, 7, MASK]]


# path_logprobs


def whole_path(tokens: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The log-probs of all tokens along their path, (B, N)."""
    return sum(
        path_logprobs(exact_logits(masked_input(tokens, steps, s, MASK)), tokens, steps, s)
        for s in range(int(steps.max()) + 1)
    )


def test_path_logprobs_by_hand() -> None:
    logits = torch.tensor([[[0.1, 0.9], [0.4, 0.6], [0.5, 0.5]]]).log()
    tokens, steps = torch.tensor([[0, 1, 0]]), torch.tensor([[1, 1, 0]])
    expected = torch.tensor([[math.log(0.1), math.log(0.6), 0.0]])
    torch.testing.assert_close(path_logprobs(logits, tokens, steps, 1), expected)
    # at temperature 1/2 the odds are squared: 1 : 81 and 16 : 36
    expected = torch.tensor([[math.log(1 / 82), math.log(36 / 52), 0.0]])
    torch.testing.assert_close(path_logprobs(logits, tokens, steps, 1, 0.5), expected)


def test_one_token_a_step_is_the_chain_rule_in_every_order() -> None:
    tokens = torch.tensor([[2, 0, 1]])
    for order in permutations(range(3)):
        logprob = whole_path(tokens, torch.tensor([order])).sum()
        torch.testing.assert_close(logprob, JOINT[2, 0, 1].log())


def test_given_tokens_are_a_condition_and_not_scored() -> None:
    tokens = torch.tensor([[2, 0, 1]])
    logprobs = whole_path(tokens, torch.tensor([[0, -1, 1]]))
    assert logprobs[0, 1] == 0
    torch.testing.assert_close(logprobs.sum(), (JOINT[2, 0, 1] / JOINT[:, 0, :].sum()).log())


def test_a_sampled_image_is_replayed_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    B = 64
    tokens, steps = torch.full((B, 3), MASK), torch.full((B, 3), 2)
    recorded = torch.zeros(B, 3)
    for s, num_masked in enumerate(masked_counts(3, 2)):
        still = tokens == MASK
        logits = exact_logits(tokens)
        drawn = sample_tokens(logits.flatten(0, 1), torch.rand(3 * B, generator=generator)).view(B, 3)
        logprobs = token_logprobs(logits, drawn)
        fixed = choose_revealed(logprobs, still, num_masked, torch.rand(B, 3, generator=generator), 1.0)
        tokens, steps = torch.where(fixed, drawn, tokens), torch.where(fixed, s, steps)
        recorded = torch.where(fixed, logprobs, recorded)
    assert torch.equal(whole_path(tokens, steps), recorded)
    assert sorted({int(n) for n in (steps == 0).sum(dim=1)}) == [1]


# mask_draws, monte_carlo_logprob


def test_mask_draws_are_a_function_of_the_seed_alone() -> None:
    seeds = [derive_seed("masks", i) for i in range(3)]
    masks = mask_draws(seeds, 10, 4)
    assert masks.shape == (3, 4, 10)
    assert masks.any(dim=2).all()
    assert torch.equal(mask_draws(seeds[::-1], 10, 4), masks.flip(0))
    assert not torch.equal(masks[0], masks[1])


def test_mask_draws_follow_their_schedule() -> None:
    seeds = [derive_seed("masks", i) for i in range(4000)]
    uniform = mask_draws(seeds, 4, 2, "uniform")
    counts = uniform.sum(dim=2)
    assert set(counts[:, 0].tolist()) == {1, 2}  # the first draw from the lower half
    shares = torch.bincount(counts.flatten(), minlength=5) / counts.numel()
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.25, 0.25, 0.25, 0.25]), rtol=0, atol=0.02)
    torch.testing.assert_close(uniform.float().mean(dim=(0, 1)), torch.full((4,), 0.625), rtol=0, atol=0.02)
    cosine = mask_draws(seeds[:500], 100, 4)
    assert cosine.float().mean().item() == pytest.approx(2 / math.pi, abs=0.01)  # the mean of cos(pi u / 2)


def test_monte_carlo_by_hand() -> None:
    logprobs = torch.tensor([[[-1.0, -2.0, NAN], [NAN, NAN, -4.0]]])
    masks = ~logprobs.isnan()
    torch.testing.assert_close(monte_carlo_logprob(logprobs, masks), torch.tensor([-2.75]))  # (-1.5 - 4) / 2
    torch.testing.assert_close(monte_carlo_logprob(logprobs, masks, "elbo"), torch.tensor([-8.25]))


def test_a_draw_that_masks_nothing_adds_nothing() -> None:
    masks = torch.tensor([[[True, False], [False, False]]])
    assert monte_carlo_logprob(torch.full((1, 2, 2), -3.0), masks).tolist() == [-1.5]


def test_with_exact_conditionals_the_elbo_is_the_log_prob() -> None:
    """All masks, each number of masked tokens alike: 3 of one token, 3 of two, and the full one three times."""
    masks = [set(chosen) for size in (1, 2) for chosen in combinations(range(3), size)] + [{0, 1, 2}] * 3
    table = torch.tensor([[[i in chosen for i in range(3)] for chosen in masks]])
    for tokens in ([2, 0, 1], [0, 0, 0], [1, 2, 2]):
        row = torch.tensor(tokens).expand(len(masks), 3)
        logits = exact_logits(torch.where(table[0], MASK, row))
        logprob = monte_carlo_logprob(token_logprobs(logits, row)[None], table, "elbo")
        torch.testing.assert_close(logprob, JOINT[tuple(tokens)].log()[None])


def test_the_gradient_reaches_masked_tokens_alone() -> None:
    logprobs = torch.tensor([[[-1.0, -2.0, NAN]]], requires_grad=True)
    masks = torch.tensor([[[True, True, False]]])
    monte_carlo_logprob(logprobs, masks).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [[[0.5, 0.5, 0.0]]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mask_draws([1], 4, 0), "use 1 or more of both"),
        (lambda: masked.mask_draws.__wrapped__([1], 4, 1, "linear"), "use cosine or uniform"),
        (
            lambda: masked.monte_carlo_logprob.__wrapped__(torch.zeros(1, 1, 1), torch.ones(1, 1, 1) > 0, "max"),
            "use mean or elbo",
        ),
    ],
)
def test_impossible_masks_are_refused(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
