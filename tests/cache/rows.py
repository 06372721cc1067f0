"""Caches that are fed random tokens, and the dense oracle of one layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import steno
from steno.cache.layer import LayerCache
from tiny import SHAPE, Shape, llama_config

LAYERS = 3
HEADS = SHAPE.kv_heads
ONE_SHOT = [
    "full", "int8", "kivi(bits=4)", "snapkv(window=8) @ 40", "snapkv(window=8) | adakv @ 40", "keydiff | pyramidkv @ 30%",
    "keydiff | adakv | int4 @ 80", "expected_attention | adakv | kivi(bits=4) @ 60%",
    "keydiff | quest(tokens=64, dense_layers=0) @ 90%", "keydiff | adakv | hadamard | int8 @ 90",
]  # fmt: skip
EVICTING = [
    f"{score}{allocate} @ 24"
    for score in ("streaming_llm", "tova", "h2o", "keyformer")
    for allocate in ("", " | adakv", " | pyramidkv")
]


def tokens(count: int, rows: int = 1, seed: int = 0, shape: Shape = SHAPE) -> Tensor:
    """Random queries, keys and values of so many tokens, side by side: `[L, B, T, H + 2 Hkv, D]`."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, rows, count, shape.kv_heads * (shape.group + 2), shape.dim, generator=seeded)


def apart(part: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, `[B, heads, T, D]`, of one layer's `tokens`."""
    q, k, v = part.transpose(1, 2).tensor_split([-2 * kv_heads, -kv_heads], dim=1)
    return q, k, v


def forward(cache: steno.KVCache, new: Tensor, counts: list[int] | None = None) -> Tensor:
    """What every layer answers, `[L, B, H, T, D]`."""
    outs = []
    for layer, part in zip(cache.own_layers, new, strict=True):
        q, k, v = apart(part, cache.config.num_key_value_heads)
        layer.update(k, v)
        outs.append(layer.attend(q, counts, scale=q.shape[-1] ** -0.5))
    cache.check_integrity()
    return torch.stack(outs)


def empty(recipe: str, *, shape: Shape = SHAPE, **options: Any) -> steno.KVCache:
    return steno.KVCache(llama_config(shape), recipe, **options)


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

    def __init__(self, recipe: str, layer_idx: int = 1, shape: Shape = SHAPE) -> None:
        self.cache: LayerCache = empty(recipe, shape=shape).own_layers[layer_idx]
        self.keys, self.values = (torch.zeros(shape.kv_heads, 0, shape.dim) for _ in range(2))
        self.shape, self.seed = shape, 0

    def feed(self, count: int) -> tuple[Tensor, Tensor]:
        """Queries `[H, T, D]`, long enough to pick tokens out, and the layer's answer to them."""
        self.seed += 1
        q, k, v = apart(tokens(count, seed=self.seed, shape=self.shape)[0], self.shape.kv_heads)
        q = 3 * q
        self.keys, self.values = torch.cat([self.keys, k[0]], 1), torch.cat([self.values, v[0]], 1)
        self.cache.update(k, v)
        out = self.cache.attend(q, None, scale=self.shape.dim**-0.5)
        self.cache.check_integrity()
        return q[0], out[0]

    def kept(self) -> list[set[int]]:
        return [set(p.tolist()) for p in self.cache.content.positions(0, self.cache.seen)]

    def attend(self, q: Tensor, kept: list[set[int]]) -> tuple[Tensor, list[Tensor]]:
        """The oracle: query t sees the kept tokens up to its own position. Also the weights `[H, T, S]`."""
        heads, count, seen, group = q.shape[0], q.shape[1], self.keys.shape[1], self.shape.group
        out, weights = torch.zeros_like(q), torch.zeros(heads, count, seen)
        for h in range(heads):
            for t in range(count):
                visible = sorted(p for p in kept[h // group] if p <= seen - count + t)
                w = torch.softmax(self.keys[h // group, visible] @ q[h, t] * self.shape.dim**-0.5, 0)
                out[h, t] = w @ self.values[h // group, visible]
                weights[h, t, visible] = w
        return out, list(weights)
