"""Allocators that are shown the scores of all layers at once, through the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import steno
from steno.cache.paged import PagedRows
from steno.errors import RecipeError
from steno.recipe import parse_recipe
from steno.types import Need
from tiny import SHARED, prompt, shared

LAYERS, HEADS, DIM = 3, 2, 12
MANY_LAYERS, WIDE = 10, 64


def masses(num_tokens: int, num_layers: int = LAYERS) -> list[Tensor]:
    """Scores of every layer, in which layers and heads differ much."""
    g = torch.Generator().manual_seed(num_tokens)
    return [torch.rand(HEADS, num_tokens, generator=g) ** (1 + 4 * i) for i in range(num_layers)]


def feed(cache: steno.KVCache, num_tokens: int, num_rows: int = 1, seed: int = 0, dim: int = DIM) -> None:
    g = torch.Generator().manual_seed(seed)
    for layer in cache.own_layers:
        q, k, v = (torch.randn(num_rows, n, num_tokens, dim, generator=g) for n in (2 * HEADS, HEADS, HEADS))
        layer.update(k, v)
        out = layer.attend(q, None, scale=dim**-0.5)
        assert torch.isfinite(out).all()


def read(recipe: str, num_tokens: int = 150, num_rows: int = 1) -> steno.KVCache:
    cache = steno.KVCache(shared("llama").config, recipe)
    feed(cache, num_tokens, num_rows)
    if recipe.startswith("kvzip"):
        cache.compress(masses(num_tokens))
    cache.check_integrity()
    return cache


def kept(cache: steno.KVCache, layer: int, row: int = 0) -> list[list[int]]:
    content = cache.own_layers[layer].content
    assert isinstance(content, PagedRows)
    return [positions.tolist() for positions in content.positions(row, cache.own_layers[layer].row_seen[row])]


def test_tokens_of_all_layers_compete() -> None:
    cache = read("kvzip | one_threshold @ 40%")
    stacked = torch.stack(masses(150))
    stacked[:, :, :4] = torch.inf
    best = stacked.flatten().argsort(descending=True)[: int(0.4 * 150) * LAYERS * HEADS]
    expected: list[list[list[int]]] = [[[] for _ in range(HEADS)] for _ in range(LAYERS)]
    for place in sorted(best.tolist()):
        head, token = divmod(place, 150)
        expected[head // HEADS][head % HEADS].append(token)
    assert [kept(cache, layer) for layer in range(LAYERS)] == expected
    assert len({len(head) for layer in expected for head in layer}) > 3


def test_whole_pages_leave_nothing_dense() -> None:
    cache = read("kvzip | one_threshold(unit=64) | int4 @ 80%", 400)
    for layer in cache.own_layers:
        assert isinstance(layer.content, PagedRows)
        assert not any(n % 64 for n in layer.held_tokens()[0])
        assert not layer.content.tail.lengths[0]
    assert sum(n for layer in cache.held_tokens() for n in layer[0]) // 64 == 320 * LAYERS * HEADS // 64
    assert cache.kv_bytes < read("kvzip | one_threshold | int4 @ 80%", 400).kv_bytes


def test_all_layers_are_dense_until_the_last_is_read() -> None:
    recipe = "snapkv(window=8) | one_threshold @ 30%"
    cache, twin = read(recipe), read("snapkv(window=8) @ 30%")
    full = 2 * LAYERS * HEADS * 150 * DIM * 4
    assert cache.kv_bytes_full == full
    assert cache.kv_bytes < 0.4 * full
    assert full <= cache.kv_bytes_peak < 1.4 * full
    assert twin.kv_bytes_peak < full


def test_rows_are_chosen_by_themselves() -> None:
    recipe = "keydiff | one_threshold @ 50"
    both = read(recipe, num_rows=2)
    assert kept(both, 1, 0) != kept(both, 1, 1)
    for row in range(2):
        assert sum(len(head) for layer in range(LAYERS) for head in kept(both, layer, row)) == 50 * LAYERS * HEADS


@pytest.mark.parametrize("recipe", ["keydiff | one_threshold @ 100%", "keydiff | one_threshold @ 400"])
def test_a_budget_that_holds_all_keeps_all(recipe: str) -> None:
    assert {n for layer in read(recipe).held_tokens() for row in layer for n in row} == {150}


@pytest.mark.parametrize("budget", ["100kB", "70kB"])
@pytest.mark.parametrize("stage", ["int4", "turboquant", "hadamard | int8"])
def test_a_budget_in_bytes_holds(stage: str, budget: str) -> None:
    cache = read(f"kvzip | one_threshold | {stage} @ {budget}", 400)
    assert 0.3 * parse_recipe(f"keydiff @ {budget}").budget.bytes < cache.kv_bytes  # type: ignore[operator]
    assert cache.kv_bytes <= parse_recipe(f"keydiff @ {budget}").budget.bytes  # type: ignore[operator]


@pytest.mark.parametrize(
    ("recipe", "least"),
    [
        ("shorthand", 0.9), ("kvzip(window=8) | one_threshold(unit=64) | gear", 0.85),
        ("kvzip(window=8) | one_threshold | int4", 0.85), ("snapkv(window=8) | adakv | int4", 0.85),
        ("snapkv(window=8) | int4", 0.85), ("snapkv(window=8) | adakv | chelsea | int8", 0.85),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("num_tokens", "share"), [(640, 0.13), (900, 0.15), (1333, 0.09)])
def test_a_budget_in_bytes_is_used(recipe: str, least: float, num_tokens: int, share: float) -> None:
    """share: of the dense prompt."""
    full = MANY_LAYERS * HEADS * num_tokens * 2 * WIDE * 4
    config = LlamaConfig(**{**SHARED, "head_dim": WIDE, "num_hidden_layers": MANY_LAYERS})
    cache = steno.KVCache(config, f"{recipe} @ {int(share * full)}B")
    feed(cache, num_tokens, dim=WIDE)
    if Need.REPLAY in cache.recipe.needs:
        cache.compress(masses(num_tokens, MANY_LAYERS))
    cache.check_integrity()
    assert least * share * full <= cache.kv_bytes <= share * full


@pytest.mark.parametrize(
    "recipe",
    [
        "snapkv(window=8) | one_threshold | ems | int4 @ 80", "h2o | one_threshold @ 50", "tova | one_threshold @ 50",
        "keydiff | one_threshold | rotatekv | int4 @ 100", "heavy_hitters | one_threshold | quest(tokens=64) @ 100",
        "zipvl_attention | keydiff | one_threshold(unit=16) | gear @ 100",
    ],
)  # fmt: skip
def test_it_composes_and_decodes(recipe: str) -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, recipe)
    ids = model.generate(prompt(150), past_key_values=cache, max_new_tokens=70, do_sample=False)
    assert ids.shape == (1, 220)
    cache.check_integrity()
    cache.fork().check_integrity()


@pytest.mark.parametrize("recipe", ["fastkv | snapkv | one_threshold @ 20%", "snapkv | one_threshold | xkv @ 20%"])
def test_what_cannot_be_compared_is_refused(recipe: str) -> None:
    with pytest.raises(RecipeError, match=r"one_threshold .* use"):
        parse_recipe(recipe)
