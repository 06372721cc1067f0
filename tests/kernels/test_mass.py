"""Attention mass and weights against a full matrix of attention."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.errors import BadArgument
from steno.kernels.attention import attention_mass, attention_weights


def full_attention(q, k, scale, softcap, offset):
    """`[H, T, S]` in fp64."""
    k = k.double().repeat_interleave(q.shape[0] // k.shape[0], dim=0)
    x = q.double() @ k.transpose(1, 2) * scale
    x = softcap * torch.tanh(x / softcap) if softcap else x
    seen = torch.ones(x.shape[1:], dtype=torch.bool).tril(offset)
    return x.masked_fill(~seen, -torch.inf).softmax(2)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 40)),
    block=st.integers(1, 50),
    softcap=st.sampled_from([None, 2.0]),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_mass_and_weights(shape, block, softcap, seed):
    kv_heads, group, num_queries, offset = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(kv_heads * group, num_queries, 8, generator=generator)
    k = torch.randn(kv_heads, offset + num_queries, 8, generator=generator)
    expected = full_attention(q, k, 0.7, softcap, offset)
    weights = attention_weights(q, k, scale=0.7, softcap=softcap)
    torch.testing.assert_close(weights, expected.float(), rtol=1e-5, atol=1e-6)
    mass = attention_mass(q, k, scale=0.7, softcap=softcap, offset=offset, block=block)
    torch.testing.assert_close(mass, expected.sum(1).float(), rtol=1e-5, atol=1e-5)


def test_keys_beyond_the_last_query_get_nothing():
    q, k = torch.randn(2, 5, 8), torch.randn(1, 30, 8)
    mass = attention_mass(q, k, scale=1.0, offset=10)
    torch.testing.assert_close(mass[:, :15], attention_mass(q, k[:, :15], scale=1.0, offset=10))
    assert not mass[:, 15:].any()


def test_offsets_and_lengths_that_cannot_be():
    q, k = torch.randn(2, 5, 8), torch.randn(1, 3, 8)
    with pytest.raises(BadArgument, match="must include"):
        attention_weights(q, k, scale=1.0)
    with pytest.raises(BadArgument, match="at least 0"):
        attention_mass(q, k, scale=1.0, offset=-1)
