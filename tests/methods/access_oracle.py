"""What access methods should read, by loops, on a tiny cache that is fed random tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

import steno
from steno.cache.paged import PagedRows
from steno.types import PAGE_TOKENS
from tiny import SHAPE, Shape, llama_config


def draw(rows: int, count: int, seed: int, shape: Shape = SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[B, H, T, D]`, keys and values `[B, Hkv, T, D]`."""
    heads, group, dim = shape
    x = torch.randn(rows, heads * (group + 2), count, dim, generator=torch.Generator().manual_seed(seed))
    q, k, v = x.split([heads * group, heads, heads], dim=1)
    return q * 3, k, v


def feed(cache: steno.KVCache, new: tuple[Tensor, Tensor, Tensor], counts: list[int] | None = None) -> Tensor:
    """What every layer answers to the same tokens, `[L, B, H, T, D]`."""
    q, k, v = new
    cache.announce(token_ids(k, counts))
    outs = []
    for layer in cache.own_layers:
        layer.update(k, v)
        outs.append(layer.attend(q, counts, scale=q.shape[-1] ** -0.5))
    cache.check_integrity()
    return torch.stack(outs)


def token_ids(k: Tensor, counts: list[int] | None) -> list[list[int]]:
    """Token ids that follow from the keys; 0 ends a sentence."""
    ids = (k[:, 0, :, 0].abs() * 20).long() % 6
    return [row[len(row) - n :].tolist() for row, n in zip(ids, counts or [k.shape[2]] * len(k), strict=True)]


def read(recipe: str, new: tuple[Tensor, Tensor, Tensor], counts: list[int] | None = None) -> steno.KVCache:
    q, k, _ = new
    shape = Shape(k.shape[1], q.shape[1] // k.shape[1], k.shape[3])
    cache = steno.KVCache(llama_config(shape), recipe, sentence_ends=frozenset({0}))
    feed(cache, new, counts)
    return cache


def content(cache: steno.KVCache, layer: int = 2) -> PagedRows:
    found = cache.own_layers[layer].content
    assert isinstance(found, PagedRows)
    return found


def attention(q: Tensor, heads: list[tuple[Tensor, Tensor]], chosen: list[list[int]]) -> Tensor:
    """The oracle: q `[H, D]` over the chosen tokens of each KV head, `[H, D]`."""
    out, group = [], len(q) // len(heads)
    for h, query in enumerate(q):
        keys, values = (x[chosen[h // group]].double() for x in heads[h // group])
        out.append(torch.softmax(keys @ query.double() * q.shape[1] ** -0.5, 0) @ values)
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


def highest(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -scores[i])[:count]


class Oracle:
    """What one head of the last layer reads of its segments, by loops; `keys` are all that it holds."""

    def __init__(self, cache: steno.KVCache, q: Tensor, b: int, head: int, before: list[Tensor]) -> None:
        self.cache, self.b, self.head, self.before = cache, b, head, before
        self.rows = content(cache)
        self.q = q[b]  # [H, D]
        heads = self.rows.decode_row(b, torch.float32)
        self.num_heads, self.group = len(heads), len(self.q) // len(heads)
        self.queries = self.q[self.asking(head)]
        self.keys = heads[head][0]
        self.pages = held_pages(self.rows, b, head)
        self.in_tail = len(self.keys) - sum(map(len, self.pages))

    def asking(self, head: int) -> slice:
        """The query heads of a KV head."""
        return slice(head * self.group, (head + 1) * self.group)

    def by_pages(self, score: Callable[[Tensor, Tensor], float], count: int) -> list[int]:
        scores = [max(score(q, self.keys[page]) for q in self.queries) for page in self.pages]
        return self.tokens_of(highest(scores, count))

    def tokens_of(self, pages: list[int]) -> list[int]:
        return [i for page in pages for i in self.pages[page]]

    def by_labels(self, count: int) -> list[int]:
        assert self.rows.index is not None
        assert self.rows.index.fixed is not None
        channels = self.rows.index.fixed[self.b * self.num_heads + self.head]
        labels = self.keys[: len(self.keys) - self.in_tail][:, channels]
        return highest([max(float(q[channels] @ k) for q in self.queries) for k in labels], count)

    def weights_in(self, layer: int) -> list[dict[int, float]]:
        """Attention by true position, for each query head, over what that layer holds."""
        rows, seen = content(self.cache, layer), self.cache.own_layers[layer].row_seen[self.b]
        found = []
        for h, ((keys, _), positions) in enumerate(
            zip(rows.decode_row(self.b, torch.float32), rows.positions(self.b, seen), strict=True)
        ):
            for q in self.q[self.asking(h)]:
                weights = torch.softmax(keys @ q * q.shape[0] ** -0.5, 0).tolist()
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
        own = self.weights_in(1)[self.asking(self.head)]
        return self.by_salience(lambda p: sum(w.get(p, 0) for w in own), tokens, sinks=sinks, recent=recent)

    def sentencekv(self, tokens: int, sinks: int, recent: int, longest: int) -> list[int]:
        assert self.cache.reading.shared.text is not None
        sentence = self.cache.reading.shared.text.rows[self.b].tolist()
        positions = self.rows.positions(self.b, len(sentence))[self.head].tolist()
        asked = [self.queries]
        for back, q in enumerate(reversed(self.before), start=2):
            if sentence[-back] != sentence[-1]:
                break
            asked.append(q[self.b, self.asking(self.head)])
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
