"""What is observed of a prompt does not depend on the chunks that it is read in, nor on padding."""

from types import SimpleNamespace

import pytest
import torch

from steno.cache.prompt import Prompt
from steno.cache.tokens import NewTokens
from steno.errors import CacheError
from steno.pipeline import RecipePolicy
from steno.recipe import parse_recipe
from steno.types import Need, Rope

HEADS, KV_HEADS, DIM, SCALE = 4, 2, 16, 0.4
ROPE = Rope(inv_freq=10.0 ** -torch.arange(0, 1, 2 / DIM), attention_scaling=1.3)


def observe(recipe, q, k, v, chunks, counts=None):
    """The observations of all rows after the prompt was read in chunks of so many tokens, and the attention."""
    policy = RecipePolicy(parse_recipe(recipe)) if isinstance(recipe, str) else recipe
    outs, start, prompt = [], 0, None
    for size in chunks:
        part = [x[:, :, start : start + size] for x in (q, k, v)]
        hidden = hidden_of(part[0])
        new = NewTokens(q=part[0], k=part[1], v=part[2], counts=counts, scale=SCALE, hidden=hidden)
        prompt = prompt or Prompt(policy, lambda device: ROPE, new)
        outs.append(prompt.read(new))
        start += size
    options = {"layer_idx": 0, "num_layers": 1, "budget_tokens": 9, "replay_mass": None}
    kvs = [prompt.layer_kv(b) for b in range(len(prompt.observers))]
    seen = [observer.observation(kv, **options) for observer, kv in zip(prompt.observers, kvs, strict=True)]
    return seen, torch.cat(outs, dim=2)


def hidden_of(q):
    """What stands for the input of the attention module: the queries of all heads side by side, `[B, T, H * D]`."""
    return q.transpose(1, 2).flatten(2)


def looking_at(*needs):
    """A policy that only looks."""
    return SimpleNamespace(needs=frozenset(needs), query_window=0, query_statistics_skip=0, router=None)


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


@pytest.mark.parametrize("chunks", [(100,), (1, 99), (90, 10)])
def test_before_rotation_and_before_attention(chunks):
    q, k, v = tokens(2, 100)
    needs = looking_at(Need.PRE_ROPE_QUERIES, Need.PRE_ROPE_KEYS, Need.HIDDEN_STATES)
    seen, _ = observe(needs, q, k, v, chunks)
    for row, observation in enumerate(seen):
        torch.testing.assert_close(observation.pre_rope_queries, unrotated(q[row]).float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(observation.pre_rope_keys, unrotated(k[row]).float(), rtol=1e-4, atol=1e-5)
        assert torch.equal(observation.hidden_states, hidden_of(q)[row])
    seen, _ = observe(needs, q, k, v, (100,), counts=[100, 7])
    assert torch.equal(seen[1].hidden_states, hidden_of(q)[1, 93:])
    torch.testing.assert_close(seen[1].pre_rope_keys, unrotated(k[1, :, 93:]).float(), rtol=1e-4, atol=1e-5)


def test_nothing_is_gathered_that_nobody_needs():
    seen, _ = observe(looking_at(), *tokens(1, 20), (20,))
    assert (seen[0].pre_rope_queries, seen[0].pre_rope_keys, seen[0].hidden_states) == (None, None, None)


def test_hidden_states_that_are_not_shown_are_asked_for():
    q, k, v = tokens(1, 9)
    new = NewTokens(q=q, k=k, v=v, counts=None, scale=SCALE)
    prompt = Prompt(looking_at(Need.HIDDEN_STATES), lambda device: ROPE, new)
    with pytest.raises(CacheError, match=r"cache\.watching\(model\)"):
        prompt.read(new)
