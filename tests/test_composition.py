"""Methods of different kinds go together, or the recipe says why not; docs/methods.md says the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from composition import (
    ARGUMENTS,
    PAGE,
    TRIED,
    Pair,
    compositions,
    methods_table,
    pairs,
    recipe_of,
    refusal,
    refusals,
    tiny_language_model,
    with_part,
)
from steno.methods import KINDS, METHODS
from steno.recipe import parse_recipe

SAMPLE = 20
"""Every so many-th pair is tried every day."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return tiny_language_model(Path(tmp_path_factory.mktemp("composition")))


def test_every_method_meets_every_other_kind() -> None:
    met = {cls.id: {other.kind for pair in pairs() if cls in pair for other in pair if other is not cls}
           for cls in TRIED.values()}  # fmt: skip
    kinds = {cls.kind for cls in TRIED.values()}
    assert all(met[cls.id] >= kinds - {cls.kind} for cls in TRIED.values())
    assert kinds <= set(KINDS)
    assert set(ARGUMENTS) <= set(METHODS)


@pytest.mark.parametrize("pair", pairs()[::SAMPLE], ids=recipe_of)
def test_some_pairs(tiny: tuple[Any, Path], pair: Pair) -> None:
    check_reasons(refusals(tiny, [pair]))


@pytest.mark.slow
def test_all_pairs_and_the_page(tiny: tuple[Any, Path]) -> None:
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


def test_a_refusal_is_told(tiny: tuple[Any, Path]) -> None:
    assert "pages are encoded only once" in refusal(tiny, "tova | int8 @ 100")
    assert refusal(tiny, "full") == ""
    assert parse_recipe(recipe_of((METHODS["adakv"], METHODS["int8"]))).score is not None
