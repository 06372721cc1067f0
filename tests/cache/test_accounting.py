"""Bytes: what the cache reports is what an independent walk finds, what the formulas say, and within the budget."""

from __future__ import annotations

import gc
import re
import types
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

import steno
from steno.errors import BudgetError
from steno.kernels.attention.table import Column
from tiny import build, prompt, shared

LAYERS, HEADS, DIM = 3, 2, 12
RECIPES = [
    "full", "int8", "int4", "int2", "kivi(bits=4)", "kivi(bits=2)", "snapkv(window=8) @ 40", "snapkv(window=8) | adakv @ 40",
    "snapkv(window=8) | adakv | int4 @ 90", "keydiff | pyramidkv | kivi @ 60%", "kvzip | adakv | int8 @ 50%",
    "kvzip(window=9) | one_threshold(unit=64) | hadamard | int4 @ 50%", "snapkv(window=8) | one_threshold @ 40",
    "quest(tokens=64, dense_layers=0)", "moba(blocks=2)",
    "keydiff | adakv | double_sparsity(tokens=9) @ 100",
    "keydiff | adakv | int4 | delta(tokens=64, full_layers='0') @ 100",
    "keydiff | int4 | quest @ 100", "expected_attention | int2 @ 120", "tova @ 50",
    "h2o | adakv @ 30%", "streaming_llm @ 45", "tova @ 400",
]  # fmt: skip
DENSE = {torch.float32: 4, torch.bfloat16: 2}
SKIP = (
    type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, torch.nn.Module, PreTrainedConfig,
)  # fmt: skip


def feed(cache: steno.KVCache, num_tokens: int, dtype: torch.dtype = torch.float32, dim: int = DIM) -> None:
    """Random tokens for every layer, as a model would bring them: values are a view into something larger."""
    seeded = torch.Generator().manual_seed(num_tokens)
    for layer in cache.own_layers:
        q = torch.randn(1, 2 * HEADS, num_tokens, dim, generator=seeded).to(dtype)
        k = torch.randn(1, HEADS, num_tokens, dim, generator=seeded).to(dtype)
        v = torch.randn(1, num_tokens, 3 * HEADS, dim, generator=seeded).to(dtype).transpose(1, 2)[:, HEADS : 2 * HEADS]
        layer.update(k, v)
        layer.attend(q, None, scale=dim**-0.5)


def read(recipe: str, num_tokens: int, dtype: torch.dtype = torch.float32, dim: int = DIM) -> steno.KVCache:
    cache = steno.KVCache(shared("llama").config, recipe)
    feed(cache, num_tokens, dtype, dim)
    if recipe.startswith("kvzip"):
        seeded = torch.Generator().manual_seed(1)
        cache.compress([torch.rand(HEADS, num_tokens, generator=seeded) ** 8 for _ in cache.own_layers])
    return cache


def walked_bytes(root: Any) -> int:
    """Distinct storages of all tensors that python's own garbage collector can reach from `root`."""
    stack, seen, storages = [root], set(), {}
    while stack:
        item = stack.pop()
        if isinstance(item, SKIP) or id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
            continue
        stack.extend(gc.get_referents(item))
    return sum(storages.values())


@pytest.mark.parametrize("dtype", DENSE, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_reported_bytes_are_held_bytes(recipe: str, dtype: torch.dtype) -> None:
    cache = read(recipe, 150, dtype)
    assert cache.kv_bytes == walked_bytes(cache)
    for _ in range(70):
        feed(cache, 1, dtype)
    cache.check_integrity()
    assert cache.kv_bytes_peak >= cache.kv_bytes == walked_bytes(cache)
    assert cache.kv_bytes_full == LAYERS * HEADS * 220 * 2 * DIM * DENSE[dtype]


def span_table_bytes(num_segments: int) -> int:
    """One line of int64 per segment and tail of every head; offsets int32; the index of the tails int64."""
    return HEADS * (num_segments + 1) * len(Column) * 8 + (HEADS + 1) * 4 + HEADS * 8


def bitmap_bytes(num_tokens: int) -> int:
    """One bit per prompt token and head, whole bytes per head."""
    return HEADS * -(-num_tokens // 8)


def dense_bytes(tokens_of_heads: list[int], size: int, dim: int = DIM) -> int:
    """Keys and values in the model's dtype."""
    return sum(tokens_of_heads) * 2 * dim * size


def code_bytes(bits: int, dim: int) -> int:
    """Codes of a page of 64 tokens, keys transposed: in lines of 64 bytes, 16 columns times 32 / bits rows."""
    return sum(-(-rows * bits // 32) * -(-columns // 16) * 64 for rows, columns in [(dim, 64), (64, dim)])


def page_bytes(bits: int, group: int) -> int:
    """One page of whole numbers: codes, fp16 scales and minima."""
    num_groups = 64 // min(group, 64) * DIM + -(-DIM // group) * 64
    return code_bytes(bits, DIM) + num_groups * 2 * 2


def slot_bytes(tokens: int, size: int) -> int:
    """One free slot; int32 position and fp32 state beside keys and values; no bitmap and no table."""
    return HEADS * (tokens + 1) * (2 * DIM * size + 8)


@pytest.mark.parametrize("dtype", DENSE, ids=str)
@pytest.mark.parametrize("num_tokens", [30, 64, 200, 257])
@pytest.mark.parametrize(
    "recipe", ["full", "keydiff @ 25", "snapkv(window=4) | adakv @ 25", "keydiff | pyramidkv @ 25"]
)
def test_formula_of_dense_recipes(recipe: str, num_tokens: int, dtype: torch.dtype) -> None:
    cache = read(recipe, num_tokens, dtype)
    dense = sum(dense_bytes(layer[0], DENSE[dtype]) for layer in cache.held_tokens())
    maps = 0 if recipe == "full" else LAYERS * bitmap_bytes(num_tokens)
    assert cache.kv_bytes == dense + maps + LAYERS * span_table_bytes(1)
    if recipe == "keydiff @ 25":
        assert dense == LAYERS * dense_bytes([25] * HEADS, DENSE[dtype])


@pytest.mark.parametrize("dtype", DENSE, ids=str)
@pytest.mark.parametrize("num_tokens", [30, 64, 200, 257])
@pytest.mark.parametrize(
    ("recipe", "bits", "group", "residual"),
    [
        ("int8", 8, 64, 64),
        ("int4", 4, 64, 64),
        ("int2(group=16)", 2, 16, 64),
        ("kivi(bits=4)", 4, 32, 128),
        ("kivi", 2, 32, 128),
    ],
)
def test_formula_of_quantized_recipes(
    recipe: str, bits: int, group: int, residual: int, num_tokens: int, dtype: torch.dtype
) -> None:
    quantized = num_tokens // residual * residual
    pages = HEADS * quantized // 64 * page_bytes(bits, group)
    rest = dense_bytes([num_tokens - quantized] * HEADS, DENSE[dtype])
    assert read(recipe, num_tokens, dtype).kv_bytes == LAYERS * (pages + rest + span_table_bytes(int(quantized > 0)))


@pytest.mark.parametrize("dtype", DENSE, ids=str)
@pytest.mark.parametrize(("num_tokens", "dim"), [(63, 64), (130, 12), (257, 80)])
@pytest.mark.parametrize(
    ("recipe", "bits", "channels", "scale_bytes", "side_bytes"),
    [
        ("q8_0", 8, 32, 2, 0),
        ("q4_0", 4, 32, 2, 0),
        ("fp8", 8, 999, 2, 0),
        ("fp8(dtype='e5m2')", 8, 999, 2, 0),
        ("nvfp4", 4, 16, 1, 4),
        ("turboquant", 4, 999, 2, 0),
        ("turboquant(bits=2)", 2, 999, 2, 0),
        ("turboquant(bits=1, norm_correction=True)", 1, 999, 2, 0),
    ],
)
def test_formula_of_codebooks(
    recipe: str,
    bits: int,
    channels: int,
    scale_bytes: int,
    side_bytes: int,
    num_tokens: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    """A scale for so many channels of a token, all at most, and so many bytes more for keys or values of a page."""
    num_pages = HEADS * (num_tokens // 64)
    page = code_bytes(bits, dim) + 2 * (64 * -(-dim // channels) * scale_bytes + side_bytes)
    rest = dense_bytes([num_tokens % 64] * HEADS, DENSE[dtype], dim)
    spans = 0 if "turboquant" in recipe else int(num_pages > 0)  # what lies in another basis attends by itself
    assert read(recipe, num_tokens, dtype, dim).kv_bytes == LAYERS * (num_pages * page + rest + span_table_bytes(spans))


@pytest.mark.parametrize("dtype", DENSE, ids=str)
@pytest.mark.parametrize(("recipe", "tokens"), [("tova @ 40", 40), ("h2o @ 10%", 20), ("streaming_llm @ 700", 200)])
def test_formula_of_evicting_recipes(recipe: str, tokens: int, dtype: torch.dtype) -> None:
    assert read(recipe, 200, dtype).kv_bytes == LAYERS * slot_bytes(tokens, DENSE[dtype])


BUDGETED = [
    "keydiff", "keydiff | adakv", "keydiff | pyramidkv", "keydiff | int8", "keydiff | adakv | int4", "keydiff | kivi",
    "keydiff | pyramidkv | kivi(bits=4)", "keydiff | quest", "keydiff | adakv | quest",
    "keydiff | adakv | int8 | moba", "keydiff | adakv | double_sparsity",
    "keydiff | delta(full_layers='0')", "keydiff | adakv | int4 | quest",
    "expected_attention(n_sink=1) | adakv | int2", "snapkv(window=1) | pyramidkv | int8", "tova",
    "h2o | adakv", "tova | pyramidkv",
    "streaming_llm(n_sink=1) | adakv",
]  # fmt: skip


@given(
    recipe=st.sampled_from(BUDGETED),
    num_tokens=st.integers(1, 400),
    budget=st.integers(2000, 200_000),
    dim=st.sampled_from([12, 64]),
)
@example(recipe="keydiff | quest", num_tokens=300, budget=23_000, dim=64)
@example(recipe="keydiff | pyramidkv", num_tokens=300, budget=23_000, dim=64)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_budget_in_bytes_holds(recipe: str, num_tokens: int, budget: int, dim: int) -> None:
    try:
        cache = read(f"{recipe} @ {budget}B", num_tokens, dim=dim)
    except BudgetError as error:
        if "must be at least" not in str(error):
            return
        budget = int(re.findall(r"at least (\d+) bytes", str(error))[0])
        cache = read(f"{recipe} @ {budget}B", num_tokens, dim=dim)
    assert 0 < cache.kv_bytes <= budget


@pytest.mark.parametrize("recipe", [r for r in RECIPES if "kvzip" not in r and "one_threshold" not in r])
def test_peak_is_one_dense_layer_above_what_is_held(recipe: str) -> None:
    cache = read(recipe, 200)
    held = cache.kv_bytes
    one_dense = dense_bytes([200] * HEADS, 4)
    largest = max(layer.measure() for layer in cache.own_layers)
    assert held <= cache.kv_bytes_peak <= held + one_dense + largest


def test_peak_counts_dense_layers_until_a_replay_ends() -> None:
    assert read("kvzip @ 25%", 200).kv_bytes_peak >= LAYERS * dense_bytes([200] * HEADS, 4)


def test_peak_follows_a_growing_cache() -> None:
    cache = read("full", 10)
    for _ in range(100):
        feed(cache, 1)
    assert cache.kv_bytes_peak >= LAYERS * dense_bytes([110] * HEADS, 4)


def test_layers_of_transformers_are_counted() -> None:
    model = build("gemma3")
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, "int4")
    with torch.no_grad():
        model(prompt(100), past_key_values=cache)
    assert cache.kv_bytes == walked_bytes(cache)
    assert cache.kv_bytes_peak >= cache.kv_bytes
    assert len(cache.own_layers) == 1


def test_a_long_turn_leaves_no_dense_buffer_behind() -> None:
    cache = read("int4", 64)
    feed(cache, 640)
    feed(cache, 1)
    tail = dense_bytes([64] * HEADS, 4)
    pages = HEADS * 11 * page_bytes(4, 64)
    assert cache.kv_bytes == LAYERS * (pages + tail + span_table_bytes(1))


def test_a_fork_is_charged_for_what_it_reaches() -> None:
    cache = read("int4", 130)
    fork = cache.fork()
    assert fork.kv_bytes == walked_bytes(fork) == cache.kv_bytes
    shared = walked_bytes([cache, fork])
    assert cache.kv_bytes < shared < 1.5 * cache.kv_bytes
