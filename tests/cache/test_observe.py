"""What is observed of a prompt does not depend on the chunks that it is read in, nor on padding."""

import pytest
import torch

from steno.cache.prompt import Prompt
from steno.cache.tokens import NewTokens
from steno.pipeline import RecipePolicy
from steno.recipe import parse_recipe
from steno.types import Rope

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 16, 0.4
ROPE = Rope(inv_freq=10.0 ** -torch.arange(0, 1, 2 / DIM), attention_scaling=1.3)


def observe(recipe, q, k, v, chunks, counts=None):
    """The observations of all rows after the prompt was read in chunks of so many tokens, and the attention."""
    outs, start, prompt = [], 0, None
    for size in chunks:
        part = [x[:, :, start : start + size] for x in (q, k, v)]
        new = NewTokens(q=part[0], k=part[1], v=part[2], counts=counts, scale=SCALE)
        prompt = prompt or Prompt(RecipePolicy(parse_recipe(recipe)), lambda device: ROPE, new)
        outs.append(prompt.read(new))
        start += size
    options = {"layer_idx": 0, "num_layers": 1, "budget_tokens": 9, "replay_mass": None}
    return [observer.observation(**options) for observer in prompt.observers], torch.cat(outs, dim=2)


def tokens(num_rows, num_tokens):
    generator = torch.Generator().manual_seed(num_tokens)
    q = torch.randn(num_rows, HEADS, num_tokens, DIM, generator=generator)
    return q, *torch.randn(2, num_rows, KV_HEADS, num_tokens, DIM, generator=generator).unbind()


def unrotated(q):
    """Pre-RoPE queries `[H, T, D]` in fp64."""
    angles = torch.arange(q.shape[1])[:, None].double() * ROPE.inv_freq.double()
    pairs = torch.complex(*q.double().chunk(2, dim=2))
    plain = pairs * torch.polar(torch.full_like(angles, 1 / ROPE.attention_scaling), -angles)
    return torch.cat([plain.real, plain.imag], dim=2)


def column_sums(q, k):
    """`[H, S]` in fp64."""
    logits = q.double() @ k.double().repeat_interleave(HEADS // KV_HEADS, dim=0).mT * SCALE
    return logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -torch.inf).softmax(2).sum(1)


@pytest.mark.parametrize("chunks", [(1200,), (1, 599, 600), (513, 687)])
def test_query_statistics(chunks):
    q, k, v = tokens(1, 1200)
    (seen,), _ = observe("expected_attention(n_sink=3) @ 50%", q, k, v, chunks)
    plain = unrotated(q[0])[:, 3:]
    mean = plain.mean(1)
    covariance = plain.mT @ plain / plain.shape[1] - mean[:, :, None] * mean[:, None, :]
    torch.testing.assert_close(seen.query_mean, mean.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.query_cov, covariance.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunks", [(200,), (1, 99, 100), (150, 50)])
def test_mass_and_attention(chunks):
    q, k, v = tokens(2, 200)
    seen, out = observe("h2o @ 50%", q, k, v, chunks)
    for row, observation in enumerate(seen):
        torch.testing.assert_close(
            observation.attention_mass, column_sums(q[row], k[row]).float(), rtol=1e-4, atol=1e-5
        )
    _, plain = observe("full", q, k, v, (200,))
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_padding_is_not_seen():
    q, k, v = tokens(2, 90)
    seen, out = observe("h2o @ 50%", q, k, v, (90,), counts=[90, 40])
    torch.testing.assert_close(seen[1].attention_mass, column_sums(q[1, :, 50:], k[1, :, 50:]).float())
    _, alone = observe("full", q[1:, :, 50:], k[1:, :, 50:], v[1:, :, 50:], (40,))
    torch.testing.assert_close(out[1:, :, 50:], alone)


@pytest.mark.parametrize("chunks", [(100,), (1, 99), (90, 10)])
def test_last_queries(chunks):
    q, k, v = tokens(1, 100)
    (seen,), _ = observe("snapkv(window=32) @ 50%", q, k, v, chunks)
    assert torch.equal(seen.queries, q[0, :, -32:])
