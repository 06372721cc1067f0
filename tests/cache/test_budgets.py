"""Budgets hold after every step, and evictors drop what their paper says."""

from __future__ import annotations

import pytest
import torch
from rows import (
    EVICTING,
    HEADS,
    LAYERS,
    Layer,
    close,
    continued,
    forward,
    read,
    tokens,
)
from torch import Tensor

from tiny import OTHER_SHAPES, SHAPE, Shape


@pytest.mark.parametrize(
    ("length", "shape"), [*((n, SHAPE) for n in (10, 24, 25, 60)), *((60, shape) for shape in OTHER_SHAPES)], ids=str
)
@pytest.mark.parametrize("recipe", EVICTING)
def test_budget_holds_after_every_step(recipe: str, length: int, shape: Shape) -> None:
    cache = read(recipe, tokens(length, shape=shape), shape=shape)
    after_prompt = cache.held_tokens()
    excess = shape.kv_heads * LAYERS if "pyramidkv" in recipe else 0  # (L - 1) / 2 tokens each, see PyramidKV
    for i, count in enumerate([1] * 16 + [7, 1, 100, 1]):
        forward(cache, tokens(count, seed=i, shape=shape))
        held = cache.held_tokens()
        assert sum(n for layer in held for n in layer[0]) <= 24 * shape.kv_heads * LAYERS + excess
        if "pyramidkv" not in recipe:
            assert all(sum(layer[0]) == shape.kv_heads * min(24, cache.seen_tokens) for layer in held)
        if length > 24:
            assert held == after_prompt


@pytest.mark.parametrize("length", [3, 12, 60])
def test_streaming_keeps_sinks_and_latest(length: int) -> None:
    cache = read("streaming_llm(n_sink=3) @ 12", tokens(length))
    for i in range(40):
        seen = length + i
        expected = set(range(3)) | set(range(max(0, seen - 9), seen)) if seen > 12 else set(range(seen))
        for layer in cache.own_layers:
            assert [set(p.tolist()) for p in layer.content.positions(0, seen)] == [expected] * HEADS
        forward(cache, tokens(1, seed=i))


@pytest.mark.parametrize("shape", [SHAPE, *OTHER_SHAPES], ids=str)
@pytest.mark.parametrize(
    "recipe",
    [
        "h2o @ 12",
        "h2o(heavy_share=0.75) | adakv @ 12",
        "tova @ 12",
        "keyformer(noise=False, tau_end=9, anneal_tokens=8) @ 12",
    ],
)
@pytest.mark.parametrize("length", [8, 40])
def test_evictors_follow_the_oracle(recipe: str, length: int, shape: Shape) -> None:
    layer, num_heads = Layer(recipe, shape=shape), shape.kv_heads
    q, _ = layer.feed(length)
    kept = [set(range(length))] * num_heads
    weights = torch.stack(layer.attend(q, kept)[1])  # [H, T, S]
    score = tova_step(weights[:, -1], num_heads) if "tova" in recipe else gathered(weights, num_heads)
    kept = layer.kept()
    if length > 12 and "adakv" not in recipe:
        assert kept == [drop(recipe, score[h], set(range(length)), 12) for h in range(num_heads)]
    budgets = [max(len(head), 12) if length <= 12 else len(head) for head in kept]
    for i in range(30):
        new = layer.keys.shape[1]
        q, out = layer.feed(1)
        kept = [head | {new} for head in kept]
        expected, weights_now = layer.attend(q, kept)
        assert close(out, expected, 1e-5)
        score = torch.cat([score, torch.zeros(num_heads, 1)], dim=1)
        step = torch.stack(weights_now)[:, 0]
        if "keyformer" in recipe:  # at a temperature that rises from 1 to 9 in 8 tokens
            step = step ** (1 / (1 + min(i + 1, 8)))
            step = step / step.sum(1, keepdim=True)
        score = tova_step(step, num_heads) if "tova" in recipe else score + gathered(step[:, None], num_heads)
        kept = [drop(recipe, score[h], head, n) for h, (head, n) in enumerate(zip(kept, budgets, strict=True))]
        assert layer.kept() == kept


def gathered(weights: Tensor, num_heads: int) -> Tensor:
    """What each token got of all queries of its KV head."""
    return weights.sum(1).reshape(num_heads, -1, weights.shape[2]).sum(1)  # [Hkv, S]


def tova_step(weights: Tensor, num_heads: int) -> Tensor:
    return weights.mean(0).repeat(num_heads, 1)  # [Hkv, S]


def drop(recipe: str, score: Tensor, kept: set[int], budget: int) -> set[int]:
    """Down to the budget, one by one: H2O and Keyformer shield the newest, TOVA nothing."""
    share = 0.75 if "0.75" in recipe else 0.5
    recent = {"h2o": budget - int(share * budget), "key": int(0.3 * budget)}.get(recipe[:3], 0)
    shielded = set(sorted(kept)[len(kept) - recent :]) if recent else set()
    while len(kept) > budget:
        kept = kept - {min(kept - shielded, key=lambda p: (float(score[p]), -p))}
    return kept


@pytest.mark.parametrize("score", ["streaming_llm", "snapkv(window=4)", "tova", "h2o", "keydiff", "expected_attention"])
@pytest.mark.parametrize("budget", ["100%", "5000"])
def test_a_budget_of_everything_keeps_everything(score: str, budget: str) -> None:
    cache, full = read(f"{score} @ {budget}", tokens(90)), read("full", tokens(90))
    assert close(continued(cache, tokens(80, seed=1), 20), continued(full, tokens(80, seed=1), 20))
    assert cache.held_tokens() == full.held_tokens()
