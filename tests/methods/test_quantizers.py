"""Every quantizer at work in a model: what is encoded is encoded once, and what is decoded is near what was read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_layers import with_files

import steno
from steno.cache.segment import DenseSegment, Segment
from steno.methods import QUANTIZERS
from steno.types import Need
from tiny import prompt, shared

NAMES = [name for name, cls in QUANTIZERS.items() if Need.IMAGE_MASK not in cls.needs]
"""Methods that look at images have tests in tests/host."""
COARSE = {"int2", "kivi", "vidkv", "gear", "zipcache", "commvq"}
"""Two bits and fewer, for some tokens at least: with a random model little can be said of the logits."""


def read(recipe: str, length: int) -> tuple[Any, Any]:
    """A model, and its cache after a prompt."""
    model = shared("llama")
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, with_files(recipe, layers=3, hkv=2, dim=12))
    with torch.no_grad():
        model(prompt(length), past_key_values=cache)
    return model, cache


def segments(cache: Any) -> list[Segment]:
    """Of the second layer, without what lies dense."""
    return [s for s in cache.own_layers[1].content.rows[0].segments if not isinstance(s, DenseSegment)]


@pytest.mark.parametrize("name", NAMES)
def test_a_token_is_encoded_once(name: str) -> None:
    model, cache = read(name, 140)
    before = [(k.clone(), v.clone()) for k, v in _decoded(cache)]
    with torch.no_grad():
        for count in (130, 1, 1):
            assert model(prompt(count, seed=count), past_key_values=cache).logits.isfinite().all()
    assert segments(cache)
    for (k, v), (k2, v2) in zip(before, _decoded(cache), strict=True):
        assert k2.shape[0] > k.shape[0]
        assert torch.equal(k2[: k.shape[0]], k)
        assert torch.equal(v2[: v.shape[0]], v)
    cache.own_layers[1].check_integrity()


def _decoded(cache: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    parts = [segment.decode(torch.float32) for segment in segments(cache)]
    if not parts:
        return [(torch.zeros(0, 12), torch.zeros(0, 12))] * 2
    return [(torch.cat([p[h][0] for p in parts]), torch.cat([p[h][1] for p in parts])) for h in range(len(parts[0]))]


@pytest.mark.parametrize("name", sorted(set(NAMES) - COARSE))
def test_logits_stay_near_those_of_the_full_cache(name: str) -> None:
    logits = []
    for recipe in ("full", name):
        model, cache = read(recipe, 192)
        with torch.no_grad():
            logits.append(model(prompt(3, seed=1), past_key_values=cache).logits.log_softmax(-1))
    full, mine = logits
    kl = (full.exp() * (full - mine)).sum(-1).mean()
    assert float(kl) < (0.05 if name in ("int8", "q8_0", "fp8") else 1.0)
