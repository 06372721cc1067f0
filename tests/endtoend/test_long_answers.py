"""Every recipe of the results goes on for 256 tokens on the embedded model, with finite output and its budget still held."""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import steno
from steno.cli.document import whole_reference
from steno.models.embedded import DEFAULT_MODEL
from steno.models.folder_cache import default_cache_dir, is_complete
from steno.recipe import parse_recipe
from steno.types import PAGE_TOKENS

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not is_complete(default_cache_dir() / DEFAULT_MODEL), reason="`make model` fetches the model"),
]
PROMPT_TOKENS, NEW_TOKENS, BUDGET = 400, 256, "25%"
LARGE_BASES = ("palu", "cskv", "xkv")
"""Methods whose bases alone take more than a quarter of the bytes of so short a prompt."""
ROOT = Path(__file__).parents[2]


def recipes() -> list[str]:
    """Those of `benchmarks/result_recipes.py`, at one budget."""
    sys.path.insert(0, str(ROOT))  # as a part of `benchmarks`, so that nothing in that folder passes for a package
    try:
        known, _ = importlib.import_module("benchmarks.result_recipes").entries()
    finally:
        sys.path.remove(str(ROOT))
    mine = [entry for entry in known if not entry.is_peer and entry.budget in (None, BUDGET)]
    return [entry.text for entry in mine if not (entry.of_bytes and entry.shows[1] in LARGE_BASES)]


@lru_cache
def model() -> steno.LanguageModel:
    return steno.load()


@lru_cache
def tokens() -> list[int]:
    text, _ = whole_reference()
    return model().tokenize(text[:20_000])[: PROMPT_TOKENS + NEW_TOKENS + 1]


def held(cache: Any) -> torch.Tensor:
    """Held tokens `[L, Hkv]` of the only row."""
    return torch.tensor([heads for [heads] in cache.held_tokens()])


@pytest.mark.parametrize("recipe", recipes())
def test_a_long_answer_is_finite_and_keeps_the_budget(recipe: str) -> None:
    parsed = parse_recipe(recipe)
    ctx = model().read_tokens(tokens()[:PROMPT_TOKENS], recipe)
    before = held(ctx.cache)
    if parsed.budget.in_bytes:
        assert 0 < ctx.cache.kv_bytes <= ctx.cache.kv_bytes_full / 4
    elif parsed.score is not None:
        # the rounding of pyramidkv may give a layer half a token for each layer more
        more = len(before) / 2 if parsed.allocate is not None and parsed.allocate.id == "pyramidkv" else 0
        assert 0 < before.double().mean() <= PROMPT_TOKENS / 4 + more
    steps = ctx.follow_text(tokens()[PROMPT_TOKENS:])
    found = [step.logprobs for step in steps if step.logprobs is not None]
    assert len(found) == NEW_TOKENS
    assert all(bool(torch.isfinite(x).all()) for x in found)
    new = 0 if parsed.evictor is not None else NEW_TOKENS
    assert torch.equal(held(steps.cache), before + new)
    steps.cache.check_integrity()
    if parsed.score is not None and parsed.evictor is None and not parsed.budget.in_bytes:
        # the tail has room for a page, whether it is used or not
        most = (PROMPT_TOKENS / 4 + NEW_TOKENS + PAGE_TOKENS) / (PROMPT_TOKENS + NEW_TOKENS)
        assert steps.cache.kv_bytes < 1.05 * most * steps.cache.kv_bytes_full
