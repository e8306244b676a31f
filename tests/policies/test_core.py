from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lvrpo.policies.mot import flow_sampler, generate
from lvrpo.policies.mot.generate import Decoder, TokenizedText
from lvrpo.policies.mot.model_runner import ModelRunner, Row
from lvrpo.policies.mot.transformer import Cache
from lvrpo.policies.tiny import TinyPolicy
from lvrpo.types import Image, Parts

VARIANTS: list[dict[str, Any]] = [
    {},
    {"mlp": "swiglu", "attention_bias": True, "key_heads": 1},
    {"key_heads": 4, "depth": 3, "rope_theta": 100.0},
]


def noise(policy: TinyPolicy, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(count, policy.config.image_tokens, policy.encoders.channels, generator=generator)
    return x_t, torch.rand(count, generator=generator) * 0.8 + 0.2


def text(policy: TinyPolicy, words: str) -> TokenizedText:
    return TokenizedText((*policy.tokenizer.encode(words), policy.tokenizer.eos_id), True)


def text_logprobs(policy: TinyPolicy, cache: Cache, texts: Sequence[str]) -> list[torch.Tensor]:
    owner = range(len(texts))
    return generate.score_text(
        policy.runner, cache, owner, [text(policy, t) for t in texts], 1.0, closed=False
    ).logprobs


def by_hand_logprobs(policy: TinyPolicy, row: Any, words: str) -> torch.Tensor:
    """Of a text that ends a row that was run at once; ``row`` ends with the fed end token, which predicts nothing."""
    ids = text(policy, words).tokens
    logits = row.logits[-len(ids) - 1 : -1].masked_fill(policy.tokenizer.suppressed_tokens(), -torch.inf)
    return torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("variant", VARIANTS, ids=["relu2", "swiglu-bias-mqa", "full-heads"])
def test_cached_prefill_and_extension_equal_one_uncached_pass(
    variant: dict[str, Any], new_policy: Callable[..., TinyPolicy], whole_row: Callable[..., Any], image: Any
) -> None:
    policy = new_policy(3, **variant)
    x_t, t = noise(policy, 1)
    source = image(1)
    context = ["draw a circle", ("clean", source), ("read", source), "make it blue"]
    cache = policy.runner.prefill([policy.runner.row(("draw a circle", source, "make it blue"), draws=True)])

    whole = whole_row(policy, [*context, ("noise", (x_t[0], float(t[0])))])
    v = flow_sampler.velocity(policy.runner, cache, x_t, t)[0]
    assert whole.velocity.abs().mean() > 0.1
    torch.testing.assert_close(v, whole.velocity, rtol=1e-5, atol=1e-5)

    after_noise = whole_row(policy, [*context, ("noise", (x_t[0], float(t[0]))), "two red"])
    (logprobs,) = text_logprobs(policy, cache, ["two red"])
    torch.testing.assert_close(logprobs, by_hand_logprobs(policy, after_noise, "two red"), rtol=1e-5, atol=1e-5)
    assert logprobs.std() > 0.1


def test_token_by_token_equals_one_pass(policy: TinyPolicy, image: Any) -> None:
    runner = policy.runner
    start = runner.prefill([runner.row((image(1), "what is it"), draws=False)])
    (whole,) = text_logprobs(policy, start, ["a red circle"])
    tokens = text(policy, "a red circle").tokens
    stepped, feed = [], policy.tokenizer.bos_id
    decoder = Decoder(policy.transformer, start, len(tokens))
    for token in tokens:
        states = decoder.step(policy.encoders.embed_tokens(torch.tensor([feed])))
        logits = policy.encoders.text_logits(states).masked_fill(policy.tokenizer.suppressed_tokens(), -torch.inf)
        stepped.append(torch.log_softmax(logits, dim=-1)[0, token])
        feed = token
    torch.testing.assert_close(torch.stack(stepped), whole, rtol=1e-5, atol=1e-5)


def mixed_parts(image: Callable[[int], Image]) -> list[Parts]:
    shared = image(5)
    return [
        ("draw",),
        (shared, "make it red"),
        (),
        (image(6), image(7), "what is it"),
        (shared, "make it a blue square"),
        ("a circle", image(8)),
    ]


@pytest.mark.parametrize("draws", [True, False])
def test_padding_order_and_company_do_not_matter(draws: bool, policy: TinyPolicy, image: Any) -> None:
    runner = policy.runner
    rows = [runner.row(parts, draws) for parts in mixed_parts(image)]
    x_t, t = noise(policy, len(rows))
    answers = ["red", "a blue circle", "it", "two", "one two three", "square"]

    def outputs(order: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        cache = runner.prefill([rows[i] for i in order])
        v = flow_sampler.velocity(runner, cache, x_t[order], t[order])
        return text_logprobs(policy, cache, [answers[i] for i in order]), v

    together, v_together = outputs(list(range(len(rows))))
    for order in ([5, 4, 3, 2, 1, 0], [1, 4], [2], [0, 3, 5], [4]):
        logprobs, v = outputs(order)
        torch.testing.assert_close(v, v_together[order], rtol=1e-6, atol=1e-5)
        for place, i in enumerate(order):
            torch.testing.assert_close(logprobs[place], together[i], rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("again", [False, True])
def test_a_cache_keeps_its_keys_and_values_alone(new_policy: Callable[..., TinyPolicy], again: bool) -> None:
    policy = new_policy(0, key_heads=1)
    policy.checkpoint_gradients(again)
    (part,) = policy.runner.prefill([policy.runner.row((words,), draws=True) for words in ("draw", "a circle")]).parts
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in (*part.keys, *part.values)}
    assert sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) == part.nbytes


def test_prefill_shared_equals_separate_prefills(policy: TinyPolicy, image: Any) -> None:
    runner = policy.runner
    shared = image(1)
    parts: list[Parts] = [(shared, "is it red"), ("draw",), (shared, "is it red"), (shared, "is it blue"), ("draw",)]
    rows = [runner.row(p, draws=True) for p in parts]
    cache, index = runner.prefill_shared(rows)
    assert index == [0, 1, 0, 2, 1]
    assert len(cache.rope) == 3
    x_t, t = noise(policy, len(rows))
    v = flow_sampler.velocity(runner, cache.select(index), x_t, t)
    for i, row in enumerate(rows):
        alone = flow_sampler.velocity(runner, runner.prefill([row]), x_t[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(v[i], alone[0], rtol=1e-6, atol=1e-5)


def test_flow_steps_leave_the_context_alone(policy: TinyPolicy, image: Any) -> None:
    runner = policy.runner
    cache = runner.prefill([runner.row((image(1), "make it red"), draws=True)])
    depth = range(policy.transformer.config.depth)
    before = [t.clone() for t in (*(t for i in depth for t in cache.layer(i)), cache.rope)]
    x_t, t = noise(policy, 1)
    first = flow_sampler.velocity(runner, cache, x_t, t)
    flow_sampler.velocity(runner, cache, 2 * x_t, t)
    assert torch.equal(flow_sampler.velocity(runner, cache, x_t, t), first)
    for old, now in zip(before, (*(t for i in depth for t in cache.layer(i)), cache.rope), strict=True):
        assert torch.equal(old, now)


def test_every_part_of_the_context_is_used(policy: TinyPolicy, image: Any) -> None:
    runner = policy.runner
    x_t, t = noise(policy, 1)

    def v(*parts: Any, draws: bool = True) -> torch.Tensor:
        return flow_sampler.velocity(runner, runner.prefill([runner.row(parts, draws)]), x_t, t)

    base = v(image(1), "make it red")
    for other in (
        v(image(2), "make it red"),
        v(image(1), "make it blue"),
        v(image(1)),
        v("make it red"),
        v(image(1), "make it red", draws=False),
        v("make it red", image(1)),
    ):
        assert (other - base).abs().max() > 1e-3


def gradients(policy: TinyPolicy, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    policy.zero_grad(set_to_none=True)
    loss.backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad(set_to_none=True)
    return found


def test_gradient_through_a_shared_prefill_is_the_sum_of_separate_ones(
    new_policy: Callable[..., TinyPolicy], image: Any
) -> None:
    policy = new_policy()
    runner = policy.runner
    shared = image(1)
    parts: list[Parts] = [(shared, "is it red"), (shared, "is it red"), (shared, "what is it")]
    answers = ["red", "a circle", "red"]
    x_t, t = noise(policy, len(parts))

    def loss(indices: list[int]) -> torch.Tensor:
        rows: list[Row] = [runner.row(parts[i], draws=True) for i in indices]
        cache, owner = runner.prefill_shared(rows)
        scored = generate.score_text(
            runner, cache, owner, [text(policy, answers[i]) for i in indices], 1.0, closed=True
        )
        v = flow_sampler.velocity(runner, scored.cache, x_t[indices], t[indices])
        return torch.cat(scored.logprobs).sum() + v.square().mean(dim=(1, 2)).sum()

    together = gradients(policy, loss([0, 1, 2]))
    separate = [gradients(policy, loss([i])) for i in range(3)]
    for name, gradient in together.items():
        total = sum(part[name] for part in separate)
        assert isinstance(total, torch.Tensor)
        torch.testing.assert_close(gradient, total, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("parts", "no_text", "no_images"),
    [
        (("T",), (), ("T",)),
        (("S", "T"), ("S",), ("S", "T")),
        (("I", "T"), ("I",), ("T",)),
        (("S", "I", "T"), ("S", "I"), ("S", "T")),
        (("T", "I"), ("T", "I"), ("T",)),
        (("I",), ("I",), ()),
        ((), (), ()),
    ],
)
def test_contexts_of_guidance(
    parts: Sequence[str], no_text: Sequence[str], no_images: Sequence[str], policy: TinyPolicy, image: Any
) -> None:
    runner = policy.runner
    content = {"T": "a red circle", "S": "draw", "I": image(1)}

    def row(letters: Sequence[str]) -> Row:
        return runner.row([content[letter] for letter in letters], draws=True)

    def keys(r: Row) -> list[Any]:
        return [piece.key for piece in r]

    assert keys(runner.without_text(row(parts))) == keys(row(no_text))
    assert keys(runner.without_images(row(parts))) == keys(row(no_images))


def test_a_image_condition_comes_with_both_sides_drawing_side_first(policy: TinyPolicy, image: Any) -> None:
    runner: ModelRunner = policy.runner
    assert [piece.span.kind for piece in runner.row((image(1), "it"), draws=True)] == ["clean", "read", "text"]
    assert [piece.span.kind for piece in runner.row((image(1), "it"), draws=False)] == ["read", "text"]
    cache = runner.prefill([runner.row((image(1), "it"), draws=True), runner.row(("it",), draws=True)])
    assert cache.rope.tolist() == [2 + 3, 3]
    assert cache.lengths == [6 + 6 + 3, 3]
