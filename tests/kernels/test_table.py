"""Span tables: what is refused, what is shared, what stays alive."""

import gc

import pytest
import torch

from steno.errors import BadArgument
from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend
from steno.kernels.quant import encode_pages
from steno.types import PageFormat


def dense(num_tokens, head_dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DenseSpan(*torch.randn(2, num_tokens, head_dim, generator=generator).unbind())


def paged(head_dim=16):
    return PageSpan(encode_pages(*torch.randn(2, 2, 64, head_dim).unbind(), PageFormat(bits=4)))


def one_span():
    return SpanTable.build([[[dense(3)]]], head_dim=16)


def test_tail_lengths_change_only_the_last_spans():
    table = SpanTable.build([[[paged(), dense(90)], [dense(80)]], [[dense(70), dense(80)], [dense(80)]]], head_dim=16)
    assert table.offsets.tolist() == [0, 2, 3, 5, 6]
    table.set_tail_lengths([5, 80])
    assert [table.tokens_of(i) for i in range(6)] == [128, 5, 5, 70, 80, 80]


@pytest.mark.parametrize("lengths", [[81], [-1], [1, 1]])
def test_tail_lengths_that_do_not_fit_are_refused(lengths):
    table = SpanTable.build([[[dense(90)], [dense(80)]]], head_dim=16)
    with pytest.raises(BadArgument, match="length"):
        table.set_tail_lengths(lengths)
    assert table.tokens_of(0) == 90


@pytest.mark.parametrize("spans", [[], [paged()]])
def test_only_dense_tails_have_a_length(spans):
    with pytest.raises(BadArgument, match="length"):
        SpanTable.build([[spans]], head_dim=16).set_tail_lengths([1])


def test_page_ids_leave_the_first_table_as_it_was():
    table = SpanTable.build([[[dense(130)]]], head_dim=16)
    q = torch.randn(1, 1, 1, 16)
    before = attend(q, table, scale=0.5)[0]
    page = attend(q, table.with_page_ids({0: torch.tensor([1], dtype=torch.int32)}), scale=0.5)[0]
    span = table.rows[0][0][0]
    alone = SpanTable.build([[[DenseSpan(span.keys[64:128], span.values[64:128])]]], head_dim=16)
    torch.testing.assert_close(page, attend(q, alone, scale=0.5)[0])
    assert torch.equal(attend(q, table, scale=0.5)[0], before)
    as_list = table.with_page_ids([torch.tensor([1], dtype=torch.int32)])
    assert torch.equal(attend(q, as_list, scale=0.5)[0], page)


def test_a_table_keeps_its_tensors_alive():
    def build():
        pages = encode_pages(*torch.ones(2, 40, 64, 16).unbind(), PageFormat(bits=8))
        table = SpanTable.build([[[PageSpan(pages)]]], head_dim=16)
        return table.with_page_ids({0: torch.arange(40, dtype=torch.int32)})

    table = build()
    gc.collect()
    noise = [torch.full((40, 1024), 77, dtype=torch.uint8) for _ in range(50)]
    out, _ = attend(torch.ones(1, 1, 1, 16), table, scale=0.5)
    torch.testing.assert_close(out, torch.ones_like(out))
    assert len(noise) == 50


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SpanTable.build([], head_dim=16), "same number of KV heads"),
        (lambda: SpanTable.build([[[]], [[], []]], head_dim=16), "same number of KV heads"),
        (lambda: SpanTable.build([[[dense(3)]]], head_dim=8), "head_dim 8; got 16"),
        (lambda: DenseSpan(torch.zeros(3, 8), torch.zeros(2, 8)), "must both be"),
        (lambda: DenseSpan(torch.zeros(3, 8), torch.zeros(3, 8).half()), "one dtype"),
        (lambda: DenseSpan(torch.zeros(3, 8).double(), torch.zeros(3, 8).double()), "fp32, bf16 or fp16"),
        (lambda: DenseSpan(torch.zeros(8, 3).T, torch.zeros(8, 3).T), "contiguous"),
        (lambda: DenseSpan(torch.zeros(3, 8), torch.zeros(3, 8), torch.zeros(2)), r"log_counts must be \[3\]"),
        (lambda: PageSpan(paged().pages, torch.zeros(64)), r"log_counts must be \[128\]"),
        (lambda: one_span().with_page_ids({1: torch.zeros(1, dtype=torch.int32)}), "existing"),
        (lambda: one_span().with_page_ids({0: torch.zeros(1)}), "int32"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(BadArgument, match=message):
        build()
