"""Rows: what is held answers as masked dense attention would, and growing, sharing and rolling back change nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import prompt, shared
from torch import Tensor

import steno
from steno.cache.layer import LayerCache
from steno.cache.paged import PagedRows
from steno.cache.slots import SlotRows
from steno.errors import BadArgument, CacheError, IntegrityError

HEADS, GROUP, DIM = 2, 2, 16
SCALE = DIM**-0.5
ONE_SHOT = [
    "full", "int8", "kivi(bits=4)", "snapkv(window=8) @ 40", "snapkv(window=8) | adakv @ 40", "keydiff | pyramidkv @ 30%",
    "keydiff | adakv | int4 @ 80", "expected_attention | adakv | kivi(bits=4) @ 60%", "keydiff | quest(tokens=64, dense_layers=0) @ 90%",
]  # fmt: skip
EVICTING = [
    f"{score}{allocate} @ 24" for score in ("streaming_llm", "tova", "h2o") for allocate in ("", " | adakv", " | pyramidkv")
]


@pytest.fixture(autouse=True)
def steno_attention() -> Iterator[None]:
    model = shared("llama")
    model.set_attn_implementation("steno")
    yield
    model.set_attn_implementation("sdpa")


def forward(cache: steno.KVCache, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = shared("llama")(ids, past_key_values=cache, **options).logits
    cache.check_integrity()
    return logits


def read(recipe: str, ids: Tensor, **options: Any) -> steno.KVCache:
    cache = steno.KVCache(shared("llama").config, recipe, **options)
    forward(cache, ids)
    return cache


def continued(cache: steno.KVCache, ids: Tensor, steps: int = 1) -> Tensor:
    """Logits of `ids` fed in equal steps."""
    return torch.cat([forward(cache, part) for part in ids.chunk(steps, dim=1)], dim=1)


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
        self.cache: LayerCache = steno.KVCache(shared("llama").config, recipe).own_layers[layer_idx]
        self.keys, self.values = torch.zeros(HEADS, 0, DIM), torch.zeros(HEADS, 0, DIM)
        self.seed = 0

    def feed(self, count: int) -> tuple[Tensor, Tensor]:
        """Queries `[H, T, D]` and the layer's answer to them."""
        self.seed += 1
        seeded = torch.Generator().manual_seed(self.seed)
        q, k, v = (torch.randn(1, n, count, DIM, generator=seeded) for n in (HEADS * GROUP, HEADS, HEADS))
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
                logits = torch.stack([(q[h, t] * self.keys[h // GROUP, p]).sum() * SCALE for p in visible])
                w = torch.softmax(logits, 0)
                out[h, t] = w @ self.values[h // GROUP, visible]
                weights[h, t, visible] = w
        return out, list(weights)


@pytest.mark.parametrize("steps", [[1, 1, 1], [5, 1, 20], [80, 3], [1] * 70])
@pytest.mark.parametrize("recipe", ["full", "keydiff @ 20", "snapkv(window=4) | adakv @ 20", "h2o | adakv @ 500", "int8"])
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
    cache = read(recipe, prompt(200))
    budget = int(recipe.split("@")[1])
    for layer, held in zip(cache.own_layers, cache.held_tokens(), strict=True):
        assert len(set(held[0])) == HEADS
        assert sum(held[0]) == HEADS * budget
        dense = [x.numel() for x in torch.jit.annotate(list[Tensor], []) or []]
        dense = [s.keys.shape[0] for s in layer.content.rows[0].segments if type(s).__name__ == "DenseSegment"]
        pages = [s.pages.num_pages * 64 for s in layer.content.rows[0].segments if type(s).__name__ == "PagedSegment"]
        assert sum(dense) + sum(pages) == sum(held[0])


# growing


@pytest.mark.parametrize(("recipe", "tolerance"), [("full", 2e-4), ("int8", 0.6), ("int4", None), ("kivi(bits=4, residual=128)", None)])
def test_growing_across_many_flushes(recipe: str, tolerance: float | None) -> None:
    cache, dense = read(recipe, prompt(77)), read("full", prompt(77))
    new = prompt(260, seed=3)
    ours, expected = continued(cache, new, 260), continued(dense, new)
    assert cache.held_tokens() == [[[337] * HEADS]] * 3
    assert all(len(layer.content.rows[0].segments) <= math.log2(337 / 64) + 1 for layer in cache.own_layers)
    assert close(ours, expected, tolerance) if tolerance else (ours - expected).std() < 0.35 * expected.std()


@pytest.mark.parametrize("recipe", ["int4", "kivi", "kivi(bits=4, residual=64)"])
@pytest.mark.parametrize("first", [1, 100, 128, 250])
def test_pages_do_not_depend_on_where_the_prompt_ended(recipe: str, first: int) -> None:
    total, residual = 300, 128 if recipe == "kivi" else 64
    whole, grown = Layer(recipe), Layer(recipe)
    for layer in (whole, grown):
        layer.keys = layer.values = torch.zeros(HEADS, 0, DIM)
    seeded = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, n, total, DIM, generator=seeded) for n in (HEADS * GROUP, HEADS, HEADS))
    for layer, borders in ((whole, [0, total]), (grown, [0, *range(first, total + 1)])):
        for a, b in zip(borders, borders[1:], strict=False):
            layer.cache.update(k[:, :, a:b], v[:, :, a:b])
            layer.cache.attend(q[:, :, a:b], None, scale=SCALE)
    found = []
    for layer in (whole, grown):
        pages = [[] for _ in range(HEADS)]
        for segment in layer.cache.content.rows[0].segments:
            for h, part in enumerate(segment._heads()):
                pages[h].append(part.tensors)
        found.append([[torch.cat(parts) for parts in zip(*head, strict=True)] for head in pages])
    assert found[0][0][0].shape[0] == total // residual * residual // 64
    assert all(same(a, b) for a, b in zip(*found, strict=True))


# batches


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_rows_of_a_padded_batch_are_independent(recipe: str) -> None:
    lengths, longest = (90, 71), 90
    ids, mask = prompt(longest, 2), torch.ones(2, longest, dtype=torch.long)
    ids[1, : longest - lengths[1]], mask[1, : longest - lengths[1]] = 0, 0
    new = prompt(68, 2, seed=4)
    cache = steno.KVCache(shared("llama").config, recipe)
    outs = []
    for start, part in ((0, ids), *((longest + i, new[:, i : i + 1]) for i in range(66)), (longest + 66, new[:, 66:])):
        full = torch.cat([mask, torch.ones(2, start + part.shape[1] - longest, dtype=torch.long)], dim=1)
        positions = (full.cumsum(1) - 1).clamp(min=0)[:, start:]
        outs.append(forward(cache, part, attention_mask=full, position_ids=positions)[:, -1])
    for b, length in enumerate(lengths):
        single = steno.KVCache(shared("llama").config, recipe)
        alone = [forward(single, ids[b : b + 1, longest - length :])[:, -1]]
        alone += [forward(single, new[b : b + 1, i : i + 1])[:, -1] for i in range(66)]
        alone.append(forward(single, new[b : b + 1, 66:])[:, -1])
        assert [layer[b] for layer in cache.held_tokens()] == [layer[0] for layer in single.held_tokens()]
        assert close(torch.stack(outs)[:, b], torch.stack(alone)[:, 0], 1e-3)


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_reorder_repeat_and_select(recipe: str) -> None:
    ids, new = prompt(80, 3), prompt(5, 3, seed=4)
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
        assert close(continued(cache, new[rows], 5), expected[rows], 1e-3)


def test_repeated_rows_observe_the_rest_of_the_prompt_apart() -> None:
    ids = prompt(60, 2)
    cache = steno.KVCache(shared("llama").config, "h2o @ 20", prompt_tokens=60)
    forward(cache, ids[:1, :30])
    cache.batch_repeat_interleave(2)
    ids[1, :30] = ids[0, :30]
    forward(cache, ids[:, 30:])
    singles = [read("h2o @ 20", ids[b : b + 1]) for b in range(2)]
    assert same(states(cache)[: 3 * HEADS], states(singles[0])[: 3 * HEADS])
    positions = [layer.content.positions(b, 60) for layer in cache.own_layers for b in range(2)]
    alone = [one.own_layers[i].content.positions(0, 60) for i in range(3) for one in singles]
    assert all(same([p.sort().values for p in a], [p.sort().values for p in b]) for a, b in zip(positions, alone, strict=True))


# sharing


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_fork_is_copy_on_write(recipe: str) -> None:
    parent = read(recipe, prompt(140))
    before = states(parent)
    child = parent.fork()
    if isinstance(parent.own_layers[0].content, PagedRows):
        mine, its = (c.own_layers[0].content.rows[0].segments for c in (parent, child))
        assert mine
        assert all(a is b for a, b in zip(mine, its, strict=True))
    answer = continued(child, prompt(70, seed=4), 70)
    assert same(states(parent), before)
    assert close(continued(parent.fork(), prompt(70, seed=4), 70), answer, 0)
    assert close(continued(parent, prompt(70, seed=4), 70), answer, 0)


def test_fork_of_a_cache_still_reading_is_refused() -> None:
    cache = read("full", prompt(20), prompt_tokens=40)
    with pytest.raises(CacheError, match="still being read"):
        cache.fork()
    assert read("full", prompt(0) if False else prompt(1), prompt_tokens=1).fork().seen_tokens == 1
    assert steno.KVCache(shared("llama").config, prompt_tokens=7).fork().reading.prompt_tokens == 7


def test_modes_of_autograd_can_be_mixed() -> None:
    for recipe in ("int4", "tova @ 30"):
        cache = steno.KVCache(shared("llama").config, recipe)
        expected = steno.KVCache(shared("llama").config, recipe)
        modes = [torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad]
        for i, mode in enumerate(modes):
            ids = prompt(60 if not i else 3, seed=i)
            with mode():
                out = shared("llama")(ids, past_key_values=cache).logits
                cache.reorder_cache(torch.tensor([0]))
                cache = cache.fork()
            assert close(out.detach().clone(), forward(expected, ids))


# rolling back


@pytest.mark.parametrize(("appended", "removed"), [(10, 4), (10, 10), (70, 3), (100, 80), (200, 150), (200, 200), (5, 0)])
@pytest.mark.parametrize("recipe", ["full", "keydiff @ 20", "quest(tokens=64, dense_layers=0)"])
def test_crop_undoes_what_was_appended(recipe: str, appended: int, removed: int) -> None:
    new, after = prompt(appended, seed=4), prompt(70, seed=5)
    cache, never = read(recipe, prompt(100)), read(recipe, prompt(100))
    continued(cache, new, appended)
    cache.crop(-removed)
    if appended > removed:
        continued(never, new[:, : appended - removed], appended - removed)
    assert cache.seen_tokens == never.seen_tokens == 100 + appended - removed
    assert same(states(cache), states(never))
    if not recipe.startswith("quest"):  # where pages begin may differ
        assert close(continued(cache, after, 70), continued(never, after, 70))


@pytest.mark.parametrize("removed", [1, 40, 64, 100, 190, 220])
@pytest.mark.parametrize("recipe", ["int8", "kivi(bits=8)"])
def test_crop_into_pages(recipe: str, removed: int) -> None:
    cache, dense = read(recipe, prompt(100)), read("full", prompt(100))
    for c in (cache, dense):
        continued(c, prompt(130, seed=4), 130)
        c.crop(-removed)
    assert cache.held_tokens() == [[[230 - removed] * HEADS]] * 3
    after = prompt(150, seed=5)
    ours, expected = continued(cache, after, 150), continued(dense, after)
    assert cache.held_tokens() == [[[380 - removed] * HEADS]] * 3
    assert (ours - expected).std() < 0.05 * expected.std()


def test_crop_to_nothing_and_beyond() -> None:
    cache = read("int4", prompt(70))
    with pytest.raises(BadArgument, match="at most 70"):
        cache.crop(-71)
    cache.crop(-70)
    assert cache.held_tokens() == [[[0] * HEADS]] * 3
    assert close(forward(cache, prompt(50)), forward(steno.KVCache(shared("llama").config), prompt(50)))
    with pytest.raises(BadArgument, match="<= 0"):
        cache.crop(1)


@pytest.mark.parametrize("recipe", ["keydiff @ 20", "snapkv(window=8) | adakv | int8 @ 70", *EVICTING])
def test_crop_into_a_compressed_prompt_is_refused_and_changes_nothing(recipe: str) -> None:
    cache = read(recipe, prompt(100))
    before = states(cache)
    with pytest.raises(CacheError, match="read|roll back"):
        cache.crop(-1)
    assert same(states(cache), before)
    assert cache.seen_tokens == 100
    forward(cache, prompt(1))


def test_crop_after_eviction_is_refused_before_it_works() -> None:
    cache = read("streaming_llm @ 40", prompt(30))
    continued(cache, prompt(8, seed=1), 8)
    cache.crop(-8)
    never = read("streaming_llm @ 40", prompt(30))
    after = prompt(9, seed=2)
    assert close(continued(cache, after, 9), continued(never, after, 9))
    continued(cache, after, 9)
    with pytest.raises(CacheError, match="dropped others"):
        cache.crop(-7)
    for recipe in ("tova @ 40", "h2o @ 40"):
        with pytest.raises(CacheError, match="counted their attention"):
            read(recipe, prompt(30)).crop(-1)
    assert not cache.is_croppable
    assert read("int4", prompt(3)).is_croppable


@pytest.mark.parametrize("recipe", ["full", "keydiff | int4 @ 70", "tova @ 24", "h2o | adakv @ 24"])
def test_reset_and_reuse(recipe: str) -> None:
    cache = read(recipe, prompt(140))
    continued(cache, prompt(20, seed=1), 20)
    cache.reset()
    assert cache.seen_tokens == 0
    assert cache.kv_bytes == 0
    forward(cache, prompt(100, seed=2))
    assert same(states(cache), states(read(recipe, prompt(100, seed=2))))


# budgets


@pytest.mark.parametrize("length", [10, 24, 25, 60])
@pytest.mark.parametrize("recipe", EVICTING)
def test_budget_holds_after_every_step(recipe: str, length: int) -> None:
    cache = read(recipe, prompt(length))
    after_prompt = cache.held_tokens()
    excess = 2 * 3 if "pyramidkv" in recipe else 0  # (L - 1) / 2 tokens per layer and head, see PyramidKV
    for i, count in enumerate([1] * 30 + [7, 1, 100, 1]):
        forward(cache, prompt(count, seed=i))
        held = cache.held_tokens()
        assert sum(n for layer in held for n in layer[0]) <= 24 * HEADS * 3 + excess
        if "pyramidkv" not in recipe:
            assert all(sum(layer[0]) == HEADS * min(24, cache.seen_tokens) for layer in held)
        if length > 24:
            assert held == after_prompt


@pytest.mark.parametrize("length", [3, 12, 60])
def test_streaming_keeps_sinks_and_latest(length: int) -> None:
    cache = read("streaming_llm(n_sink=3) @ 12", prompt(length))
    for i in range(40):
        seen = length + i
        expected = set(range(3)) | set(range(max(0, seen - 9), seen)) if seen > 12 else set(range(seen))
        for layer in cache.own_layers:
            assert [set(p.tolist()) for p in layer.content.positions(0, seen)] == [expected] * HEADS
        forward(cache, prompt(1, seed=i))


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
    for _ in range(30):
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
    cache, full = read(f"{score} @ {budget}", prompt(90)), read("full", prompt(90))
    assert close(continued(cache, prompt(80, seed=1), 80), continued(full, prompt(80, seed=1), 80))
    assert cache.held_tokens() == full.held_tokens()


@pytest.mark.parametrize("recipe", ONE_SHOT + EVICTING)
def test_same_prompt_same_cache(recipe: str) -> None:
    assert same(states(read(recipe, prompt(140))), states(read(recipe, prompt(140))))


@pytest.mark.parametrize("chunks", [[50, 50, 50], [1, 3, 146], [149, 1], [2, 2, 80, 66]])
@pytest.mark.parametrize("recipe", ["snapkv(window=8) | adakv @ 40", "h2o @ 40", "expected_attention @ 40", "keydiff | int4 @ 70", "tova @ 20"])
def test_prompt_in_chunks_is_compressed_as_one(recipe: str, chunks: list[int]) -> None:
    ids = prompt(150)
    cache = steno.KVCache(shared("llama").config, recipe, prompt_tokens=150)
    for part in ids.split(chunks, dim=1):
        assert all(layer.content is None for layer in cache.own_layers)
        forward(cache, part)
    once = read(recipe, ids)
    for mine, its in zip(cache.own_layers, once.own_layers, strict=True):
        pairs = zip(mine.content.positions(0, 150), its.content.positions(0, 150), strict=True)
        assert all(torch.equal(a.sort().values, b.sort().values) for a, b in pairs)
    assert cache.kv_bytes == once.kv_bytes


@pytest.mark.parametrize("length", [1, 2, 4, 5, 63, 64, 65])
@pytest.mark.parametrize("recipe", ["expected_attention @ 64", "snapkv @ 64", "h2o | adakv @ 64", "kivi", "keydiff | quest @ 64", "tova @ 64"])
def test_short_prompts(recipe: str, length: int) -> None:
    cache = read(recipe, prompt(length))
    continued(cache, prompt(66, seed=1), 66)
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
    cache = read(recipe, prompt(100))
    damage(cache.own_layers[1].content)
    with pytest.raises(IntegrityError):
        cache.check_integrity()
