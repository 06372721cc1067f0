"""Every stored form through a cache: it decodes on, with finite output, whatever the shape of the model."""

from __future__ import annotations

import pytest
import torch
from random_layers import with_files
from transformers import LlamaConfig

import steno
from steno.cache.accounting import held_bytes
from steno.methods import MERGERS, QUANTIZERS, SHARERS, TRANSFORMS
from steno.recipe import parse_recipe
from steno.types import Need
from tiny import SHARED, prompt, shared

FORMS = {name: cls for name, cls in QUANTIZERS.items() if Need.IMAGE_MASK not in cls.needs}
"""Methods that look at images have tests in tests/host."""
RECIPES = [
    *(f"keydiff | adakv | {name} @ 52" for name in MERGERS),
    *(f"keydiff | {name} | int8 @ 140" for name in MERGERS),
    *FORMS,
    *(f"keydiff | adakv | {name} @ 140" for name in FORMS),
    *(f"{name} | int8" for name in TRANSFORMS),
    *(
        f"keydiff | {'pyramidkv' if cls.heads_together else 'adakv'} | {name} | int8 @ 140"
        for name, cls in TRANSFORMS.items()
    ),
    *(f"keydiff | {name} | hadamard @ 140" for name in TRANSFORMS),
    *(f"think | {name}" for name, cls in FORMS.items() if cls().page_format is not None),
    *SHARERS,
    *(f"keydiff | pyramidkv | {name} | hadamard | int8 @ 140" for name in SHARERS),
    "hadamard | int4 | quest(tokens=64, dense_layers=0)",
]


def feed(cache: steno.KVCache, count: int, dim: int, group: int, seed: int) -> None:
    """So many random tokens, for every layer."""
    g = torch.Generator().manual_seed(seed)
    for layer in cache.own_layers:
        q = torch.randn(1, 2 * group, count, dim, generator=g)
        layer.update(*(torch.randn(1, 2, count, dim, generator=g) for _ in range(2)))
        out = layer.attend(q, None, scale=dim**-0.5)
        assert out.shape == q.shape
        assert torch.isfinite(out).all()
    cache.check_integrity()


@pytest.mark.parametrize(("num_tokens", "dim", "group"), [(1, 64, 1), (131, 80, 3), (200, 128, 8)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_any_shape_decodes(recipe: str, num_tokens: int, dim: int, group: int) -> None:
    config = LlamaConfig(**{**SHARED, "head_dim": dim, "num_attention_heads": 2 * group, "num_hidden_layers": 2})
    cache = steno.KVCache(config, with_files(recipe, layers=2, hkv=2, group=group, dim=dim))
    assert str(parse_recipe(recipe)) == recipe
    feed(cache, num_tokens, dim, group, 0)
    held = cache.kv_bytes
    assert held == held_bytes(list(cache.layers))
    if num_tokens == 200 and not (cache.recipe.transform or cache.recipe.share):  # a basis pays off in longer prompts
        assert held < cache.kv_bytes_full
    twin = cache.fork()
    for i, count in enumerate([1, 3, 50, *[1] * 16, 70, 1]):
        feed(cache, count, dim, group, i)
    assert twin.kv_bytes == held
    cache.batch_repeat_interleave(2)
    cache.check_integrity()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_generates(recipe: str) -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, with_files(recipe, layers=3, hkv=2, dim=12))
    ids = model.generate(prompt(90), past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert ids.shape == (1, 95)
    assert cache.seen_tokens == 94
