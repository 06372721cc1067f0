"""Methods of different kinds go together, or the recipe says why not; docs/methods.md says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import steno
from composition import (
    ARGUMENTS,
    PAGE,
    PROMPT_TOKENS,
    Pair,
    Tiny,
    compositions,
    methods_table,
    pairs,
    read,
    recipe_of,
    refusal,
    refusals,
    tiny_models,
    with_part,
)
from steno.methods import ALLOCATORS, KINDS, METHODS
from steno.recipe import parse_recipe
from steno.types import Need
from tiny_vlm import build

SAMPLE = 20
"""Every so many-th pair is tried every day."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny_models(Path(tmp_path_factory.mktemp("composition")))


def test_every_method_meets_every_other_kind() -> None:
    met = {cls.id: {other.kind for pair in pairs() if cls in pair for other in pair if other is not cls}
           for cls in METHODS.values()}  # fmt: skip
    kinds = {cls.kind for cls in METHODS.values()}
    assert all(met[cls.id] >= kinds - {cls.kind} for cls in METHODS.values())
    assert kinds <= set(KINDS)
    assert set(ARGUMENTS) <= set(METHODS)
    images = {cls for cls in METHODS.values() if Need.IMAGE_MASK in cls.needs}
    assert {cls for pair in pairs()[::SAMPLE] for cls in pair} >= images


@pytest.mark.parametrize("pair", pairs()[::SAMPLE], ids=recipe_of)
def test_some_pairs(tiny: Tiny, pair: Pair) -> None:
    check_reasons(refusals(tiny, [pair]))


@pytest.mark.slow
def test_all_pairs_and_the_page(tiny: Tiny) -> None:
    refused = refusals(tiny, pairs())
    check_reasons(refused)
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_part(page, "compositions", compositions(refused)), "run `python tests/composition.py`"


def check_reasons(refused: dict[Pair, str]) -> None:
    """Each reason goes on to the way out."""
    for pair, reason in refused.items():
        assert re.search(r": (use|choose|let) ", reason), f"{recipe_of(pair)}: {reason}"


def test_the_page_describes_every_method_as_it_describes_itself() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_part(page, "methods", methods_table()), "run `python tests/composition.py`"


def test_a_refusal_is_told(tiny: Tiny) -> None:
    assert "pages are encoded only once" in refusal(tiny, "tova | int8 @ 100")
    assert refusal(tiny, "full") == ""
    assert parse_recipe(recipe_of((METHODS["adakv"], METHODS["int8"]))).score is not None


def test_the_images_of_the_prompt_are_seen(tiny: Tiny) -> None:
    """Otherwise the pairs would say little of methods that look at images."""
    lm, tokens = tiny.seeing
    blind = build("llava", vocab_size=len(lm.tokenizer))
    blind.set_attn_implementation("steno")
    ids = torch.tensor([tokens])
    with torch.no_grad():
        a, b = (m(ids, past_key_values=steno.KVCache(m.config)).logits[0, -1] for m in (lm.model, blind))
    assert (a - b).abs().max() > 0.1
    assert len(tokens) == len(tiny.plain.tokens) == PROMPT_TOKENS


@pytest.mark.parametrize("budget", ["20%", "40%", "30% of bytes"])
@pytest.mark.parametrize("allocate", [name for name, cls in ALLOCATORS.items() if cls.by_layer])
@pytest.mark.parametrize(
    "propagate", ["fastkv", "fastkv(layer=0, share=0.4)", f"videollm_mod({ARGUMENTS['videollm_mod']})"]
)
def test_layers_divide_a_budget_that_holds_where_tokens_go_round_some(
    tiny: Tiny, propagate: str, allocate: str, budget: str
) -> None:
    report = read(tiny, f"{propagate} | keydiff | {allocate} @ {budget}").report()
    share = int(budget.split("%")[0]) / 100
    if "bytes" in budget:
        assert report.kv_bytes <= share * report.kv_bytes_full
    else:
        assert report.held_tokens_mean <= share * PROMPT_TOKENS + 1  # steps of pyramidkv are whole tokens
