"""Rows: what is held answers as masked dense attention would, and growing, sharing and rolling back change nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import steno
from steno.cache.layer import LayerCache
from steno.cache.paged import PagedRows
from steno.cache.slots import SlotRows
from steno.errors import BadArgument, CacheError, IntegrityError
from tiny import shared

LAYERS, HEADS, GROUP, DIM = 3, 2, 2, 12
SCALE = DIM**-0.5
ONE_SHOT = [
    "full", "int8", "kivi(bits=4)", "snapkv(window=8) @ 40", "snapkv(window=8) | adakv @ 40", "keydiff | pyramidkv @ 30%",
    "keydiff | adakv | int4 @ 80", "expected_attention | adakv | kivi(bits=4) @ 60%",
    "keydiff | quest(tokens=64, dense_layers=0) @ 90%", "keydiff | adakv | hadamard | int8 @ 90",
]  # fmt: skip
EVICTING = [
    f"{score}{allocate} @ 24"
    for score in ("streaming_llm", "tova", "h2o")
    for allocate in ("", " | adakv", " | pyramidkv")
]


def tokens(count: int, rows: int = 1, seed: int = 0) -> Tensor:
    """Random queries, keys and values of so many tokens, side by side: `[L, B, T, H + 2 Hkv, D]`."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, rows, count, HEADS * (GROUP + 2), DIM, generator=seeded)


def forward(cache: steno.KVCache, new: Tensor, counts: list[int] | None = None) -> Tensor:
    """What every layer answers, `[L, B, H, T, D]`."""
    outs = []
    for layer, part in zip(cache.own_layers, new, strict=True):
        q, k, v = part.transpose(1, 2).split([HEADS * GROUP, HEADS, HEADS], dim=1)
        layer.update(k, v)
        outs.append(layer.attend(q, counts, scale=SCALE))
    cache.check_integrity()
    return torch.stack(outs)


def empty(recipe: str, **options: Any) -> steno.KVCache:
    return steno.KVCache(shared("llama").config, recipe, **options)


def read(recipe: str, new: Tensor, **options: Any) -> steno.KVCache:
    cache = empty(recipe, **options)
    forward(cache, new)
    return cache


def continued(cache: steno.KVCache, new: Tensor, steps: int = 1) -> Tensor:
    """The answers to tokens fed in equal steps."""
    return torch.cat([forward(cache, part) for part in new.chunk(steps, dim=2)], dim=3)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> bool:
    return bool(torch.allclose(a, b, atol=tolerance, rtol=tolerance))


def states(cache: steno.KVCache) -> list[Tensor]:
    """Everything a cache holds, dense, with its positions."""
    found = []
    for layer in cache.own_layers:
        for b, seen in enumerate(layer.row_seen):
            heads = layer.content.decode_row(b, torch.float32)
            positions = layer.content.positions(b, seen)
            found += [x.clone() for (k, v), p in zip(heads, positions, strict=True) for x in (k, v, p)]
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# one layer, against a loop


class Layer:
    """One layer under a recipe, and the dense history of all that it ever saw."""

    def __init__(self, recipe: str, layer_idx: int = 1) -> None:
        self.cache: LayerCache = empty(recipe).own_layers[layer_idx]
        self.keys, self.values = torch.zeros(HEADS, 0, DIM), torch.zeros(HEADS, 0, DIM)
        self.seed = 0

    def feed(self, count: int) -> tuple[Tensor, Tensor]:
        """Queries `[H, T, D]` and the layer's answer to them."""
        self.seed += 1
        q, k, v = tokens(count, seed=self.seed)[0].transpose(1, 2).split([HEADS * GROUP, HEADS, HEADS], dim=1)
        self.keys, self.values = torch.cat([self.keys, k[0]], 1), torch.cat([self.values, v[0]], 1)
        self.cache.update(k, v)
        out = self.cache.attend(q, None, scale=SCALE)
        self.cache.check_integrity()
        return q[0], out[0]

    def kept(self) -> list[set[int]]:
        return [set(p.tolist()) for p in self.cache.content.positions(0, self.cache.seen)]

    def attend(self, q: Tensor, kept: list[set[int]]) -> tuple[Tensor, list[Tensor]]:
        """The oracle: query t sees the kept tokens up to its own position. Also the weights `[H, T, S]`."""
        heads, count, seen = q.shape[0], q.shape[1], self.keys.shape[1]
        out, weights = torch.zeros_like(q), torch.zeros(heads, count, seen)
        for h in range(heads):
            for t in range(count):
                visible = sorted(p for p in kept[h // GROUP] if p <= seen - count + t)
                w = torch.softmax(self.keys[h // GROUP, visible] @ q[h, t] * SCALE, 0)
                out[h, t] = w @ self.values[h // GROUP, visible]
                weights[h, t, visible] = w
        return out, list(weights)


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


# rolling back


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
    for recipe in ("tova @ 40", "h2o @ 40"):
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


# budgets


@pytest.mark.parametrize("length", [10, 24, 25, 60])
@pytest.mark.parametrize("recipe", EVICTING)
def test_budget_holds_after_every_step(recipe: str, length: int) -> None:
    cache = read(recipe, tokens(length))
    after_prompt = cache.held_tokens()
    excess = 2 * 3 if "pyramidkv" in recipe else 0  # (L - 1) / 2 tokens per layer and head, see PyramidKV
    for i, count in enumerate([1] * 16 + [7, 1, 100, 1]):
        forward(cache, tokens(count, seed=i))
        held = cache.held_tokens()
        assert sum(n for layer in held for n in layer[0]) <= 24 * HEADS * 3 + excess
        if "pyramidkv" not in recipe:
            assert all(sum(layer[0]) == HEADS * min(24, cache.seen_tokens) for layer in held)
        if length > 24:
            assert held == after_prompt


@pytest.mark.parametrize("length", [3, 12, 60])
def test_streaming_keeps_sinks_and_latest(length: int) -> None:
    cache = read("streaming_llm(n_sink=3) @ 12", tokens(length))
    for i in range(40):
        seen = length + i
        expected = set(range(3)) | set(range(max(0, seen - 9), seen)) if seen > 12 else set(range(seen))
        for layer in cache.own_layers:
            assert [set(p.tolist()) for p in layer.content.positions(0, seen)] == [expected] * HEADS
        forward(cache, tokens(1, seed=i))


@pytest.mark.parametrize("recipe", ["h2o @ 12", "h2o(heavy_share=0.75) | adakv @ 12", "tova @ 12"])
@pytest.mark.parametrize("length", [8, 40])
def test_evictors_follow_the_oracle(recipe: str, length: int) -> None:
    layer = Layer(recipe)
    q, _ = layer.feed(length)
    kept = [set(range(length))] * HEADS
    weights = torch.stack(layer.attend(q, kept)[1])  # [H, T, S]
    score = h2o_start(weights) if "h2o" in recipe else tova_step(weights[:, -1])
    kept = layer.kept()
    if length > 12 and "adakv" not in recipe:
        assert kept == [drop(recipe, score[h], set(range(length)), 12) for h in range(HEADS)]
    budgets = [max(len(head), 12) if length <= 12 else len(head) for head in kept]
    for _ in range(16):
        new = layer.keys.shape[1]
        q, out = layer.feed(1)
        kept = [head | {new} for head in kept]
        expected, weights_now = layer.attend(q, kept)
        assert close(out, expected, 1e-5)
        score = torch.cat([score, torch.zeros(HEADS, 1)], dim=1)
        step = torch.stack(weights_now)[:, 0]
        score = score + h2o_start(step[:, None]) if "h2o" in recipe else tova_step(step)
        kept = [drop(recipe, score[h], head, n) for h, (head, n) in enumerate(zip(kept, budgets, strict=True))]
        assert layer.kept() == kept


def h2o_start(weights: Tensor) -> Tensor:
    return weights.sum(1).reshape(HEADS, GROUP, -1).sum(1)  # [Hkv, S]


def tova_step(weights: Tensor) -> Tensor:
    return weights.mean(0).repeat(HEADS, 1)  # [Hkv, S]


def drop(recipe: str, score: Tensor, kept: set[int], budget: int) -> set[int]:
    """Down to the budget, one by one: H2O shields the newest, TOVA nothing."""
    share = 0.75 if "0.75" in recipe else 0.5
    recent = budget - int(share * budget) if "h2o" in recipe else 0
    shielded = set(sorted(kept)[len(kept) - recent :]) if recent else set()
    while len(kept) > budget:
        kept = kept - {min(kept - shielded, key=lambda p: (float(score[p]), -p))}
    return kept


@pytest.mark.parametrize("score", ["streaming_llm", "snapkv(window=4)", "tova", "h2o", "keydiff", "expected_attention"])
@pytest.mark.parametrize("budget", ["100%", "5000"])
def test_a_budget_of_everything_keeps_everything(score: str, budget: str) -> None:
    cache, full = read(f"{score} @ {budget}", tokens(90)), read("full", tokens(90))
    assert close(continued(cache, tokens(80, seed=1), 20), continued(full, tokens(80, seed=1), 20))
    assert cache.held_tokens() == full.held_tokens()


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
