from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.policies.mot.attention import Span, SpanKind, pack, row_layout

IMAGE_KINDS: tuple[SpanKind, ...] = ("read", "clean", "noise")
TEXT_KINDS: tuple[SpanKind, ...] = ("text", "option")
text_spans = st.builds(Span, st.sampled_from(TEXT_KINDS), st.integers(1, 5))
image_spans = st.builds(Span, st.sampled_from(IMAGE_KINDS), st.integers(3, 5))
rows = st.lists(text_spans | image_spans, max_size=5).map(tuple)


def tokens_of(row: tuple[Span, ...]) -> list[tuple[int, SpanKind, int, int]]:
    """(number of the span, its kind, place in it, its length) of every token."""
    return [(s, span.kind, i, span.length) for s, span in enumerate(row) for i in range(span.length)]


def may_look(row: tuple[Span, ...], i: int, j: int) -> bool:
    tokens = tokens_of(row)
    (query_span, query_kind, *_), (key_span, key_kind, *_) = tokens[i], tokens[j]
    if key_kind in ("noise", "option") and key_span != query_span:
        return False
    return j <= i or (key_span == query_span and query_kind not in ("text", "option"))


def rope_of(row: tuple[Span, ...]) -> tuple[list[int], int]:
    ids, following = [], 0
    for span in row:
        for place in range(span.length):
            ids.append(following + (place if span.kind == "option" else 0))
            following += span.kind == "text"
        following += span.kind in ("read", "clean")
    return ids, following


@given(rows)
def test_layout_follows_the_rules_token_by_token(row: tuple[Span, ...]) -> None:
    layout = row_layout(row)
    n = sum(span.length for span in row)
    assert layout.visible.tolist() == [[may_look(row, i, j) for j in range(n)] for i in range(n)]
    ids, following = rope_of(row)
    assert layout.rope_ids.tolist() == ids
    assert layout.rope_advance == following
    owned = [kind in ("clean", "noise") and 0 < i < length - 1 for _, kind, i, length in tokens_of(row)]
    assert layout.generation.tolist() == owned


def test_a_worked_row() -> None:
    row = (Span("text", 3), Span("clean", 4), Span("read", 4), Span("noise", 4), Span("text", 2))
    layout = row_layout(row)
    assert layout.rope_ids.tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 5, 6]
    assert layout.rope_advance == 7
    assert layout.generation.nonzero()[0].tolist() == [4, 5, 12, 13]
    assert layout.visible[:, 11:15].any(axis=1).nonzero()[0].tolist() == [11, 12, 13, 14]
    assert not layout.visible[0, 1]
    assert layout.visible[3, 6]
    assert not layout.visible[3, 7]
    assert layout.visible[16, :11].all()


@given(st.lists(rows, min_size=1, max_size=4).filter(any))
def test_pack_lays_out_every_row_as_if_alone(batch: list[tuple[Span, ...]]) -> None:
    packing = pack(batch, torch.device("cpu"))
    lengths = [sum(span.length for span in row) for row in batch]
    assert packing.lengths.tolist() == lengths
    assert (packing.batch_size, packing.length) == (len(batch), max(lengths))
    grid = torch.arange(packing.batch_size * packing.length).view(packing.batch_size, -1)
    reading, drawing = [], []
    for b, row in enumerate(batch):
        layout, n = row_layout(row), lengths[b]
        assert torch.equal(packing.visible[b, :n, :n], torch.from_numpy(layout.visible))
        assert not packing.visible[b, :n, n:].any()
        assert packing.visible[b, n:].sum().item() == packing.length - n
        assert packing.rope_ids[b, :n].tolist() == layout.rope_ids.tolist()
        assert packing.rope_advance[b].item() == layout.rope_advance
        reading += [int(cell) for cell, owned in zip(grid[b, :n], layout.generation, strict=True) if not owned]
        drawing += [int(cell) for cell, owned in zip(grid[b, :n], layout.generation, strict=True) if owned]
    assert packing.understanding_cells.tolist() == reading
    assert packing.generation_cells.tolist() == drawing
    assert packing.grid_source[torch.tensor(reading + drawing, dtype=torch.int64)].tolist() == list(
        range(len(reading) + len(drawing))
    )
