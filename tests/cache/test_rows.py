"""Rows: what is held answers as masked dense attention would, and growing and sharing change nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rows import (
    EVICTING,
    HEADS,
    ONE_SHOT,
    Layer,
    close,
    continued,
    empty,
    forward,
    read,
    same,
    states,
    tokens,
)

import steno
from steno.cache.paged import PagedRows
from steno.cache.slots import SlotRows
from steno.errors import CacheError, IntegrityError


@pytest.mark.parametrize("steps", [[1, 1, 1], [5, 1, 20], [80, 3], [1] * 20, [9] * 8])
@pytest.mark.parametrize(
    "recipe",
    [
        "full",
        "keydiff @ 20",
        "snapkv(window=4) | adakv @ 20",
        "h2o | adakv @ 500",
        "int8",
        "hadamard",
        "snapkv(window=4) | adakv | hadamard @ 20",
    ],
)
def test_decode_is_attention_masked_to_what_is_kept(recipe: str, steps: list[int]) -> None:
    layer = Layer(recipe)
    layer.feed(50)
    kept = layer.kept()
    for count in steps:
        first = layer.keys.shape[1]
        kept = [head | set(range(first, first + count)) for head in kept]
        q, out = layer.feed(count)
        assert close(out, layer.attend(q, kept)[0], 0.05 if recipe == "int8" else 1e-5)
        assert layer.kept() == kept


def test_prompt_attends_in_full_whatever_is_dropped_after() -> None:
    layer = Layer("keydiff | int2 @ 10")
    q, out = layer.feed(90)
    assert close(out, layer.attend(q, [set(range(90))] * HEADS)[0], 1e-5)


@pytest.mark.parametrize("recipe", ["snapkv(window=8) | adakv @ 40", "keydiff | adakv | int4 @ 90"])
def test_heads_differ_in_length_and_nothing_is_padded(recipe: str) -> None:
    cache = read(recipe, tokens(200))
    assert any(len(set(held[0])) == HEADS for held in cache.held_tokens())
    budget = int(recipe.split("@")[1])
    for layer, held in zip(cache.own_layers, cache.held_tokens(), strict=True):
        assert sum(held[0]) == HEADS * budget
        dense = [s.keys.shape[0] for s in layer.content.rows[0].segments if type(s).__name__ == "DenseSegment"]
        pages = [s.pages.num_pages * 64 for s in layer.content.rows[0].segments if type(s).__name__ == "PagedSegment"]
        assert sum(dense) + sum(pages) + HEADS * layer.content.tail.lengths[0] == sum(held[0])


# growing


@pytest.mark.parametrize(
    ("recipe", "tolerance"), [("full", 1e-5), ("int8", 0.02), ("int4", 0.25), ("kivi(bits=4, residual=128)", 0.25)]
)
def test_growing_across_many_flushes(recipe: str, tolerance: float) -> None:
    cache, dense = read(recipe, tokens(77)), read("full", tokens(77))
    new = tokens(260, seed=3)
    ours, expected = continued(cache, new, 260), continued(dense, new)
    assert cache.held_tokens() == [[[337] * HEADS]] * 3
    assert all(len(layer.content.rows[0].segments) <= math.log2(337 / 64) + 1 for layer in cache.own_layers)
    assert (ours - expected).std() <= tolerance * expected.std()


@pytest.mark.parametrize("recipe", ["int4", "kivi", "kivi(bits=4, residual=64)"])
@pytest.mark.parametrize("first", [1, 128, 250])
def test_pages_do_not_depend_on_where_the_prompt_ended(recipe: str, first: int) -> None:
    total, residual = 300, 128 if recipe == "kivi" else 64
    new = tokens(total, seed=5)
    whole, grown = read(recipe, new), read(recipe, new[:, :, :first])
    continued(grown, new[:, :, first:], total - first)
    found = []
    for layer in (whole.own_layers[0], grown.own_layers[0]):
        pages = [[] for _ in range(HEADS)]
        for segment in layer.content.rows[0].segments:
            for h, part in enumerate(segment._heads()):
                pages[h].append(part.tensors)
        found.append([[torch.cat(parts) for parts in zip(*head, strict=True)] for head in pages])
    assert found[0][0][0].shape[0] == total // residual * residual // 64
    assert all(same(a, b) for a, b in zip(*found, strict=True))


# batches


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_rows_of_a_padded_batch_are_independent(recipe: str) -> None:
    lengths, longest = (90, 71), 90
    ids, new = tokens(longest, 2), tokens(86, 2, seed=4)
    cache, parts = empty(recipe), new.split([6, 70, *[1] * 10], dim=2)
    outs = [forward(cache, part, counts) for part, counts in ((ids, [*lengths]), *((part, None) for part in parts))]
    for b, length in enumerate(lengths):
        single = empty(recipe)
        alone = [
            forward(single, part) for part in (ids[:, b : b + 1, longest - length :], *(p[:, b : b + 1] for p in parts))
        ]
        assert [layer[b] for layer in cache.held_tokens()] == [layer[0] for layer in single.held_tokens()]
        assert close(torch.cat(outs, 3)[:, b, :, longest - length :], torch.cat(alone, 3)[:, 0], 1e-5)


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_rows_that_get_unequal_turns_are_independent(recipe: str) -> None:
    counts = [[40, 75], [3, 1], [70, 2], [0, 5], [1, 1], [100, 90], [1, 1]]
    cache, singles = empty(recipe), [empty(recipe), empty(recipe)]
    for i, pair in enumerate(counts):
        new = tokens(max(pair), 2, seed=i)
        out = forward(cache, new, pair if pair[0] != pair[1] else None)
        for b, count in enumerate(pair):
            if count:
                alone = forward(singles[b], new[:, b : b + 1, max(pair) - count :])
                # tokens are cut into tiles from another place, and the coefficients of a tile of codes are rounded
                assert close(out[:, b : b + 1, :, max(pair) - count :], alone, 2e-4 if "int" in recipe else 1e-5)
    for b, single in enumerate(singles):
        assert [layer[b] for layer in cache.held_tokens()] == [layer[0] for layer in single.held_tokens()]


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_reorder_repeat_and_select(recipe: str) -> None:
    ids, new = tokens(80, 3), tokens(5, 3, seed=4)
    changes: list[tuple[Callable[[steno.KVCache], None], list[int]]] = [
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    ]
    original = read(recipe, ids)
    expected = continued(original.fork(), new, 5)
    for change, rows in changes:
        cache = original.fork()
        change(cache)
        assert close(continued(cache, new[:, rows], 5), expected[:, rows], 1e-5)


def test_repeated_rows_observe_the_rest_of_the_prompt_apart() -> None:
    first, rest = tokens(30), tokens(30, 2, seed=1)
    cache = empty("h2o @ 20", prompt_tokens=60)
    forward(cache, first)
    cache.batch_repeat_interleave(2)
    forward(cache, rest)
    for b in range(2):
        single = read("h2o @ 20", torch.cat([first, rest[:, b : b + 1]], dim=2))
        for mine, its in zip(cache.own_layers, single.own_layers, strict=True):
            assert same(mine.content.positions(b, 60), its.content.positions(0, 60))


# sharing


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_fork_is_copy_on_write(recipe: str) -> None:
    parent = read(recipe, tokens(140))
    before = states(parent)
    child = parent.fork()
    if isinstance(parent.own_layers[0].content, PagedRows):
        mine, its = (c.own_layers[0].content.rows[0].segments for c in (parent, child))
        assert mine
        assert all(a is b for a, b in zip(mine, its, strict=True))
    answer = continued(child, tokens(70, seed=4), 10)
    assert same(states(parent), before)
    assert close(continued(parent.fork(), tokens(70, seed=4), 10), answer, 0)
    assert close(continued(parent, tokens(70, seed=4), 10), answer, 0)


def test_fork_of_a_cache_still_reading_is_refused() -> None:
    cache = read("full", tokens(20), prompt_tokens=40)
    with pytest.raises(CacheError, match="still being read"):
        cache.fork()
    assert empty("full", prompt_tokens=7).fork().reading.prompt_tokens == 7


def test_modes_of_autograd_can_be_mixed() -> None:
    for recipe in ("int4", "tova @ 30"):
        cache, expected = empty(recipe), empty(recipe)
        modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad]
        for i, mode in enumerate(modes):
            new = tokens(60 if not i else 3, seed=i)
            with mode():
                out = forward(cache, new.clone())
                cache.reorder_cache(torch.tensor([0]))
                cache = cache.fork()
            assert close(out.clone(), forward(expected, new))


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_same_prompt_same_cache(recipe: str) -> None:
    assert same(states(read(recipe, tokens(140))), states(read(recipe, tokens(140))))


@pytest.mark.parametrize("chunks", [[50, 50, 50], [1, 3, 146], [149, 1], [2, 2, 80, 66]])
@pytest.mark.parametrize(
    "recipe",
    ["snapkv(window=8) | adakv @ 40", "h2o @ 40", "expected_attention @ 40", "keydiff | int4 @ 70", "tova @ 20"],
)
def test_prompt_in_chunks_is_compressed_as_one(recipe: str, chunks: list[int]) -> None:
    ids = tokens(150)
    cache = empty(recipe, prompt_tokens=150)
    for part in ids.split(chunks, dim=2):
        assert all(layer.content is None for layer in cache.own_layers)
        forward(cache, part)
    once = read(recipe, ids)
    for mine, its in zip(cache.own_layers, once.own_layers, strict=True):
        pairs = zip(mine.content.positions(0, 150), its.content.positions(0, 150), strict=True)
        assert all(torch.equal(a.sort().values, b.sort().values) for a, b in pairs)
    assert cache.kv_bytes == once.kv_bytes


@pytest.mark.parametrize("length", [1, 2, 4, 5, 63, 64, 65])
@pytest.mark.parametrize(
    "recipe",
    ["expected_attention @ 64", "snapkv @ 64", "h2o | adakv @ 64", "kivi", "keydiff | quest @ 64", "tova @ 64"],
)
def test_short_prompts(recipe: str, length: int) -> None:
    cache = read(recipe, tokens(length))
    continued(cache, tokens(66, seed=1), 11)
    assert cache.seen_tokens == length + 66


# damage


def damaged_tail(content: PagedRows) -> None:
    content.tail.lengths[0] += 1


def damaged_bitmap(content: PagedRows) -> None:
    content.rows[0].kept[0, 0] ^= 1


def damaged_segments(content: PagedRows) -> None:
    content.rows[0].segments.pop()


def damaged_positions(content: SlotRows) -> None:
    content.rows[0].blocks[0].positions[0, 1] = content.rows[0].blocks[0].positions[0, 0]


def damaged_count(content: SlotRows) -> None:
    content.seen[0] += 1


def damaged_budget(content: SlotRows) -> None:
    content.rows[0].blocks[0].budget -= 1


@pytest.mark.parametrize(
    ("recipe", "damage"),
    [("full", damaged_tail), ("keydiff @ 20", damaged_bitmap), ("keydiff @ 20", damaged_segments), ("int4", damaged_segments),
     ("tova @ 20", damaged_positions), ("tova @ 20", damaged_count), ("tova @ 20", damaged_budget)],
)  # fmt: skip
def test_damage_is_found(recipe: str, damage: Callable[[Any], None]) -> None:
    cache = read(recipe, tokens(100))
    damage(cache.own_layers[1].content)
    with pytest.raises(IntegrityError):
        cache.check_integrity()
