"""Tokens that attention appends before it attends, and spans that several rows share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLS

from steno.errors import BadArgument
from steno.kernels import native
from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend
from steno.kernels.quant import encode_pages
from steno.types import PageFormat

NATIVE = [impl for impl in IMPLS if impl != "triton"]  # Triton appends through the table, as naive does
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def span(bits, num_tokens, head_dim, generator):
    keys, values = torch.randn(2, num_tokens, head_dim, generator=generator).unbind()
    if not bits:
        return DenseSpan(keys, values)
    return PageSpan(encode_pages(keys.view(-1, 64, head_dim), values.view(-1, 64, head_dim), PageFormat(bits=bits)))


@pytest.mark.parametrize("impl", NATIVE)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_appending_in_attention_is_appending_before_it(impl, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, heads, group, num_new = (data.draw(st.integers(1, 3)) for _ in range(4))
    head_dim, dtype = data.draw(st.sampled_from([16, 20, 64])), data.draw(DTYPES)
    lengths = [data.draw(st.integers(0, 9)) for _ in range(rows)]
    counts = data.draw(st.none() | st.lists(st.integers(0, num_new), min_size=rows, max_size=rows))
    buffers = torch.randn(2, rows, heads, 12, head_dim, generator=generator).to(dtype)
    spans = [[[span(8, 64, head_dim, generator)] for _ in range(heads)] for _ in range(rows)]
    # as a model makes them: heads last
    keys, values = (
        torch.randn(2, rows, num_new, heads, head_dim, generator=generator).to(dtype).transpose(2, 3).unbind()
    )
    q = torch.randn(rows, heads * group, num_new, head_dim, generator=generator)
    expected_buffers = buffers.clone()
    for b, n in enumerate(lengths):
        count = num_new if counts is None else counts[b]
        for buffer, new in zip(expected_buffers, (keys, values), strict=True):
            buffer[b, :, n : n + count] = new[b, :, num_new - count :]
    expected_lengths = [n + (num_new if counts is None else counts[b]) for b, n in enumerate(lengths)]
    plain = SpanTable.build(spans, head_dim=head_dim, tail=tuple(expected_buffers))
    plain.set_tail_lengths(expected_lengths)
    table = SpanTable.build(spans, head_dim=head_dim, tail=tuple(buffers))
    table.set_tail_lengths(lengths)
    out, lse = attend(q, table, append=(keys, values, counts), scale=0.2, impl=impl)
    assert torch.equal(buffers, expected_buffers)
    assert table.tail_lengths == expected_lengths
    assert torch.equal(table.entries[:, 5], plain.entries[:, 5])
    expected = attend(q, plain, scale=0.2, impl=impl)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


@pytest.mark.parametrize(
    ("new", "counts", "message"),
    [
        (torch.zeros(2, 1, 5, 16), None, "holds 6 tokens; 7"),
        (torch.zeros(2, 2, 1, 16), None, r"\[2, 1, T, 16\]; got \[2, 2, 1, 16\]"),
        (torch.zeros(2, 1, 1, 16), [1, 2], "counts must be 2 numbers from 0 to 1"),
        (torch.zeros(2, 1, 1, 16), [1], "counts must be 2 numbers"),
    ],
)
@pytest.mark.parametrize("impl", NATIVE)
def test_what_does_not_fit_changes_nothing(impl, new, counts, message):
    tail = torch.zeros(2, 1, 6, 16), torch.zeros(2, 1, 6, 16)
    table = SpanTable.build([[[]], [[]]], head_dim=16, tail=tail)
    table.set_tail_lengths([2, 1])
    q = torch.zeros(2, 1, new.shape[2], 16)
    with pytest.raises(BadArgument, match=message):
        attend(q, table, append=(new, new, counts), scale=1.0, impl=impl)
    assert table.tail_lengths == [2, 1]


def test_a_table_without_a_tail_takes_no_tokens():
    table = SpanTable.build([[[DenseSpan(torch.zeros(3, 16), torch.zeros(3, 16))]]], head_dim=16)
    new = torch.zeros(1, 1, 1, 16)
    with pytest.raises(BadArgument, match="no tail"):
        attend(new, table, append=(new, new, None), scale=1.0)


@pytest.mark.parametrize("isa", native.available_isas())
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_rows_that_share_spans_attend_like_rows_that_do_not(isa, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    rows, heads, group = (
        data.draw(st.integers(2, 5)),
        data.draw(st.integers(1, 3)),
        data.draw(st.sampled_from([1, 3, 8])),
    )
    num_queries, bits = data.draw(st.sampled_from([1, 2, 40])), data.draw(st.sampled_from([0, 8, 4, 2]))
    common = [[span(bits, 64 * n, 64, generator) for n in (3, 1)] for _ in range(heads)]
    sharing, apart = [], []
    for _ in range(rows):
        depth = data.draw(st.integers(0, 2))  # some rows share less, some nothing
        own = [span(0, data.draw(st.integers(0, 70)), 64, generator) for _ in range(heads)]
        sharing.append([[*common[h][:depth], own[h]] for h in range(heads)])
    for row in sharing:
        copies = [[copy_of(x) for x in head] for head in row]
        apart.append(copies)
    q = torch.randn(rows, heads * group, num_queries, 64, generator=generator)
    causal = data.draw(st.booleans())
    for num_threads in (1, 2):
        options = {"scale": 0.2, "causal": causal, "isa": isa, "num_threads": num_threads}
        found, found_lse = attend(q, SpanTable.build(sharing, head_dim=64), **options)
        expected, expected_lse = attend(q, SpanTable.build(apart, head_dim=64), **options)
        # the running maximum differs, and with it how coefficients round
        tolerance = {"avx2": 1e-4, "vnni": 2e-4, "bf16": 2e-2}.get(isa, 5e-6)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found_lse, expected_lse, rtol=tolerance, atol=tolerance)


def copy_of(x):
    if isinstance(x, DenseSpan):
        return DenseSpan(x.keys.clone(), x.values.clone())
    return PageSpan(
        type(x.pages)(
            fmt=x.pages.fmt,
            head_dim=x.pages.head_dim,
            **{
                name: getattr(x.pages, name).clone()
                for name in ("key_codes", "value_codes", "key_params", "value_params")
            },
        )
    )


def test_rows_with_nan_do_not_spoil_rows_they_share_with():
    generator = torch.Generator().manual_seed(0)
    common = span(4, 128, 64, generator)
    rows = [[[common, span(0, 5, 64, generator)]] for _ in range(3)]
    q = torch.randn(3, 2, 1, 64, generator=generator)
    q[1] = torch.nan
    out, lse = attend(q, SpanTable.build(rows, head_dim=64), scale=0.2)
    assert out[1].isnan().all()
    assert lse[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
