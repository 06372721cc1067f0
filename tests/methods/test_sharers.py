"""Sharers: the invariants of their papers, and layers of a cache that are compressed together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from random_layers import make_layer
from storage_contracts import DenseStore
from torch import Tensor
from transformers import LlamaConfig

import steno
from steno.cache.accounting import held_bytes
from steno.errors import RecipeError
from steno.kernels.attention import attend_heads
from steno.methods.share.minicache import MiniCache
from steno.methods.share.xkv import XKV
from steno.types import KeptTokens
from tiny import SHARED, prompt, shared

LAYERS, DIM = 6, 16


def layer_tokens(num_tokens: int, seed: int, *, hkv: int = 2, dim: int = DIM) -> KeptTokens:
    kv, obs = make_layer(num_tokens, hkv=hkv, dim=dim, seed=seed)
    return KeptTokens(
        keys=list(kv.keys), values=list(kv.values), positions=[kv.positions] * hkv, layer_idx=seed, num_layers=2,
        rope=obs.rope, observation=obs,
    )  # fmt: skip


def decoded(segments: list) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[Hkv, n, D]` of each layer."""
    heads = [zip(*segment.decode(torch.float32), strict=True) for segment in segments]
    return [tuple(torch.stack(x) for x in pair) for pair in heads]


# minicache


def test_parallel_layers_merge_without_loss() -> None:
    first = layer_tokens(40, 0)
    second = replace(first, keys=[3 * k for k in first.keys], values=[0.2 * v for v in first.values])
    for (k, v), plain in zip(decoded(MiniCache().share([first, second], DenseStore())), (first, second), strict=True):
        assert torch.allclose(k, torch.stack(plain.keys), atol=1e-5)
        assert torch.allclose(v, torch.stack(plain.values), atol=1e-5)


@pytest.mark.parametrize(("deeper", "layer"), [(0.0, 0), (1.0, 1)])
def test_the_ends_of_the_arc_are_the_layers(deeper: float, layer: int) -> None:
    pair = [layer_tokens(40, i) for i in range(2)]
    segments = MiniCache(deeper=deeper, retained=0.0).share(pair, DenseStore())
    k, v = decoded(segments)[layer]
    assert torch.allclose(k, torch.stack(pair[layer].keys), atol=1e-4)
    assert torch.allclose(v, torch.stack(pair[layer].values), atol=1e-4)


def test_lengths_are_kept_and_the_widest_angles_stay_apart() -> None:
    pair = [layer_tokens(40, i) for i in range(2)]
    segments = MiniCache(retained=0.1).share(pair, DenseStore())
    cosine = torch.cosine_similarity(*(torch.stack(t.keys) for t in pair), dim=-1)
    widest = torch.arccos(cosine).mean(0).topk(4).indices.sort().values
    for segment, plain, (k, v) in zip(segments, pair, decoded(segments), strict=True):
        assert torch.equal(segment.apart.long(), widest)
        assert torch.equal(k[:, widest], torch.stack(plain.keys)[:, widest])
        assert torch.allclose(k.norm(dim=-1), torch.stack(plain.keys).norm(dim=-1), atol=1e-4)
        assert torch.allclose(v.norm(dim=-1), torch.stack(plain.values).norm(dim=-1), atol=1e-4)
    assert segments[0].inner is segments[1].inner
    merged, apart = 36, 4
    common, own = 2 * merged * DIM * 2, 2 * merged * 2 + 2 * apart * DIM * 2
    assert held_bytes(segments) == 4 * (common + 2 * own) + 4 * apart


def test_a_rotation_of_both_layers_commutes_with_the_merge() -> None:
    pair = [layer_tokens(30, i) for i in range(2)]
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0))).Q
    turned = [replace(t, keys=[k @ turn for k in t.keys], values=[v @ turn for v in t.values]) for t in pair]
    plain, rotated = (decoded(MiniCache().share(x, DenseStore())) for x in (pair, turned))
    for (k, v), (k2, v2) in zip(plain, rotated, strict=True):
        assert torch.allclose(k @ turn, k2, atol=1e-4)
        assert torch.allclose(v @ turn, v2, atol=1e-4)


def test_vectors_of_nothing_stay_nothing() -> None:
    pair = [layer_tokens(9, i) for i in range(2)]
    for tokens in pair:
        for x in (*tokens.keys, *tokens.values):
            x[3] = 0
    for k, v in decoded(MiniCache(retained=0.0).share(pair, DenseStore())):
        assert not k[:, 3].any()
        assert not v[:, 3].any()


# xkv


@pytest.mark.parametrize(
    ("num_tokens", "layers", "hkv", "dim", "ranks"),
    [(200, 2, 2, 16, (8, 12)), (300, 4, 1, 64, (32, 48)), (9, 3, 3, 80, (9, 9))],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_short_vectors_once_and_factors_of_each_layer(
    num_tokens: int, layers: int, hkv: int, dim: int, ranks: tuple[int, int], dtype: torch.dtype
) -> None:
    group = [layer_tokens(num_tokens, i, hkv=hkv, dim=dim) for i in range(layers)]
    group = [
        replace(t, keys=[k.to(dtype) for k in t.keys], values=[v.to(dtype) for v in t.values], rope=group[0].rope)
        for t in group
    ]
    numbers = (num_tokens + layers * hkv * dim) * sum(ranks)  # 1/8 and 3/16 of the width of the group, or one a token
    positions, frequencies = 4 * num_tokens, 4 * dim // 2
    held = held_bytes(XKV().share(group, DenseStore()))
    assert held == numbers * dtype.itemsize + positions + frequencies


@pytest.mark.parametrize("num_tokens", [20, 200])
def test_the_error_is_that_of_the_truncated_svd(num_tokens: int) -> None:
    layers = [layer_tokens(num_tokens, i) for i in range(3)]
    method = XKV(layers=3, key_share=0.1, value_share=0.1)
    restored = decoded(method.share(layers, DenseStore()))
    values = torch.cat([torch.stack(t.values).transpose(0, 1).flatten(1) for t in layers], dim=1).double()
    rank = round(3 * 2 * DIM * 0.1)
    singular = torch.linalg.svdvals(values)
    error = sum(((v - torch.stack(t.values)).double() ** 2).sum() for (_, v), t in zip(restored, layers, strict=True))
    assert float(error) == pytest.approx(float((singular[rank:] ** 2).sum()), rel=1e-3)


def test_same_layers_cost_no_more_than_one() -> None:
    one = layer_tokens(100, 0)
    error = []
    for layers, share in (([one, one, one], 0.25 / 3), ([one], 0.25)):
        restored = decoded(XKV(key_share=share, value_share=share).share(layers, DenseStore()))
        error.append(float((restored[0][0] - torch.stack(one.keys)).square().sum()))
    assert error[0] == pytest.approx(error[1], rel=1e-3)


def test_keys_are_rotated_at_their_own_positions() -> None:
    at = torch.arange(0, 300, 3)
    layers = [replace(layer_tokens(100, i), positions=[at, at]) for i in range(2)]
    for (k, _), tokens in zip(decoded(XKV(key_share=1.0).share(layers, DenseStore())), layers, strict=True):
        assert torch.allclose(k, torch.stack(tokens.keys), atol=1e-3)


# through the cache


def cache_of(recipe: str, num_tokens: int, rows: int = 1, counts: list[int] | None = None) -> steno.KVCache:
    config = LlamaConfig(**{**SHARED, "head_dim": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": 6})
    cache = steno.KVCache(config, recipe)
    feed(cache, num_tokens, rows, counts=counts)
    return cache


def feed(
    cache: steno.KVCache, num_tokens: int, rows: int = 1, seed: int = 0, counts: list[int] | None = None
) -> list[Tensor]:
    """Random tokens for every layer; what the layers answer."""
    g = torch.Generator().manual_seed(seed)
    outs = []
    for layer in cache.own_layers:
        q, k, v = (torch.randn(rows, heads, num_tokens, DIM, generator=g) for heads in (6, 2, 2))
        layer.update(k, v)
        outs.append(layer.attend(q, counts, scale=0.25))
    cache.check_integrity()
    return outs


LOSSLESS = ["minicache(retained=1.0)", "xkv(layers=3, key_share=1.0, value_share=1.0)"]


@pytest.mark.parametrize("recipe", LOSSLESS)
def test_without_loss_layers_answer_as_the_dense_cache(recipe: str) -> None:
    ours, dense = cache_of(recipe, 150), cache_of("full", 150)
    assert any(len(layer.group) > 1 for layer in ours.own_layers)
    for i, count in enumerate([1, 3, *[1] * 64, 70, 1]):
        for a, b in zip(feed(ours, count, seed=i + 1), feed(dense, count, seed=i + 1), strict=True):
            assert torch.allclose(a, b, atol=1e-4)
    assert ours.held_tokens() == dense.held_tokens()


@pytest.mark.parametrize("recipe", ["minicache", "xkv", "minicache | int8", "xkv | hadamard | int4"])
def test_rows_of_a_batch_share_by_themselves_and_forks_go_on(recipe: str) -> None:
    cache = cache_of(recipe, 140, rows=2)
    held = cache.kv_bytes
    assert held == held_bytes(list(cache.layers))
    assert cache.kv_bytes_peak >= held
    cache.batch_select_indices(torch.tensor([0]))
    twin = cache.fork()
    assert [len(layer.group) for layer in twin.own_layers] == [len(layer.group) for layer in cache.own_layers]
    assert all(layer in layer.group for layer in twin.own_layers)
    one, other = feed(cache, 5, seed=9), feed(twin, 5, seed=9)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for layer in cache.own_layers:
        heads = layer.content.decode_row(0, torch.float32)
        q = torch.randn(6, 1, DIM)
        [segment, *_] = layer.content.rows[0].segments
        expected = attend_heads(q, segment.decode(torch.float32), scale=0.25)
        assert torch.allclose(segment.attend(q, 0.25)[0], expected[0], atol=2e-3 if "int" in recipe else 1e-4)
        assert len(heads[0][0]) == 145
    cache.reset()
    assert cache.kv_bytes == 0
    feed(cache, 70)


def test_shared_tensors_are_counted_once_and_bytes_are_freed() -> None:
    full, xkv, mini = (cache_of(recipe, 1920) for recipe in ("full", "xkv(layers=6)", "minicache(start=0.0)"))
    assert xkv.kv_bytes < 0.35 * full.kv_bytes  # ranks of 0.125 and 0.1875, and the factors
    assert 0.5 < mini.kv_bytes / full.kv_bytes < 0.5 + 1 / DIM + 0.05 + 0.05
    [latents] = {id(layer.content.rows[0].segments[0].inner) for layer in xkv.own_layers}
    assert latents


@pytest.mark.parametrize(
    "recipe", ["keydiff | minicache", "keydiff | zipvl | xkv | int8", "snapkv(window=8) | pyramidkv | xkv"]
)
def test_layers_of_a_group_choose_together(recipe: str) -> None:
    cache = cache_of(f"{recipe} @ 140", 200)
    for layer in cache.own_layers:
        leader = layer.group[0]
        mine, its = (x.content.positions(0, 200) for x in (layer, leader))
        if len(layer.group) > 1:
            assert all(torch.equal(a, its[0]) for a in mine)
            assert layer.content.rows[0].kept is leader.content.rows[0].kept
    assert sum(n for layer in cache.held_tokens() for n in layer[0]) <= 140 * 2 * LAYERS + 2 * LAYERS


@pytest.mark.parametrize(
    "recipe", ["keydiff | minicache", "keydiff | xkv", "keydiff | xkv | int8", "keydiff | minicache | int4"]
)
@pytest.mark.parametrize("room", [150_000, 400_000])
def test_a_byte_budget_holds(recipe: str, room: int) -> None:
    cache = cache_of(f"{recipe} @ {room}B", 700)
    assert cache.kv_bytes <= room


def test_an_empty_row_and_a_prompt_in_chunks() -> None:
    cache = cache_of("minicache", 40, rows=2, counts=[40, 0])
    assert [layer[1] for layer in cache.held_tokens()] == [[0, 0]] * LAYERS
    feed(cache, 70, rows=2, seed=1)
    model = shared("llama")
    model.set_attn_implementation("steno")
    chunked = steno.KVCache(model.config, "xkv(layers=3)", prompt_tokens=90)
    ids = model.generate(prompt(90), past_key_values=chunked, max_new_tokens=4, do_sample=False, prefill_chunk_size=40)
    once = steno.KVCache(model.config, "xkv(layers=3)")
    assert torch.equal(ids, model.generate(prompt(90), past_key_values=once, max_new_tokens=4, do_sample=False))


def test_what_cannot_be_shared_is_refused() -> None:
    for recipe, reason in (
        ("tova | xkv @ 30", "keeps layers together"),
        ("xkv | think", "fits a basis to each layer"),
        ("xkv | minicache", "at most one share stage"),
        ("hadamard | xkv", "write `xkv | hadamard`"),
    ):
        with pytest.raises(RecipeError, match=reason):
            steno.recipe.parse_recipe(recipe)
