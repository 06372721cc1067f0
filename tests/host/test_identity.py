"""With the recipe `full`, generate() gives the tokens of transformers' own DynamicCache, whatever the model and the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, set_seed

import steno
from tiny import CONFIGS, build, prompt, shared

NEW_TOKENS = 16


@contextmanager
def attention(model: Any, name: str) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def generate(model: Any, cache: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    set_seed(7)
    options.setdefault("attention_mask", torch.ones_like(ids))
    options.setdefault("do_sample", False)
    return model.generate(ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, **options)


def padded(rows: int = 3) -> dict[str, torch.Tensor]:
    ids, mask = prompt(30, rows), torch.ones(rows, 30, dtype=torch.long)
    for b, pad in enumerate((0, 7, 19)[:rows]):
        ids[b, :pad], mask[b, :pad] = 0, 0
    return {"ids": ids, "attention_mask": mask}


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: {"ids": prompt(29)},
    "single-token-prompt": lambda: {"ids": prompt(1)},
    "sampling": lambda: {"ids": prompt(29, 2), "do_sample": True, "temperature": 0.9, "top_k": 20},
    "beams": lambda: {"ids": prompt(21, 2), "num_beams": 3},
    "prompt-lookup": lambda: {"ids": prompt(9).repeat(1, 4), "prompt_lookup_num_tokens": 5},
    "prefill-chunks": lambda: {"ids": prompt(30), "prefill_chunk_size": 7},
    "left-padding": padded,
    "left-padded-beams": lambda: {**padded(2), "num_beams": 2},
    "left-padded-chunks": lambda: {**padded(), "prefill_chunk_size": 11},
    "return-sequences": lambda: {"ids": prompt(15), "num_return_sequences": 3, "do_sample": True},
    "long-prompt": lambda: {"ids": prompt(150)},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_full_is_token_identical(name: str, way: str) -> None:
    model = shared(name)
    ours, theirs = WAYS[way](), WAYS[way]()
    baseline = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    with attention(model, baseline):
        expected = generate(model, DynamicCache(config=model.config), **theirs)
    with attention(model, "steno"):
        cache = steno.KVCache(model.config, "full")
        out = generate(model, cache, **ours)
    assert torch.equal(out, expected)
    cache.check_integrity()


@pytest.mark.parametrize("name", CONFIGS)
def test_assistant_model(name: str) -> None:
    model, assistant = build(name), build(name, seed=0)
    with torch.no_grad():  # close to the model, so that some drafts are accepted and some are not
        for parameter in assistant.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    model.set_attn_implementation("eager")
    assistant.set_attn_implementation("eager")
    expected = generate(model, DynamicCache(config=model.config), prompt(20), assistant_model=assistant)
    model.set_attn_implementation("steno")
    out = generate(model, steno.KVCache(model.config), prompt(20), assistant_model=assistant)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_second_turn_continues_the_first(name: str) -> None:
    model, turns = shared(name), [prompt(23), prompt(9, seed=1), prompt(80, seed=2)]
    outs = []
    for implementation in ("eager", "steno"):
        with attention(model, implementation):
            cache = steno.KVCache(model.config) if implementation == "steno" else DynamicCache(config=model.config)
            ids = torch.zeros(1, 0, dtype=torch.long)
            for turn in turns:
                ids = generate(model, cache, torch.cat([ids, turn], dim=1))
            outs.append(ids)
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_agree_closely(name: str) -> None:
    model, ids = shared(name), prompt(70)
    with torch.no_grad(), attention(model, "eager"):
        expected = model(ids).logits
    with torch.no_grad(), attention(model, "steno"):
        cache = steno.KVCache(model.config)
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 33), (33, 34), (34, 50), (50, 70))]
    assert torch.allclose(torch.cat(parts, dim=1), expected, atol=2e-4, rtol=2e-4)
