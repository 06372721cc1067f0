"""Budgets in bytes of recipes that store tokens: what an error names is enough, and what fits is kept."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import steno
from composition import LEARNED
from steno.calibration import save_calibration
from steno.errors import BudgetError
from steno.methods import QUANTIZERS
from steno.types import Need
from tiny import shared

LAYERS, HEADS, DIM, TOKENS = 3, 2, 12, 300
ENCODERS = [name for name, cls in QUANTIZERS.items() if cls.page_format is None]
CHUNKED = [name for name in ENCODERS if name != "zipcache"]  # which stores any number of tokens
RECIPES = [
    *(f"keydiff | {name}" for name in QUANTIZERS), *(f"keydiff | adakv | {name}" for name in ENCODERS),
    "keydiff", "tova", "h2o | adakv", "keydiff | adakv | int4", "keydiff | quest", "keydiff | fp8 | quest",
    "keydiff | adakv | nvfp4 | quest", "keydiff | int8 | quest", "keydiff | chelsea | gear", "keydiff | pyramidkv | gear",
    "keydiff | hadamard | gear", "keydiff | minicache | gear", "snapkv | gear", "snapkv | int4", "snapkv | kivi", "kvzip | int8",
    "kvzip | one_threshold | kvquant", "shorthand", "keydiff | palu", "keydiff | think", "keydiff | palu | hadamard | int4",
    "keydiff | adakv | think | int4", "keydiff | pyramidkv | cskv", "keydiff | xkv", "keydiff | minicache | int4",
]  # fmt: skip


@pytest.fixture(scope="module")
def codebooks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file for `commvq`, which cannot do without."""
    path = tmp_path_factory.mktemp("learned") / "commvq.safetensors"
    seeded = torch.Generator().manual_seed(0)
    save_calibration(path, {key: torch.randn(*n, generator=seeded) for key, n in LEARNED["commvq"].items()}, {})
    return str(path)


FULL_BYTES = LAYERS * HEADS * TOKENS * 2 * DIM * 4


def held(recipe: str, budget: int, codebooks: str = "", num_layers: int = LAYERS, text: str = "") -> steno.KVCache:
    """Random tokens, all of an image, read under `budget` bytes and found to take no more. text: of the budget."""
    recipe = recipe.replace("commvq", f"commvq(weights={codebooks!r})")
    config = copy.deepcopy(shared("llama").config)
    config.num_hidden_layers = num_layers
    cache = steno.KVCache(config, f"{recipe} @ {text or f'{budget}B'}")
    seeded = torch.Generator().manual_seed(0)
    for layer in cache.own_layers:
        layer.reading.image_mask = torch.ones(1, TOKENS, dtype=torch.bool)
        q, k, v = (torch.randn(1, n, TOKENS, DIM, generator=seeded) for n in (2 * HEADS, HEADS, HEADS))
        layer.show_hidden(torch.randn(1, TOKENS, 48, generator=seeded))
        layer.update(k, v)
        layer.attend(q, None, scale=DIM**-0.5)
    if Need.REPLAY in cache.recipe.needs:
        cache.compress([torch.rand(HEADS, TOKENS, generator=seeded) ** 8 for _ in cache.own_layers])
    cache.check_integrity()
    assert 0 < cache.kv_bytes <= budget
    return cache


def tokens(cache: steno.KVCache) -> int:
    return sum(n for layer in cache.held_tokens() for n in layer[0])


def named(recipe: str, budget: int, codebooks: str) -> int:
    """The bytes that the refusal of a budget says are enough."""
    with pytest.raises(BudgetError, match="must be at least") as caught:
        held(recipe, budget, codebooks)
    return int(re.findall(r"at least (\d+) bytes", str(caught.value))[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_budget_that_an_error_names_is_enough_and_the_least(recipe: str, codebooks: str) -> None:
    least = named(recipe, 1000, codebooks)
    assert tokens(held(recipe, least, codebooks)) >= LAYERS * HEADS
    assert named(recipe, least - LAYERS, codebooks) == least


@pytest.mark.parametrize("recipe", [r for name in CHUNKED for r in (f"keydiff | {name}", f"keydiff | adakv | {name}")])
def test_a_budget_that_holds_no_chunk_beside_dense_remainders_is_used(recipe: str, codebooks: str) -> None:
    remainders = LAYERS * HEADS * 63 * 2 * DIM * 4
    assert tokens(held(recipe, remainders // 2, codebooks)) >= 25 * LAYERS * HEADS
    assert tokens(held(recipe, remainders // 3, codebooks)) >= 12 * LAYERS * HEADS


@pytest.mark.parametrize("recipe", ["keydiff", "tova", "keydiff | adakv | int4", "keydiff | gear", "shorthand"])
@pytest.mark.parametrize("percent", [50, 25])
def test_a_share_of_the_bytes_is_that_many_bytes(recipe: str, percent: int) -> None:
    budget = FULL_BYTES * percent // 100
    one, other = held(recipe, budget), held(recipe, budget, text=f"{percent}% of bytes")
    assert other.held_tokens() == one.held_tokens()
    assert other.kv_bytes == one.kv_bytes


@pytest.mark.parametrize("stored", ["", " | int4", " | gear"])
@pytest.mark.parametrize("budget", [300_000, 600_000])
def test_layers_that_keep_numbers_of_their_own_fit_together(stored: str, budget: int) -> None:
    """Whole tokens add up to more than the mean where there are many layers, and remainders to less than the most."""
    assert held(f"keydiff | pyramidkv{stored}", budget, num_layers=30).kv_bytes > 0.8 * budget


NARROW = ["palu", "cskv", "think", "hadamard", "rotatekv", "palu | int4", "cskv | int4", "think | int4", "rotatekv | int4",
          "palu | hadamard | int4", "xkv", "xkv | int4", "xkv | hadamard | int4", "minicache", "minicache | int4"]  # fmt: skip


@pytest.mark.parametrize("percent", [50, 25])
@pytest.mark.parametrize("recipe", NARROW)
def test_what_is_stored_narrowly_or_in_common_fills_its_budget(recipe: str, percent: int) -> None:
    """Or is whole; a quarter of the budget is left for remainders, which so few tokens do not outweigh."""
    cache = held(f"keydiff | {recipe}", FULL_BYTES * percent // 100)
    whole = tokens(cache) == LAYERS * HEADS * TOKENS
    assert whole or cache.kv_bytes > 0.75 * FULL_BYTES * percent / 100


def test_the_error_says_which_method_needs_more(codebooks: str) -> None:
    with pytest.raises(BudgetError, match="too little for the 64 tokens that snapkv always keeps"):
        held("snapkv | gear", 10_000, codebooks)
    with pytest.raises(BudgetError, match="too little for one token per KV head"):
        held("keydiff | gear", 1000, codebooks)
