"""The embedded model finds a planted number after compression: what each recipe may lose, as a contract.

The protocol is that of `benchmarks/needle.py`: question not seen by compression, depth spread evenly, fixed seeds.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import pytest

import steno
from steno.models.embedded import DEFAULT_MODEL
from steno.models.folder_cache import default_cache_dir, is_complete

_SPEC = importlib.util.spec_from_file_location("needle", Path(__file__).parents[2] / "benchmarks" / "needle.py")
assert _SPEC is not None
assert _SPEC.loader is not None
needle = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(needle)

pytestmark = [
    pytest.mark.model,
    pytest.mark.skipif(not is_complete(default_cache_dir() / DEFAULT_MODEL), reason="`make model` fetches the model"),
]


@lru_cache
def model() -> steno.LanguageModel:
    return steno.load()


def found(recipe: str, num_tokens: int, count: int, indices: list[int]) -> int:
    samples = [needle.sample(model(), i, count, num_tokens, seed=0, kind="prose") for i in indices]
    row = needle.run(model(), recipe, samples)
    assert row["samples"] == len(indices)
    return int(str(row["right"]))


def test_a_short_text_from_packed_memory() -> None:
    assert found("kvzip | adakv | kivi(bits=4) @ 50%", 500, 5, [1]) == 1
    assert found("shorthand @ 43%", 500, 5, [3]) == 1


@pytest.mark.slow
def test_twenty_needles_in_2000_tokens() -> None:
    everything = list(range(20))
    full = found("full", 2000, 20, everything)
    assert full >= 17
    assert found("kvzip | adakv @ 50%", 2000, 20, everything) >= full - 1
    assert found("kivi(bits=4)", 2000, 20, everything) >= full - 1
    assert found("shorthand @ 43%", 2000, 20, everything) >= full - 1
