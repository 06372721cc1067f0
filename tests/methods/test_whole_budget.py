"""A budget of the whole prompt changes nothing: what is held, and what is answered, are those of the full cache, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from composition import tiny_language_model
from steno.methods import ALLOCATORS, MERGERS, SCORERS
from steno.pipeline import with_weights
from steno.recipe import parse_recipe
from tiny import prompt

RECIPES = [
    *(f"{name} @ 100%" for name in SCORERS),
    *(f"keydiff | {name} @ 100%" for name in ALLOCATORS if name != "zipvl"),
    "heavy_hitters | zipvl(tau=1) @ 100%",
    *(f"keydiff | {name} @ 100%" for name in MERGERS),
    *(f"keydiff | adakv | {name} @ 5000" for name in MERGERS),
    "fastkv(share=1) @ 100%",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return tiny_language_model(Path(tmp_path_factory.mktemp("whole")))


def answer(tiny: tuple[Any, Path], text: str) -> tuple[torch.Tensor, Any]:
    """Log-probabilities of some tokens after a prompt, and the cache after them."""
    lm, folder = tiny
    recipe = with_weights(parse_recipe(text), lambda name, command: str(folder / f"{name}.safetensors"))
    ctx = lm.read_tokens(prompt(97)[0].tolist(), recipe)
    steps = ctx.go_on([7], max_new_tokens=5, keep_logprobs=True)
    found = torch.cat([step.logprobs for step in steps if step.logprobs is not None])
    return found, steps.cache


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_whole_budget_is_the_identity(tiny: tuple[Any, Path], recipe: str) -> None:
    found, cache = answer(tiny, recipe)
    full, whole = answer(tiny, "full")
    assert cache.held_tokens() == whole.held_tokens()
    assert torch.equal(found, full)
