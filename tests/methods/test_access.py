"""Access methods on one layer: what they choose, against a loop, and that it is read and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from contracts import make_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import steno
from steno.cache.accounting import is_offloaded, tensors_of
from steno.cache.paged import PagedRows
from steno.cache.ragged import best, with_ends
from steno.cache.text import TokenText
from steno.calibration import save_calibration
from steno.errors import BadArgument, CacheError, CalibrationError
from steno.methods import DELTA, DoubleSparsity, HyLRA, MoBA, Quest, SentenceKV
from steno.methods.access.double_sparsity import channel_importance
from steno.methods.access.hylra import best_sources, mass_ratio, plan_layers, robust_mean
from steno.types import PAGE_TOKENS
from tiny import shared

HEADS, GROUP, DIM = 2, 2, 12
SCALE = DIM**-0.5


def draw(rows: int, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, H, T, D]`, keys and values `[B, Hkv, T, D]`."""
    x = torch.randn(rows, HEADS * (GROUP + 2), count, DIM, generator=torch.Generator().manual_seed(seed))
    q, k, v = x.split([HEADS * GROUP, HEADS, HEADS], dim=1)
    return q * 3, k, v


def feed(cache: steno.KVCache, new: tuple[Tensor, Tensor, Tensor], counts: list[int] | None = None) -> Tensor:
    """What every layer answers to the same tokens, `[L, B, H, T, D]`."""
    q, k, v = new
    cache.announce(token_ids(k, counts))
    outs = []
    for layer in cache.own_layers:
        layer.update(k, v)
        outs.append(layer.attend(q, counts, scale=SCALE))
    cache.check_integrity()
    return torch.stack(outs)


def token_ids(k: Tensor, counts: list[int] | None) -> list[list[int]]:
    """Token ids that follow from the keys; 0 ends a sentence."""
    ids = (k[:, 0, :, 0].abs() * 20).long() % 6
    return [row[len(row) - n :].tolist() for row, n in zip(ids, counts or [k.shape[2]] * len(k), strict=True)]


def read(recipe: str, new: tuple[Tensor, Tensor, Tensor], counts: list[int] | None = None) -> steno.KVCache:
    cache = steno.KVCache(shared("llama").config, recipe, sentence_ends=frozenset({0}))
    feed(cache, new, counts)
    return cache


def content(cache: steno.KVCache, layer: int = 2) -> PagedRows:
    found = cache.own_layers[layer].content
    assert isinstance(found, PagedRows)
    return found


def attention(q: Tensor, heads: list[tuple[Tensor, Tensor]], chosen: list[list[int]]) -> Tensor:
    """The oracle: q `[H, D]` over the chosen tokens of each KV head, `[H, D]`."""
    out = []
    for h, query in enumerate(q):
        keys, values = (x[chosen[h // GROUP]].double() for x in heads[h // GROUP])
        out.append(torch.softmax(keys @ query.double() * SCALE, 0) @ values)
    return torch.stack(out).float()


def held_pages(rows: PagedRows, b: int, head: int) -> list[list[int]]:
    """The tokens of each page of a head's segments, by their place among all it holds."""
    pages, first = [], 0
    for segment in rows.rows[b].segments:
        n = segment.lengths[head]
        pages += [list(range(first + a, first + min(a + PAGE_TOKENS, n))) for a in range(0, n, PAGE_TOKENS)]
        first += n
    return pages


def quest_bound(q: Tensor, keys: Tensor) -> float:
    return sum(max(float(x) * float(keys[:, d].min()), float(x) * float(keys[:, d].max())) for d, x in enumerate(q))


def moba_score(q: Tensor, keys: Tensor) -> float:
    return float(q @ keys.mean(0))


STAGES = [
    "", "keydiff @ 200", "keydiff | adakv @ 200", "keydiff | pyramidkv @ 200", "int8", "keydiff | adakv | int4 @ 200", "hadamard",
    "keydiff | adakv | hadamard | int8 @ 200",
]  # fmt: skip


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of hylra for three layers: the first reads everything, the second chooses, the third reuses."""
    path = tmp_path_factory.mktemp("hylra") / "plan.safetensors"
    save_calibration(path, {"source_layer": torch.tensor([-1.0, 1.0, 1.0])}, {})
    return str(path)


def composed(stages: str, access: str, plan_file: str = "") -> str:
    """`score | allocate | quantize | access @ budget`."""
    chain, _, budget = stages.partition(" @ ")
    return " | ".join(x for x in (chain, access.replace("PLAN", plan_file)) if x) + (f" @ {budget}" if budget else "")


def highest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


class Oracle:
    """What one head of the last layer reads of its segments, by loops; `keys` are all that it holds."""

    def __init__(self, cache: steno.KVCache, q: Tensor, b: int, head: int, before: list[Tensor]) -> None:
        self.cache, self.b, self.head, self.before = cache, b, head, before
        self.rows = content(cache)
        self.q = q[b]  # [H, D]
        self.queries = self.q[head * GROUP : (head + 1) * GROUP]
        self.keys = self.rows.decode_row(b, torch.float32)[head][0]
        self.pages = held_pages(self.rows, b, head)
        self.in_tail = len(self.keys) - sum(map(len, self.pages))

    def by_pages(self, score: Callable[[Tensor, Tensor], float], count: int) -> list[int]:
        scores = [max(score(q, self.keys[page]) for q in self.queries) for page in self.pages]
        return self.tokens_of(highest(scores, count))

    def tokens_of(self, pages: list[int]) -> list[int]:
        return [i for page in pages for i in self.pages[page]]

    def by_labels(self, count: int) -> list[int]:
        assert self.rows.index is not None
        assert self.rows.index.fixed is not None
        channels = self.rows.index.fixed[self.b * HEADS + self.head]
        labels = self.keys[: len(self.keys) - self.in_tail][:, channels]
        return highest([max(float(q[channels] @ k) for q in self.queries) for k in labels], count)

    def weights_in(self, layer: int) -> list[dict[int, float]]:
        """Attention by true position, for each query head, over what that layer holds."""
        rows, seen = content(self.cache, layer), self.cache.own_layers[layer].row_seen[self.b]
        found = []
        for h, ((keys, _), positions) in enumerate(
            zip(rows.decode_row(self.b, torch.float32), rows.positions(self.b, seen), strict=True)
        ):
            for q in self.q[h * GROUP : (h + 1) * GROUP]:
                weights = torch.softmax(keys @ q * SCALE, 0).tolist()
                found.append(dict(zip(positions.tolist(), weights, strict=True)))
        return found

    def by_salience(self, salience: Callable[[int], float], tokens: int, *, sinks: int, recent: int) -> list[int]:
        positions = self.rows.positions(self.b, self.cache.own_layers[2].row_seen[self.b])[self.head].tolist()
        newest, first = max(0, -(-(recent - self.in_tail) // 64)), -(-sinks // 64)
        scores = [sum(salience(positions[i]) for i in page) for page in self.pages]
        forced = [i < first or i >= len(scores) - newest for i in range(len(scores))]
        scores = [math.inf if must else x for must, x in zip(forced, scores, strict=True)]
        return self.tokens_of(highest(scores, max(tokens // 64 - -(-self.in_tail // 64), newest + first)))

    def delta(self, tokens: int, recent: int) -> list[int]:
        found = self.weights_in(0)
        return self.by_salience(lambda p: max(w.get(p, 0) for w in found), tokens, sinks=0, recent=recent)

    def hylra(self, tokens: int, sinks: int, recent: int) -> list[int]:
        own = self.weights_in(1)[self.head * GROUP : (self.head + 1) * GROUP]
        return self.by_salience(lambda p: sum(w.get(p, 0) for w in own), tokens, sinks=sinks, recent=recent)

    def sentencekv(self, tokens: int, sinks: int, recent: int, longest: int) -> list[int]:
        assert self.cache.reading.shared.text is not None
        sentence = self.cache.reading.shared.text.rows[self.b].tolist()
        positions = self.rows.positions(self.b, len(sentence))[self.head].tolist()
        asked = [self.queries]
        for back, q in enumerate(reversed(self.before), start=2):
            if sentence[-back] != sentence[-1]:
                break
            asked.append(q[self.b, self.head * GROUP : (self.head + 1) * GROUP])
        mean = torch.stack(asked).mean((0, 1))
        runs: list[list[int]] = []
        for page_start in self.segment_starts():
            first, last = page_start
            for i in range(first, last):
                fresh = i == first or sentence[positions[i]] != sentence[positions[i - 1]] or len(runs[-1]) == longest
                runs = [*runs, [i]] if fresh else [*runs[:-1], [*runs[-1], i]]
        held = sum(map(len, self.pages))
        newest = max(0, recent - self.in_tail)
        forced = [i for i in range(held) if i < sinks or i >= held - newest]
        room, chosen = max(0, tokens - sinks - max(recent, self.in_tail)), list(forced)
        for run in sorted(runs, key=lambda run: -float(self.keys[run].mean(0) @ mean)):
            for i in run:
                if room and i not in forced:
                    chosen, room = [*chosen, i], room - 1
        return chosen

    def segment_starts(self) -> list[tuple[int, int]]:
        ends = list(accumulate(s.lengths[self.head] for s in self.rows.rows[self.b].segments))
        return list(zip([0, *ends], ends, strict=False))


CHOOSING: dict[str, Callable[[Oracle], list[int]]] = {
    "quest(tokens=64, dense_layers=0, min_pages=2)": lambda o: o.by_pages(quest_bound, 2),
    "moba(blocks=3)": lambda o: o.by_pages(moba_score, 2),
    "double_sparsity(tokens=50, channels=5, dense_layers=0)": lambda o: o.by_labels(50),
    "delta(tokens=128, recent=0, full_layers='0')": lambda o: o.delta(128, 0),
    "delta(tokens=192, recent=80, full_layers='0')": lambda o: o.delta(192, 80),
    "hylra(tokens=192, sinks=64, recent=70, weights='PLAN')": lambda o: o.hylra(192, 64, 70),
    "sentencekv(tokens=90, sinks=8, recent=20, dense_steps=0, max_sentence=9)": lambda o: o.sentencekv(90, 8, 20, 9),
    "sentencekv(tokens=90, sinks=8, recent=20, dense_steps=0, offload=True)": lambda o: o.sentencekv(90, 8, 20, 128),
}


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("access", CHOOSING)
def test_what_is_read_is_what_a_loop_would_choose(access: str, stages: str, plan_file: str) -> None:
    cache = read(composed(stages, access, plan_file), draw(2, 330, seed=1))
    before = [draw(2, 1, seed=10 + i) for i in range(3)]
    for step in before:
        feed(cache, step)
    new = draw(2, 1, seed=20)
    out = feed(cache, new)
    for b in range(2):
        heads, chosen = content(cache).decode_row(b, torch.float32), []
        for h in range(HEADS):
            oracle = Oracle(cache, new[0][:, :, 0], b, h, [q[:, :, 0] for q, _, _ in before])
            read_of_segments = CHOOSING[access](oracle)
            assert len(read_of_segments) < len(oracle.keys) - oracle.in_tail
            chosen.append(read_of_segments + list(range(len(oracle.keys) - oracle.in_tail, len(oracle.keys))))
        expected = attention(new[0][b, :, 0], heads, chosen)
        torch.testing.assert_close(out[2, b, :, 0], expected, atol=1e-2 if "int" in stages else 1e-4, rtol=0)


EVERYTHING = [
    "quest(tokens=100000, dense_layers=0)", "moba(blocks=100000)", "double_sparsity(tokens=100000, dense_layers=0)",
    "delta(tokens=100000, full_layers='0')", "hylra(tokens=100000, weights='PLAN')",
    "sentencekv(tokens=100000, dense_steps=0)", "sentencekv(tokens=64, sinks=0, recent=0, dense_steps=1000)",
]  # fmt: skip


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("access", EVERYTHING)
def test_reading_everything_is_reading_everything(access: str, stages: str, plan_file: str) -> None:
    prompt = draw(2, 200, seed=1)
    ours, plain = read(composed(stages, access, plan_file), prompt), read(stages or "full", prompt)
    for i, count in enumerate([1, 3, *[1] * 70]):
        new = draw(2, count, seed=10 + i)
        # products with packed codes round, those with tokens copied out of them do not
        assert torch.allclose(feed(ours, new), feed(plain, new), atol=1e-2 if "int" in stages else 1e-4)


@pytest.mark.parametrize("access", CHOOSING)
@given(lengths=st.lists(st.integers(2, 300), min_size=1, max_size=4), seed=st.integers(0, 9), adaptive=st.booleans())
@settings(max_examples=12, deadline=None)
def test_rows_of_any_length_answer_as_they_would_alone(
    plan_file: str, access: str, lengths: list[int], seed: int, adaptive: bool
) -> None:
    recipe = composed("keydiff | adakv @ 70%" if adaptive else "", access, plan_file)
    longest = max(lengths)
    prompt, steps = draw(len(lengths), longest, seed), [draw(len(lengths), 1, 100 + seed + i) for i in range(3)]
    together = read(recipe, prompt, lengths)
    alone = [
        read(recipe, tuple(x[b : b + 1, :, longest - n :] for x in prompt))
        for b, n in enumerate(lengths)  # type: ignore[arg-type]
    ]
    for step in steps:
        out = feed(together, step)
        for b, cache in enumerate(alone):
            single = feed(cache, tuple(x[b : b + 1] for x in step))  # type: ignore[arg-type]
            assert torch.allclose(out[:, b : b + 1], single, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("access", CHOOSING)
def test_forks_crops_and_batches_choose_alike(access: str, plan_file: str) -> None:
    cache = read(composed("keydiff | adakv @ 70%", access, plan_file), draw(2, 300, seed=1))
    for i in range(70):
        feed(cache, draw(2, 1, seed=10 + i))
    twin, turned = cache.fork(), cache.fork()
    turned.reorder_cache(torch.tensor([1, 0, 1]))
    new = draw(2, 1, seed=200)
    expected = feed(cache, new)
    assert torch.allclose(feed(twin, new), expected, atol=1e-5)
    swapped = feed(turned, tuple(x[[1, 0, 1]] for x in new))  # type: ignore[arg-type]
    assert torch.allclose(swapped, expected[:, [1, 0, 1]], atol=1e-5)
    for removed in (1, 30, 40):  # back into the tail, then into the segments
        feed(twin, draw(2, removed, seed=300))
        twin.crop(-removed)
    feed(cache, draw(2, 1, seed=300))
    cache.crop(-1)  # what is kept from step to step begins anew on both sides
    fresh = draw(2, 1, seed=400)
    assert torch.allclose(feed(twin, fresh), feed(cache, fresh), atol=1e-4)


@pytest.mark.parametrize("access", [a for a in CHOOSING if not a.startswith(("delta", "hylra"))])
def test_an_index_that_grew_is_one_made_anew(access: str) -> None:
    cache = read(access, draw(2, 100, seed=1))
    for i in range(140):
        feed(cache, draw(2, 1, seed=10 + i))
    rows = content(cache)
    grown = rows.index
    assert grown is not None
    rows._index_all(grown.fixed)
    made = rows.index
    assert made is not None
    if grown.lengths is None or made.lengths is None:
        torch.testing.assert_close(grown.vectors, made.vectors)
        assert torch.equal(grown.counts, made.counts)
    else:  # a sentence that was cut when its beginning left the tail is two
        pairs = [
            (index.vectors * index.lengths[:, None], index.lengths)
            for index in (grown, made)
            if index.lengths is not None
        ]
        torch.testing.assert_close(*(sums.sum(0) for sums, _ in pairs), atol=1e-3, rtol=1e-4)
        assert len({int(lengths.sum()) for _, lengths in pairs}) == 1


# the parts


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_best_is_a_stable_sort(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    levels = st.sampled_from([-math.inf, 0.0, 1.0, 2.0, math.inf])
    scores = torch.tensor([[data.draw(levels) for _ in range(width)] for _ in range(rows)])
    counts = torch.tensor([data.draw(st.integers(0, width + 2)) for _ in range(rows)])
    chosen = best(scores, counts)
    for line, count, mask in zip(scores.tolist(), counts.tolist(), chosen, strict=True):
        order = [i for i in sorted(range(width), key=lambda i: (-line[i], i)) if line[i] > -math.inf]
        assert sorted(order[:count]) == mask.nonzero()[:, 0].tolist()


def test_ends_are_forced() -> None:
    forced = with_ends(torch.zeros(2, 5), torch.tensor([5, 3]), first=1, last=torch.tensor([2, 0]))
    assert torch.isinf(forced).tolist() == [[True, False, False, True, True], [True, False, False, False, False]]


@given(seed=st.integers(0, 200), dim=st.integers(1, 9), tokens=st.integers(1, 150))
@settings(max_examples=40, deadline=None)
def test_bounds_of_quest_hold_for_every_token_of_a_page(seed: int, dim: int, tokens: int) -> None:
    g = torch.Generator().manual_seed(seed)
    q, keys = torch.randn(dim, generator=g), torch.randn(tokens, dim, generator=g)
    items = Quest().summarize(keys, None, None).vectors  # [P, 2 D]
    bounds = items @ torch.cat([q.clamp(min=0), q.clamp(max=0)])
    for page, bound in zip(keys.split(PAGE_TOKENS), bounds, strict=True):
        assert bound >= (page @ q).max() - 1e-4
        assert abs(float(bound) - quest_bound(q, page)) < 1e-4


def test_the_bound_is_tight_on_identical_keys() -> None:
    key, q = torch.randn(8), torch.randn(8)
    items = Quest().summarize(key.expand(70, 8), None, None).vectors
    assert torch.allclose(items @ torch.cat([q.clamp(min=0), q.clamp(max=0)]), (q @ key).expand(2), atol=1e-5)


def test_pages_of_quest() -> None:
    assert Quest(tokens=1024).num_pages == 16
    assert Quest(tokens=64).num_pages == 3


def test_means_of_moba_are_those_of_the_tokens_there_are() -> None:
    keys = torch.randn(70, 8)
    assert torch.allclose(
        MoBA().summarize(keys, None, None).vectors, torch.stack([keys[:64].mean(0), keys[64:].mean(0)])
    )


def test_one_block_of_moba_is_the_own_one() -> None:
    cache = read("moba(blocks=1)", draw(1, 128, seed=1))
    new = draw(1, 1, seed=2)
    assert torch.allclose(feed(cache, new)[0], new[2].repeat_interleave(GROUP, 1), atol=1e-6)


def test_all_channels_of_double_sparsity_are_exact() -> None:
    cache = read("double_sparsity(tokens=3, channels=99, dense_layers=0)", draw(1, 64, seed=1))
    new = draw(1, 1, seed=2)
    out = feed(cache, new)[0, 0, :, 0]
    keys, values = (torch.cat([a[0], b[0]], 1) for a, b in zip(draw(1, 64, seed=1)[1:], new[1:], strict=True))
    heads = [(keys[h], values[h]) for h in range(HEADS)]
    chosen = []
    for h in range(HEADS):
        products = (new[0][0, h * GROUP : (h + 1) * GROUP, 0] @ keys[h, :64].T).amax(0)
        chosen.append([*products.topk(3).indices.tolist(), 64])
    assert torch.allclose(out, attention(new[0][0, :, 0], heads, chosen), atol=1e-5)


def test_labels_choose_rightly_where_only_their_channels_are_not_zero() -> None:
    keys = torch.zeros(100, 8)
    keys[:, [1, 6]] = torch.randn(100, 2)
    method = DoubleSparsity(channels=2)
    fixed = method.fix([keys], 0, 1)
    assert fixed.tolist() == [[1, 6]]
    q = torch.randn(8)
    assert torch.allclose(method.summarize(keys, fixed[0], None).vectors @ q[[1, 6]], keys @ q, atol=1e-5)


def test_channels_come_from_the_file_that_is_named(tmp_path: Path) -> None:
    path = tmp_path / "channels.safetensors"
    save_calibration(path, {"channel_importance": torch.arange(48.0).view(2, 3, 8).flip(2)}, {})
    method = DoubleSparsity(channels=3, statistics=str(path))
    assert method.fix([torch.randn(5, 8)] * 3, 1, 2).tolist() == [[0, 1, 2]] * 3
    with pytest.raises(CalibrationError, match=r"\[4, 3, 8\]"):
        method.fix([torch.randn(5, 8)] * 3, 1, 4)


def test_channel_importance_by_hand() -> None:
    kv, obs = make_layer(7, hkv=2, group=3, dim=5, window=7)
    assert obs.queries is not None
    got = channel_importance(kv, obs)
    for h in range(2):
        for d in range(5):
            products = [abs(float(obs.queries[3 * h + g, t, d] * kv.keys[h, t, d])) for g in range(3) for t in range(7)]
            assert abs(float(got[h, d]) - sum(products) / 21) < 1e-5


def test_full_layers_of_delta() -> None:
    assert DELTA().full(28) == {0, 1, 2, 14, 22}
    assert DELTA().full(30) == {0, 1, 2, 15, 24}
    given = DELTA(full_layers="0, 3")
    assert given.full(9) == {0, 3}
    assert [given.reads_layer(i, 9) for i in range(9)] == [False] * 9
    assert [DELTA().reads_layer(i, 28) for i in (0, 1, 2, 3, 14)] == [True, True, False, False, False]
    for bad in ("1,2", "0,x", "0,,1", "-1,0", "", "0,99999999999"):
        with pytest.raises(BadArgument, match="full_layers"):
            DELTA(full_layers=bad)


def test_a_needle_that_one_head_sees_is_read_by_all_layers_after() -> None:
    cache = read("delta(tokens=64, recent=0, full_layers='0')", draw(1, 640, seed=1))
    q, k, v = draw(1, 1, seed=2)
    needle = content(cache, 0).rows[0].segments[0]
    span = needle.spans()[1]  # type: ignore[index]
    span.keys[200] = q[0, 3, 0] * 3  # query head 3 reads KV head 1
    asked = list[Tensor]()
    for layer in cache.own_layers:
        layer.update(k, v)
        layer.attend(q, None, scale=SCALE)
        if layer.layer_idx == 0:
            asked.append(cache.reading.shared.salience[0])
    assert asked[0][:, 192:256].sum(1).argmax() in (0, 1)
    assert (asked[0].view(HEADS, -1)[:, :640].unflatten(1, (10, 64)).sum(2).argmax(1) == 3).all()
    assert not cache.reading.shared.salience  # nothing outlives its step


# the plan of hylra


def test_layers_that_agree_share_one_source() -> None:
    assert best_sources([[1.0] * 6] * 6, 3) == [0] * 6
    assert plan_layers(torch.linspace(1, 0, 10), torch.ones(10, 10), sparsity=0.8) == [-1, -1, *[2] * 8]


@given(data=st.data(), num_layers=st.integers(1, 7), max_sources=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_the_least_overlap_is_as_large_as_any_plan_has(data: st.DataObject, num_layers: int, max_sources: int) -> None:
    shares = st.floats(0, 1)
    overlap = [[data.draw(shares) for _ in range(num_layers)] for _ in range(num_layers)]

    def least(plan: tuple[int, ...]) -> float:
        return min(1.0 if i == j else overlap[i][j] for j, i in enumerate(plan))

    plans = [(0,)]
    for layer in range(1, num_layers):
        plans = [(*p, x) for p in plans for x in (p[-1], layer) if len({*p, x}) <= max_sources]
    plan = tuple(best_sources(overlap, max_sources))
    assert plan in plans
    assert least(plan) == max(map(least, plans))


def test_a_plan_keeps_the_widest_layers_whole() -> None:
    ratios, overlap = torch.rand(12), torch.rand(12, 12)
    plan = plan_layers(ratios, overlap, sparsity=0.75)
    assert {i for i, s in enumerate(plan) if s < 0} == set(ratios.topk(3).indices.tolist())
    assert all(plan[s] == s for s in plan if s >= 0)
    assert all(s <= i for i, s in enumerate(plan))


def test_shares_of_mass_by_hand() -> None:
    chunks = torch.tensor([[0.5, 0.1, 0.4, 0.0], [0.25, 0.25, 0.25, 0.25], [0.95, 0.05, 0.0, 0.0]])
    assert mass_ratio(chunks).tolist() == [0.5, 1.0, 0.25]
    assert robust_mean(torch.tensor([1.0, 1, 1, 1, 100])).item() == 1.0


@pytest.mark.parametrize("sources", [[-1.0, 2.0, 2.0], [-1.0, 0.0, 0.0], [0.0, 0.0], [0.0, 0.0, -2.0]])
def test_plans_that_make_no_sense_are_refused(tmp_path: Path, sources: list[float]) -> None:
    path = tmp_path / "plan.safetensors"
    save_calibration(path, {"source_layer": torch.tensor(sources)}, {})
    with pytest.raises(CalibrationError, match="source_layer"):
        read(f"hylra(weights={str(path)!r})", draw(1, 5, seed=1))


def test_hylra_without_a_plan_says_what_it_needs() -> None:
    with pytest.raises(CalibrationError, match="run `steno calibrate hylra --model M` once"):
        HyLRA().reads_layer(0, 3)


# sentences and files


def test_means_of_sentences_are_those_of_their_tokens() -> None:
    keys, sentences = torch.randn(9, 4), torch.tensor([3, 3, 3, 3, 3, 4, 6, 6, 6])
    items = SentenceKV(max_sentence=3).summarize(keys, None, sentences)
    runs = [keys[:3], keys[3:5], keys[5:6], keys[6:]]
    assert items.lengths is not None
    assert items.lengths.tolist() == [3, 2, 1, 3]
    assert torch.allclose(items.vectors, torch.stack([run.mean(0) for run in runs]), atol=1e-6)


def test_text_counts_sentences_and_goes_back() -> None:
    text = TokenText(frozenset({7, 9}))
    text.announce([[1, 7, 2], [9, 9, 3]])
    text.announce([[9, 4], []])
    assert [row.tolist() for row in text.rows] == [[0, 0, 1, 1, 2], [0, 1, 2]]
    twin = text.fork()
    text.crop(2)
    text.announce([[5], [5]])
    assert [row.tolist() for row in text.rows] == [[0, 0, 1, 1], [0, 1]]
    assert [row.tolist() for row in twin.rows] == [[0, 0, 1, 1, 2], [0, 1, 2]]
    twin.select([1, 1])
    assert twin.newest().tolist() == [2, 2]
    with pytest.raises(BadArgument, match="2 rows"):
        twin.announce([[1]])


def test_a_cache_that_is_not_told_its_tokens_says_what_to_do() -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    with pytest.raises(CacheError, match=r"announce"):
        model.generate(
            torch.randint(2, 90, (1, 20)), past_key_values=steno.KVCache(model.config, "sentencekv"), max_new_tokens=3
        )


def test_what_is_offloaded_is_not_in_memory_and_answers_the_same() -> None:
    prompt = draw(1, 512, seed=1)
    here, away = (read(f"sentencekv(tokens=100, dense_steps=0{more})", prompt) for more in ("", ", offload=True"))
    for i in range(70):
        assert torch.equal(*(feed(cache, draw(1, 1, seed=10 + i)) for cache in (here, away)))
    in_segments = 3 * HEADS * 576 * 2 * DIM * 4
    assert here.kv_bytes_offloaded == 0
    assert in_segments <= away.kv_bytes_offloaded <= in_segments + 3 * 10 * 64
    assert abs(here.kv_bytes - away.kv_bytes - in_segments) <= 64
    files = {x.untyped_storage().filename for x in tensors_of(content(away).rows) if is_offloaded(x)}
    assert files
    assert not any(Path(str(name)).exists() for name in files)  # nobody else can open them, nothing is left behind
