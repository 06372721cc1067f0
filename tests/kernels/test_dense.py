"""Many queries over dense keys: the native kernels against the textbook in fp64, in every instruction set."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument
from steno.kernels import native
from steno.kernels.attention import dense
from steno.kernels.attention.mass import attention_mass, max_attention, naive_max_attention
from steno.kernels.attention.prefill import attention_and_lse, causal_attention, causal_attention_and_mass

ISAS = native.available_isas()
pytestmark = pytest.mark.skipif(not ISAS, reason="the native library is not built")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.one_of(st.sampled_from([1, 5, 6, 7, 63, 64, 65, 96, 97, 130]), st.integers(1, 200))


def textbook(q, k, v, scale, causal):
    """Attention and log-sum-exp in the dtype of the tensors; if causal, the queries are the last tokens."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * scale
    if causal:
        logits = logits.masked_fill(
            torch.ones(logits.shape[2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2]), -math.inf
        )
    return logits.softmax(3) @ v, logits.logsumexp(3)


def column_sums(q, k, scale):
    """The attention that each key gets from all queries, `[B, H, S]`; the queries are the last tokens."""
    logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).transpose(2, 3) * scale
    future = torch.ones(logits.shape[2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
    return logits.masked_fill(future, -math.inf).softmax(3).sum(2)


@st.composite
def cases(draw):
    """q `[B, H, T, D]`, k and v `[B, Hkv, S, D]`, and the options of attention."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    num_queries, causal = draw(SIZES), draw(st.booleans())
    num_keys = num_queries + draw(st.one_of(st.just(0), SIZES)) if causal else draw(SIZES)
    head_dim = draw(st.sampled_from([1, 3, 16, 20, 64, 80, 130]))
    dtype = draw(DTYPES)
    q = torch.randn(batch, kv_heads * group, num_queries, head_dim, generator=generator).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, num_keys, head_dim, generator=generator).to(dtype).unbind()
    return q, k, v, {"scale": head_dim**-0.5 * draw(st.sampled_from([1.0, -1.0, 1e4])), "causal": causal}


@given(case=cases())
@settings(max_examples=50, deadline=None)
def test_attention_is_as_exact_as_the_oracle(case):
    q, k, v, options = case
    exact, exact_lse = textbook(q.double(), k.double(), v.double(), **options)
    plain, plain_lse = textbook(q.float(), k.float(), v.float(), **options)
    # fp32 rounds a logit by a few units of 2^-24 of the largest product in it
    eps = 2e-6 * (1 + q.float().norm(dim=3).max().item() * abs(options["scale"]))
    rounding = torch.finfo(q.dtype).eps * exact.abs().max() if q.dtype != torch.float32 else 0
    for isa in ISAS:
        for num_threads in (1, 2):
            out, lse = dense.flash_attention(q, k, v, isa=isa, num_threads=num_threads, **options)
            assert out.dtype == q.dtype
            assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max() + eps + rounding, isa
            assert (lse - exact_lse).abs().max() <= 2 * (plain_lse - exact_lse).abs().max() + eps, isa


@given(case=cases())
@settings(max_examples=40, deadline=None)
def test_maxima_are_as_exact_as_the_oracle(case):
    q, k, v, options = case
    q, k, scale = q[0], k[0], options["scale"]
    lse = textbook(q[None].double(), k[None].double(), v[:1].double(), scale, False)[1][0].float()
    grouped = q.double().reshape(k.shape[0], -1, q.shape[2])
    exact = (grouped @ k.double().transpose(1, 2) * scale - lse.reshape(k.shape[0], -1, 1)).amax(1).exp()
    plain = naive_max_attention(q, k, lse, scale=scale)
    eps = 2e-6 * (1 + q.float().norm(dim=2).max().item() * abs(scale))
    for isa in ISAS:
        for num_threads in (1, 2):
            found = dense.max_attention(q, k, lse, scale=scale, isa=isa, num_threads=num_threads)
            assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + eps, isa


@pytest.mark.parametrize("isa", ISAS)
def test_logits_that_grow_along_the_keys(isa):
    """The running maximum is replaced in every tile, and what came before must fade to nothing."""
    q, k = torch.ones(1, 1, 7, 1), torch.arange(300.0).reshape(1, 1, 300, 1)
    v = torch.randn(1, 1, 300, 1)
    for scale in (-200.0, -0.3, 0.3, 200.0):
        out, lse = dense.flash_attention(q, k, v, scale=scale, causal=False, isa=isa)
        exact, exact_lse = textbook(q.double(), k.double(), v.double(), scale, False)
        torch.testing.assert_close(out, exact.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, exact_lse.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 0), (0, 3), (0, 0)])
def test_nothing_to_attend(num_queries, num_keys):
    q, k = torch.randn(1, 2, num_queries, 8), torch.randn(1, 1, num_keys, 8)
    out, lse = dense.flash_attention(q, k, k, scale=1.0, causal=False)
    assert out.shape == q.shape
    assert not out.any()
    assert (lse == -math.inf).all()
    assert not dense.max_attention(q[0], k[0], lse[0], scale=1.0).any()


@given(
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 2, 3, 16]), SIZES, st.integers(0, 150)),
    head_dim=st.sampled_from([1, 20, 64, 80, 256]),
    dtype=DTYPES,
    scale=st.sampled_from([0.0, 0.1, -1.0, 300.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=20, deadline=None)
def test_mass_is_that_of_the_oracle(shape, head_dim, dtype, scale, seed):
    batch, kv_heads, group, num_queries, past = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, num_queries, kv_heads * group, head_dim, generator=generator).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, batch, kv_heads, past + num_queries, head_dim, generator=generator).to(dtype).unbind()
    plain = torch.stack([attention_mass(*row, scale=scale, offset=past) for row in zip(q, k, strict=True)])
    exact = column_sums(q.double(), k.double(), scale)
    eps = 2e-6 * (1 + q.float().norm(dim=3).max().item() * abs(scale)) * num_queries
    for isa in ISAS:
        for num_threads in (1, 2):
            options = {"scale": scale, "isa": isa, "num_threads": num_threads}
            out, mass = dense.flash_attention_and_mass(q, k, v, **options)
            assert (mass - exact).abs().max() <= 2 * (plain - exact).abs().max() + eps, isa
            assert torch.equal(out, dense.flash_attention(q, k, v, causal=True, **options)[0])
            assert torch.equal(mass, dense.flash_attention_and_mass(q, k, v, **options)[1]), "not the same twice"


@pytest.mark.parametrize("isa", ISAS)
def test_mass_of_logits_that_grow_along_the_keys(isa):
    """What the weights of a tile are relative to changes from tile to tile."""
    q, k = torch.ones(1, 1, 300, 1), torch.arange(300.0).reshape(1, 1, 300, 1)
    for scale in (-200.0, -0.3, 0.3, 200.0):
        _, mass = dense.flash_attention_and_mass(q, k, k, scale=scale, isa=isa)
        torch.testing.assert_close(mass, column_sums(q.double(), k.double(), scale).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}])
@pytest.mark.parametrize("past", [0, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_prefill_is_the_textbook_on_every_path(options, past, dtype, tmp_path, monkeypatch):
    q, k, v = torch.randn(2, 4, 40, 16, dtype=dtype), *torch.randn(2, 2, 2, 40 + past, 16, dtype=dtype).unbind()
    logits = q.double() @ k.double().repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    logits = logits.masked_fill(torch.ones(40, 40 + past, dtype=torch.bool).triu(1 + past), -math.inf)
    mass = logits.softmax(3).sum(2)
    if "sinks" in options:
        logits = torch.cat([logits, options["sinks"].double().view(1, 4, 1, 1).expand(2, 4, 40, 1)], dim=3)
    expected = logits.softmax(3)[..., : 40 + past] @ v.double().repeat_interleave(2, dim=1)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    for folder in (native.LIBRARY_DIR, tmp_path):
        monkeypatch.setattr(native, "LIBRARY_DIR", folder)
        out = causal_attention(q, k, v, scale=0.3, **options)
        both = causal_attention_and_mass(q, k, v, scale=0.3, **options)
        assert out.dtype == both[0].dtype == dtype
        for got in (out, both[0]):
            torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(both[1].double(), mass, rtol=1e-4, atol=1e-4)


def test_tensors_need_not_be_contiguous():
    q, k, v = torch.randn(3, 1, 50, 4, 8).transpose(2, 3).unbind()
    expected = dense.flash_attention(q.contiguous(), k.contiguous(), v.contiguous(), scale=0.3, causal=True)
    for got, want in zip(dense.flash_attention(q, k, v, scale=0.3, causal=True), expected, strict=True):
        assert torch.equal(got, want)
    lse = expected[1].transpose(1, 2).contiguous().transpose(1, 2)
    found = dense.max_attention(q[0], k[0], lse[0], scale=0.3)
    torch.testing.assert_close(found, naive_max_attention(q[0], k[0], lse[0], scale=0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_the_library_torch_takes_over(dtype, tmp_path, monkeypatch):
    q, k, v = torch.randn(1, 4, 30, 16, dtype=dtype), *torch.randn(2, 1, 2, 30, 16, dtype=dtype).unbind()
    for causal in (False, True):
        fast = attention_and_lse(q, k, v, scale=0.3, causal=causal)
        maxima = max_attention(q[0], k[0], fast[1][0], scale=0.3)
        with monkeypatch.context() as patch:
            patch.setattr(native, "LIBRARY_DIR", tmp_path)
            out, lse = attention_and_lse(q, k, v, scale=0.3, causal=causal)
            tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
            torch.testing.assert_close(out, fast[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse.float(), fast[1].float(), rtol=tolerance, atol=tolerance)
            # beyond the causal part these are no probabilities but powers of e: as exact as their exponent
            torch.testing.assert_close(max_attention(q[0], k[0], fast[1][0], scale=0.3), maxima, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.randn(1, 3, 5, 8)}, "a multiple of 2"),
        ({"q": torch.randn(1, 2, 5, 9)}, "a multiple of 2"),
        ({"q": torch.randn(2, 2, 5, 8)}, "as many rows"),
        ({"q": torch.randn(1, 2, 5, 8, dtype=torch.float64)}, "fp32, bf16 or fp16"),
        ({"v": torch.randn(1, 2, 4, 8)}, "alike"),
        ({"causal": True, "q": torch.randn(1, 2, 7, 8)}, "at least as many keys as queries"),
        ({"isa": "avx511"}, "did you mean 'avx512'"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    good = {"q": torch.randn(1, 2, 5, 8), "k": torch.randn(1, 2, 6, 8), "v": torch.randn(1, 2, 6, 8), "causal": False}
    with pytest.raises(BadArgument, match=message):
        dense.flash_attention(**(good | change), scale=1.0)


def test_maxima_need_one_lse_per_query():
    with pytest.raises(BadArgument, match="one lse per query"):
        dense.max_attention(torch.randn(2, 5, 8), torch.randn(1, 6, 8), torch.randn(2, 6), scale=1.0)
