"""Writing token by token: the very bits of the general pass, and how little a step does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lvrpo.policies.decoding import fill_gaps, generate_text
from lvrpo.policies.kv_buffers import select_rows
from lvrpo.policies.mot import generate, transformer
from lvrpo.policies.mot.attention import Span, SpanAttention, attention, folded_attention
from lvrpo.policies.mot.generate import Decoder
from lvrpo.policies.mot.model_runner import Piece, Row
from lvrpo.policies.mot.transformer import Cache
from lvrpo.policies.tiny import TinyPolicy

CHANGES = ([0, 0, 1, 2, 2, 2], [5, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5], [1, 2, 4], [2, 2, 0, 1], [3])
"""Rows after every step: repeated, reordered, kept, dropped."""


def contexts_of(policy: TinyPolicy, image: Any, padded: bool) -> Cache:
    """Three contexts in two parts, of different lengths where they are padded."""
    shared = image(1)
    ends = ("what is it", "it", "is it a red circle") if padded else ("is it red", "is it blue", "it is two")
    rows = [policy.runner.row((shared, end), draws=False) for end in ends]
    cache = policy.runner.prefill(rows)
    assert len(cache.parts) == 2
    return cache


def single_tokens(ids: Sequence[int]) -> list[Row]:
    return [(Piece(Span("text", 1), (i,)),) for i in ids]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_have_the_bits_of_the_general_pass(
    padded: bool, key_heads: int, dtype: torch.dtype, new_policy: Callable[..., TinyPolicy], image: Any
) -> None:
    policy = new_policy(3, key_heads=key_heads)
    policy.set_compute_dtype(dtype)
    with torch.no_grad(), policy.autocast():
        cache = contexts_of(policy, image, padded)
        decoder = Decoder(policy.transformer, cache, len(CHANGES))
        for step, rows in enumerate(CHANGES):
            ids = [(7 * step + 3 * r) % 14 + 4 for r in range(len(cache.rope))]
            hidden = policy.runner.run(single_tokens(ids), cache)
            states = decoder.step(policy.encoders.embed_tokens(torch.tensor(ids)))
            assert torch.equal(states, hidden.understanding)
            assert states.std() > 0.1
            cache = hidden.cache.select(rows)
            decoder.select(rows)


def test_steps_after_nothing(policy: TinyPolicy) -> None:
    cache = policy.transformer.empty_cache(2)
    decoder = Decoder(policy.transformer, cache, 2)
    for ids in ([4, 5], [6, 7]):
        hidden = policy.runner.run(single_tokens(ids), cache)
        assert torch.equal(decoder.step(policy.encoders.embed_tokens(torch.tensor(ids))), hidden.understanding)
        cache = hidden.cache


def test_members_written_in_parts(policy: TinyPolicy, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        cache = contexts_of(policy, image, padded=True)
    owner = [0, 0, 2, 2, 1, 1, 1, 0]
    uniforms = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    whole = generate.generate_text(policy.runner, cache, owner, uniforms, 1.0)
    room = generate.decode_batch_size(policy.transformer, cache, 6)
    monkeypatch.setattr(generate, "BUFFER_BYTES", 3 * generate.BUFFER_BYTES // room + 1)
    assert generate.decode_batch_size(policy.transformer, cache, 6) == 3
    assert generate.generate_text(policy.runner, cache, owner, uniforms, 1.0) == whole
    assert len(set(whole)) > 4


def test_texts_do_not_depend_on_how_often_tokens_are_fetched(policy: TinyPolicy, image: Any) -> None:
    with torch.no_grad():
        cache = contexts_of(policy, image, padded=True)
    owner, uniforms = [0, 2, 2, 1, 1, 1, 0], torch.rand(7, 9, generator=torch.Generator().manual_seed(1))
    embed, bos = policy.encoders.embed_tokens, torch.full((3,), policy.tokenizer.bos_id)
    found, steps = [], []
    for wait in (1, 4, 20):
        decoder = Decoder(policy.transformer, cache, 9)
        decoder.step(embed(bos))
        ends = range(4, 12)  # a third of the tokens ends a text
        found.append(
            generate_text(decoder, owner, embed, policy.encoders.text_logits, ends, uniforms, 1.0, tokens_per_wait=wait)
        )
        steps.append(len(decoder.rope))
    assert found[0] == found[1] == found[2]
    assert len({len(text) for text in found[0]}) > 1
    assert any(text[-1] in ends for text in found[0])
    assert not any(token in ends for text in found[0] for token in text[:-1])
    assert steps[0] < steps[2] == len(owner)  # rows that ended left; where tokens are fetched once, none did


def test_rows_that_end_are_replaced_by_the_last_ones() -> None:
    rows = [0, 3, 4, 5]
    order = fill_gaps(rows)
    assert [rows[k] for k in order] == [0, 5, 4, 3]
    assert fill_gaps([1, 1, 0]) == [0, 1, 2]
    buffer = torch.arange(6.0)[:, None, None, None].expand(6, 2, 5, 3).clone()
    address = buffer.data_ptr()
    for chosen, in_place in (([0, 5, 4, 3], True), ([0, 1], True), ([1, 0], False), ([0, 0, 1], False)):
        expected = buffer[chosen, :, :4]
        buffer = select_rows(buffer, chosen, 4)
        assert torch.equal(buffer[:, :, :4], expected)
        assert (buffer.data_ptr() == address) == in_place
        address = buffer.data_ptr()


class Counted(TorchDispatchMode):
    """Operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_a_step_makes_no_index_and_copies_no_context(new_policy: Callable[..., TinyPolicy], image: Any) -> None:
    counts = []
    for depth in (2, 5):
        policy = new_policy(depth=depth)
        with torch.no_grad():
            decoder = Decoder(policy.transformer, contexts_of(policy, image, padded=True), 4)
        x = policy.encoders.embed_tokens(torch.tensor([4, 5, 6])).detach()
        decoder.step(x)
        with Counted() as counted:
            decoder.select([0, 1, 2])
            decoder.step(x)
        counts.append(counted.counts)
    layer = {name: (counts[1][name] - counts[0][name]) / 3 for name in counts[1]}
    assert layer["cat"] == layer["roll"] == 1  # queries with keys, and their halves: neither grows with the context
    assert layer["copy_"] == 2  # a key and a value into their places
    assert not {"lift_fresh", "index_select", "index", "_local_scalar_dense"} & counts[1].keys()
    assert sum(layer.values()) < 66


@pytest.mark.parametrize("rows", [1, 3])
def test_folded_attention_is_attention(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 5, 6, 8, generator=generator)
    k, v = torch.randn(2, 3, 9, 2, 8, generator=generator)
    shape = (5, 9) if rows == 1 else (3, 1, 5, 9)
    mask = torch.rand(shape, generator=generator) > 0.4
    mask[..., 0] = True
    torch.testing.assert_close(folded_attention(q, k, v, mask), attention(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_spans_are_attended_as_under_a_mask(policy: TinyPolicy, image: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[type] = []

    def logprobs() -> list[torch.Tensor]:
        shared = image(1)
        rows = [policy.runner.row((shared, end), draws=True) for end in ("is it red", "it", "is it blue", "two")]
        cache, owner = policy.runner.prefill_shared([*rows, rows[0]])
        ids = policy.tokenizer.encode("a red circle")
        texts = [generate.TokenizedText((*ids[: 1 + b % 3], policy.tokenizer.eos_id), True) for b in owner]
        return generate.score_text(policy.runner, cache, owner, texts, 1.0, closed=False).logprobs

    def spans(self: Any, packing: Any, cache: Cache) -> SpanAttention:
        used.append(SpanAttention)
        return SpanAttention(packing, cache)

    masked = logprobs()
    monkeypatch.setattr(transformer.MoT, "_attention_of", spans)
    for one, other in zip(masked, logprobs(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert used
