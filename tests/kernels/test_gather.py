"""Tokens and pages out of span tables: the native copy against plain torch, and attention over what was chosen."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import cases

from steno.errors import BadArgument
from steno.kernels import native
from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend, gather_tokens
from steno.kernels.quant import encode_pages
from steno.types import PageFormat

CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(not native.available_isas(), reason="the native library is not built")


def draw_tokens(draw: st.DrawFn, table: SpanTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries and tokens, in any order, some of them twice."""
    places = [(e, t) for e in range(len(table.entries)) for t in range(table.tokens_of(e))]
    chosen = draw(st.lists(st.sampled_from(places), max_size=40)) if places else []
    both = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


@needs_native
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_native_copy_is_that_of_torch(data: st.DataObject) -> None:
    _, table, _ = data.draw(cases(most_heads=2, most_queries=1))
    if not len(table.entries):
        return
    places = draw_tokens(data.draw, table)
    values = data.draw(st.booleans())
    plain, fast = (gather_tokens(table, *places, device=CPU, values=values, impl=i) for i in ("naive", "cpu"))
    assert plain.keys.dtype == fast.keys.dtype
    torch.testing.assert_close(plain.keys, fast.keys, atol=1e-5, rtol=1e-5)
    assert (plain.values is None) == (fast.values is None) == (not values)
    if plain.values is not None and fast.values is not None:
        torch.testing.assert_close(plain.values, fast.values, atol=1e-5, rtol=1e-5)
    assert (plain.log_counts is None) == (fast.log_counts is None)
    if plain.log_counts is not None and fast.log_counts is not None:
        assert torch.equal(plain.log_counts, fast.log_counts)


@pytest.mark.parametrize("impl", ["naive", pytest.param("cpu", marks=needs_native)])
@pytest.mark.parametrize("token", [-1, 5])
def test_tokens_outside_of_their_span_are_refused(impl: str, token: int) -> None:
    table = SpanTable.build([[[DenseSpan(*torch.randn(2, 5, 16).unbind())]]], head_dim=16)
    with pytest.raises(BadArgument, match="outside"):
        gather_tokens(table, torch.tensor([0]), torch.tensor([token]), device=CPU, impl=impl)


@needs_native
def test_halves_of_every_kind_are_read_exactly() -> None:
    numbers = torch.tensor([0.0, -0.0, 6e-8, -6e-5, 65504, -1.5, math.inf, -math.inf], dtype=torch.float16)
    spans = [[DenseSpan(numbers[None], numbers[None])], [DenseSpan(*torch.randn(2, 1, 8).unbind())]]
    table = SpanTable.build([spans], head_dim=8)
    got = gather_tokens(table, torch.tensor([0]), torch.tensor([0]), device=CPU, impl="cpu").keys
    assert torch.equal(got[0], numbers.float())


def table_with_tail(seed: int = 0) -> SpanTable:
    """Two rows of two heads: pages, dense tokens, and a tail of 3 and 0 tokens."""
    g = torch.Generator().manual_seed(seed)

    def head(pages: int, tokens: int) -> list[DenseSpan | PageSpan]:
        keys, values = torch.randn(2, pages, 64, 16, generator=g).unbind()
        return [
            PageSpan(encode_pages(keys, values, PageFormat(bits=8))),
            DenseSpan(*torch.randn(2, tokens, 16, generator=g)),
        ]

    rows = [[head(2, 100), head(1, 0)], [head(1, 64), head(3, 5)]]
    table = SpanTable.build(rows, head_dim=16, tail=(torch.randn(2, 2, 8, 16), torch.randn(2, 2, 8, 16)))
    table.set_tail_lengths([3, 0])
    return table


def test_a_page_list_reads_what_page_ids_by_entry_read() -> None:
    table, q = table_with_tail(), torch.randn(2, 6, 1, 16)
    by_entry = {0: [1], 1: [0, 1], 3: [], 6: [0], 9: [2, 0]}
    ids = {idx: torch.tensor(x, dtype=torch.int32) for idx, x in by_entry.items()}
    counts = torch.tensor([len(by_entry[e]) if e in by_entry else -1 for e in range(len(table.entries))])
    listed = table.with_page_list(torch.cat([ids[e] for e in sorted(ids)]), counts)
    for impl in ("naive", "auto"):
        expected = attend(q, table.with_page_ids(ids), scale=0.3, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(attend(q, listed, scale=0.3, impl=impl), expected, strict=True))
    assert {idx: x.tolist() for idx, x in listed.page_ids.items()} == by_entry
    assert len(listed.page_ids) == len(by_entry)
    with pytest.raises(BadArgument, match="add up"):
        table.with_page_list(torch.zeros(3, dtype=torch.int32), counts)
    with pytest.raises(BadArgument, match="one count per entry"):
        table.with_page_list(torch.zeros(3, dtype=torch.int32), counts[1:])


def test_all_tokens_of_a_head_are_the_head() -> None:
    table, q = table_with_tail(), torch.randn(2, 6, 1, 16)
    places = [(e, t) for e in range(len(table.entries)) if (e + 1) % 3 for t in range(table.tokens_of(e))]
    entry_ids, token_ids = torch.tensor(places).unbind(1)
    got = gather_tokens(table, entry_ids, token_ids, device=CPU)
    assert got.values is not None
    counts = torch.bincount(entry_ids // 3, minlength=4)
    chosen = table.with_tokens(got.keys, got.values, got.log_counts, counts)
    for impl in ("naive", "auto"):
        for a, b in zip(attend(q, chosen, scale=0.3, impl=impl), attend(q, table, scale=0.3, impl=impl), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3)  # packed products round
    with pytest.raises(BadArgument, match="add up to"):
        table.with_tokens(got.keys, got.values, None, counts + 1)
