"""Rolling back undoes what was appended, or is refused before it changes anything."""

from __future__ import annotations

import pytest
from rows import (
    EVICTING,
    HEADS,
    close,
    continued,
    empty,
    forward,
    read,
    same,
    states,
    tokens,
)

from steno.errors import BadArgument, CacheError


@pytest.mark.parametrize(
    ("appended", "removed"), [(10, 4), (10, 10), (70, 3), (100, 80), (140, 130), (140, 140), (5, 0)]
)
@pytest.mark.parametrize("recipe", ["full", "keydiff @ 20", "quest(tokens=64, dense_layers=0)"])
def test_crop_undoes_what_was_appended(recipe: str, appended: int, removed: int) -> None:
    new, after = tokens(appended, seed=4), tokens(70, seed=5)
    cache, never = read(recipe, tokens(100)), read(recipe, tokens(100))
    continued(cache, new, -(-appended // 3))
    cache.crop(-removed)
    if appended > removed:
        continued(never, new[:, :, : appended - removed], appended - removed)
    assert cache.seen_tokens == never.seen_tokens == 100 + appended - removed
    assert same(states(cache), states(never))
    if not recipe.startswith("quest"):  # where pages begin may differ
        assert close(continued(cache, after, 10), continued(never, after, 10))


@pytest.mark.parametrize("removed", [1, 40, 64, 100, 190, 220])
@pytest.mark.parametrize("recipe", ["int8", "kivi(bits=8)"])
def test_crop_into_pages(recipe: str, removed: int) -> None:
    cache, dense = read(recipe, tokens(100)), read("full", tokens(100))
    for c in (cache, dense):
        continued(c, tokens(130, seed=4), 26)
        c.crop(-removed)
    assert cache.held_tokens() == [[[230 - removed] * HEADS]] * 3
    after = tokens(150, seed=5)
    ours, expected = continued(cache, after, 50), continued(dense, after)
    assert cache.held_tokens() == [[[380 - removed] * HEADS]] * 3
    assert (ours - expected).std() < 0.05 * expected.std()


def test_crop_to_nothing_and_beyond() -> None:
    cache = read("int4", tokens(70))
    with pytest.raises(BadArgument, match="at most 70"):
        cache.crop(-71)
    cache.crop(-70)
    assert cache.held_tokens() == [[[0] * HEADS]] * 3
    assert close(forward(cache, tokens(50)), forward(empty("full"), tokens(50)))
    with pytest.raises(BadArgument, match="<= 0"):
        cache.crop(1)


@pytest.mark.parametrize("recipe", ["keydiff @ 20", "snapkv(window=8) | adakv | int8 @ 70", *EVICTING])
def test_crop_into_a_compressed_prompt_is_refused_and_changes_nothing(recipe: str) -> None:
    cache = read(recipe, tokens(100))
    before = states(cache)
    with pytest.raises(CacheError, match=r"Read the prompt again|roll back"):
        cache.crop(-1)
    assert same(states(cache), before)
    assert cache.seen_tokens == 100
    forward(cache, tokens(1))


def test_crop_after_eviction_is_refused_before_it_works() -> None:
    cache = read("streaming_llm @ 40", tokens(30))
    continued(cache, tokens(8, seed=1), 8)
    cache.crop(-8)
    never = read("streaming_llm @ 40", tokens(30))
    after = tokens(9, seed=2)
    assert close(continued(cache, after, 9), continued(never, after, 9))
    continued(cache, after, 9)
    with pytest.raises(CacheError, match="dropped others"):
        cache.crop(-7)
    for recipe in ("tova @ 40", "h2o @ 40", "keyformer @ 40"):
        with pytest.raises(CacheError, match="counted their attention"):
            read(recipe, tokens(30)).crop(-1)
    assert not cache.is_croppable
    assert read("int4", tokens(3)).is_croppable


@pytest.mark.parametrize("recipe", ["full", "keydiff | int4 @ 70", "tova @ 24", "h2o | adakv @ 24"])
def test_reset_and_reuse(recipe: str) -> None:
    cache = read(recipe, tokens(140))
    continued(cache, tokens(20, seed=1), 20)
    cache.reset()
    assert cache.seen_tokens == 0
    assert cache.kv_bytes == 0
    forward(cache, tokens(100, seed=2))
    assert same(states(cache), states(read(recipe, tokens(100, seed=2))))
