"""Attention over span tables: the oracle against the textbook, the kernels against the oracle."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import IMPLS, needs_triton, run
from torch.nn.functional import scaled_dot_product_attention

from steno.kernels import native
from steno.kernels.attention import DenseSpan, PageSpan, SpanTable, attend, merge_attention
from steno.kernels.quant import encode_pages
from steno.kernels.quant.codebooks import CODEBOOKS
from steno.types import PageFormat

ISAS = native.available_isas()
needs_native = pytest.mark.skipif(not ISAS, reason="the native library is not built")
HEAD_DIMS = [1, 8, 16, 20, 64, 80, 128, 256]
LENGTHS = st.sampled_from([0, 1, 2, 63, 64, 65, 130])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def page_formats(draw, name):
    """A format of pages with so many bits, or with a codebook."""
    if name not in CODEBOOKS:
        groups = draw(st.sampled_from([16, 32, 64])), draw(st.sampled_from([16, 32, 48, 64, 1000]))
        return PageFormat(bits=name, key_group=groups[0], value_group=groups[1])
    sizes = st.just(1000) if CODEBOOKS[name].whole_token else st.sampled_from([16, 32, 48, 64, 1000])
    return PageFormat(bits=CODEBOOKS[name].bits, key_group=draw(sizes), value_group=draw(sizes), codebook=name)


@st.composite
def spans(draw, head_dim, generator, books):
    name = draw(st.sampled_from([0, 8, 4, 2, *books]))
    if name:
        fmt = draw(page_formats(name))
        keys, values = torch.randn(2, draw(st.integers(1, 3)), 64, head_dim, generator=generator).unbind()
        num_tokens = 64 * len(keys)
    else:
        num_tokens = draw(LENGTHS)
        dtype = draw(DTYPES)
        keys, values = torch.randn(2, num_tokens, head_dim, generator=generator).to(dtype).unbind()
    log_counts = torch.rand(num_tokens, generator=generator) * 3 if draw(st.booleans()) else None
    return PageSpan(encode_pages(keys, values, fmt), log_counts) if name else DenseSpan(keys, values, log_counts)


@st.composite
def cases(draw, most_heads=3, most_queries=70, head_dims=HEAD_DIMS, books=tuple(CODEBOOKS)):
    """Queries, a table, and the options of attend."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads = draw(st.integers(1, most_heads)), draw(st.integers(1, most_heads))
    group = draw(st.integers(1, 8))
    num_queries = draw(st.one_of(st.integers(1, 4), st.integers(1, most_queries)))
    head_dim = draw(st.sampled_from(head_dims))
    rows = [
        [draw(st.lists(spans(head_dim, generator, books), max_size=2)) for _ in range(kv_heads)] for _ in range(batch)
    ]
    lengths = None
    if draw(st.booleans()):
        lengths = [draw(LENGTHS) for _ in range(batch)]
        dtype = draw(DTYPES)
        for row, length in zip(rows, lengths, strict=True):
            for head in row:
                head.append(tail_span(length, head_dim, dtype, generator))
    table = SpanTable.build(rows, head_dim=head_dim)
    if lengths:
        table.set_tail_lengths(lengths)
    if draw(st.booleans()):
        table = table.with_page_ids(draw_page_ids(draw, table))
    q = torch.randn(batch, kv_heads * group, num_queries, head_dim, generator=generator)
    options = {
        "scale": head_dim**-0.5 * draw(st.sampled_from([1.0, 1e4])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "causal": draw(st.booleans()),
    }
    return q, table, options


def tail_span(length, head_dim, dtype, generator):
    """A tail whose spare capacity holds NaN."""
    keys, values = torch.randn(2, length + 70, head_dim, generator=generator).to(dtype).unbind()
    keys[length:] = values[length:] = math.nan
    return DenseSpan(keys, values)


def draw_page_ids(draw, table):
    """Some pages, in any order, of some spans."""
    chosen = {}
    for idx in range(len(table.entries)):
        pages = -(-table.tokens_of(idx) // 64)
        if draw(st.booleans()):
            ids = draw(st.permutations(range(pages)))[: draw(st.integers(0, pages))]
            chosen[idx] = torch.tensor(ids, dtype=torch.int32)
    return chosen


def check_against_the_oracle(case, kernels):
    """Each of `kernels(q, table, **options)` errs at most twice as much as plain fp32 does against fp64."""
    q, table, options = case
    exact, exact_lse = attend(q.double(), table, impl="naive", **options)
    plain, plain_lse = attend(q, table, impl="naive", **options)
    largest = 1 + (options["softcap"] or 1) + q.norm(dim=3).max().item() * options["scale"]
    for name, kernel in kernels.items():
        # fp32 rounds a logit by a few units of 2^-24 of the largest product in it; vnni keeps 14 bits of a coefficient,
        # bf16 8 bits of a query and a weight
        rounds = name.startswith(("avx2", "vnni", "bf16"))
        eps = (1e-2 if name.startswith("bf16") else 1e-3 if rounds else 4e-6) * largest
        allowed = 2 * (plain - exact).abs().max() + eps
        allowed_lse = 2 * (plain_lse - exact_lse).nan_to_num(0).abs().max() + eps
        out, lse = kernel(q, table, **options)
        # with logits of thousands the rounding decides which of two tokens wins
        assert (out - exact).abs().max() <= allowed or (rounds and options["scale"] > 1), name
        assert torch.equal(lse == -math.inf, exact_lse == -math.inf), name
        assert (lse - exact_lse).nan_to_num(0).abs().max() <= allowed_lse, name


@needs_native
@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_native_kernel_is_as_exact_as_the_oracle(case):
    kernels = {f"{isa}, {n} threads": partial(attend, isa=isa, num_threads=n) for isa in ISAS for n in (1, 2)}
    check_against_the_oracle(case, kernels)


@needs_triton
@given(case=cases(most_heads=2, most_queries=4, head_dims=[1, 20, 64, 96], books=()))
@settings(max_examples=10, deadline=None)
def test_triton_kernel_is_as_exact_as_the_oracle(case):
    check_against_the_oracle(case, {"triton": partial(run, "triton")})


@st.composite
def keys_like_a_model(draw, num_tokens, head_dim, generator):
    """Keys with a few channels that are much larger than the others, as rotary models have them."""
    keys = torch.randn(num_tokens, head_dim, generator=generator)
    loud = torch.randint(head_dim, (max(1, head_dim // 32),), generator=generator)
    keys[:, loud] = keys[:, loud] * draw(st.sampled_from([1.0, 10.0])) + draw(st.sampled_from([0.0, 20.0]))
    return keys


@needs_native
@pytest.mark.parametrize("kind", [0, 8, 4, 2, *CODEBOOKS])
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_errors_stay_below_twice_those_of_pytorch_in_bf16(kind, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    head_dim, group = data.draw(st.sampled_from([64, 80, 128, 256])), data.draw(st.sampled_from([1, 3, 8, 16]))
    num_queries, num_pages = data.draw(st.sampled_from([1, 2, 5, 64])), data.draw(st.integers(2, 12))
    keys = data.draw(keys_like_a_model(64 * num_pages, head_dim, generator))
    values = torch.randn(64 * num_pages, head_dim, generator=generator)
    span = DenseSpan(keys.bfloat16(), values.bfloat16())
    if kind:
        pages = (x.view(-1, 64, head_dim) for x in (keys, values))
        span = PageSpan(encode_pages(*pages, data.draw(page_formats(kind))))
    table = SpanTable.build([[[span]]], head_dim=head_dim)
    q, scale = torch.randn(1, group, num_queries, head_dim, generator=generator), head_dim**-0.5
    exact, _ = attend(q.double(), table, scale=scale, causal=False, impl="naive")
    decoded = [
        x.bfloat16()[None, None].expand(-1, group, -1, -1) for x in span.read(64 * num_pages, None, torch.float32)[:2]
    ]
    torchs = scaled_dot_product_attention(q.bfloat16(), *decoded, scale=scale)
    allowed = 2 * (torchs.double() - exact).abs().max()
    for isa in ISAS:
        out, _ = attend(q, table, scale=scale, causal=False, isa=isa)
        assert (out - exact).abs().max() <= allowed, isa


@given(
    head_dim=st.sampled_from(HEAD_DIMS),
    group=st.integers(1, 3),
    num_queries=st.integers(1, 9),
    seed=st.integers(0, 999),
)
@settings(max_examples=30, deadline=None)
def test_oracle_is_textbook_attention(head_dim, group, num_queries, seed):
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 40, head_dim, generator=generator, dtype=torch.float64).float().unbind()
    q = torch.randn(1, 2 * group, num_queries, head_dim, generator=generator, dtype=torch.float64)
    rows = [[[DenseSpan(k[:25], v[:25]), DenseSpan(k[25:], v[25:])] for k, v in zip(keys, values, strict=True)]]
    out, lse = attend(q, SpanTable.build(rows, head_dim=head_dim), scale=0.3, impl="naive")
    for head in range(2 * group):
        for t in range(num_queries):
            seen = 40 - num_queries + t + 1
            weights = [math.exp(0.3 * float(q[0, head, t] @ k)) for k in keys[head // group, :seen].double()]
            expected = sum(w * v for w, v in zip(weights, values[head // group, :seen].double(), strict=True)) / sum(
                weights
            )
            torch.testing.assert_close(out[0, head, t], expected, rtol=1e-9, atol=1e-12)
            assert float(lse[0, head, t]) == pytest.approx(math.log(sum(weights)), abs=1e-5)


def test_softcap_and_log_counts_by_hand():
    keys, values = torch.tensor([[2.0], [-1.0]]), torch.tensor([[1.0], [0.0]])
    table = SpanTable.build([[[DenseSpan(keys, values, torch.tensor([0.0, 1.5]))]]], head_dim=1)
    logits = [3 * math.tanh(2 * 0.5 / 3), 3 * math.tanh(-1 * 0.5 / 3) + 1.5]
    total = sum(math.exp(x) for x in logits)
    for impl in IMPLS:
        out, lse = run(impl, torch.ones(1, 1, 1, 1), table, scale=0.5, softcap=3.0, causal=False)
        assert float(out) == pytest.approx(math.exp(logits[0]) / total, abs=1e-6)
        assert float(lse) == pytest.approx(math.log(total), abs=1e-6)


def long_case(batch, kv_heads, lengths, num_queries=1, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    rows = [
        [[DenseSpan(*torch.randn(2, n, 32, generator=generator).to(dtype).unbind())] for n in lengths[:kv_heads]]
        for _ in range(batch)
    ]
    q = torch.randn(batch, kv_heads * 2, num_queries, 32, generator=generator)
    return q, SpanTable.build(rows, head_dim=32)


@needs_native
@pytest.mark.parametrize("num_threads", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("num_queries", [1, 150])
def test_any_number_of_threads_gives_the_same(num_threads, num_queries):
    # one long head among short ones: several threads share it, and its parts are merged
    q, table = long_case(2, 3, [1, 3000, 70], num_queries)
    expected, expected_lse = attend(q, table, scale=0.3, impl="naive")
    out, lse = attend(q, table, scale=0.3, isa="portable", num_threads=num_threads)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_out_has_the_dtype_of_the_queries(dtype, impl):
    q, table = long_case(1, 2, [100, 20])
    expected, _ = attend(q.to(dtype).float(), table, scale=0.3, impl="naive")
    out, lse = run(impl, q.to(dtype), table, scale=0.3)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    # on the device the products have the dtype of the queries; elsewhere that of the tokens, here bf16, or fp32
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected.to(dtype), rtol=2 * eps, atol=1e-2)


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")  # how Triton's interpreter takes a maximum
def test_queries_with_nan_give_nan_and_only_there():
    q, table = long_case(1, 2, [100, 20])
    q[0, 1, 0, 3] = math.nan
    kernels = [partial(attend, isa=isa) for isa in ISAS] + [partial(run, impl) for impl in IMPLS]
    for kernel in kernels:
        out, _ = kernel(q, table, scale=0.3)
        assert out[0, 1].isnan().all()
        assert not out[0, [0, 2, 3]].isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_keys_give_zero_and_minus_infinity(impl):
    table = SpanTable.build([[[], [DenseSpan(torch.empty(0, 16), torch.empty(0, 16))]]], head_dim=16)
    out, lse = run(impl, torch.randn(1, 4, 3, 16), table, scale=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -math.inf).all()


def test_parts_merge_to_the_whole():
    generator = torch.Generator().manual_seed(3)
    keys, values = torch.randn(2, 200, 16, generator=generator).unbind()
    q = torch.randn(1, 2, 1, 16, generator=generator)

    def part(start, end):
        table = SpanTable.build([[[DenseSpan(keys[start:end], values[start:end])]]], head_dim=16)
        return attend(q, table, scale=0.5, impl="naive")

    parts = [part(0, 70), part(70, 70), part(70, 200)]
    out, lse = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(out, part(0, 200)[0])
    torch.testing.assert_close(lse, part(0, 200)[1])
    empty_out, empty_lse = part(0, 0)
    out, lse = merge_attention([empty_out, empty_out], [empty_lse, empty_lse])
    assert not out.any()
    assert (lse == -math.inf).all()
