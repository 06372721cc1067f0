"""Reading with eviction: bounded bytes, the tokens that the method chose, and what is held answers as it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

import steno
from steno.calibration import save_calibration
from steno.errors import BadArgument, CacheError, CalibrationError, RecipeError
from steno.methods import READERS
from steno.methods.score.keydiff import KeyDiff
from tiny import build, prompt, shared

LAYERS, WIDTH, TOKEN_BYTES = 3, 48, 2 * 2 * 12 * 4
"""Of the tiny Llama: bytes of one token of one layer."""
STATE_BYTES = 2 * (4 + 4)
"""Position and state of one token of one layer, beside its keys and values."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe text with random weights for a model, where the method learns."""
    folder = tmp_path_factory.mktemp("weights")

    def recipe(method: str, rest: str, config: Any) -> str:
        draw = torch.Generator().manual_seed(0)
        layers, hkv, heads = config.num_hidden_layers, config.num_key_value_heads, config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shapes = {
            "locret": {"w1": (layers, 8, (heads + 2 * hkv) * dim), "w2": (layers, hkv, 8)},
            "trim_kv": {
                "w1": (layers, 8, config.hidden_size), "b1": (layers, 8), "w2": (layers, hkv, 8), "bias": (layers, hkv),
            },
        }  # fmt: skip
        if method not in shapes:
            return f"{method} {rest}"
        place: Path = folder / f"{method}-{layers}-{hkv}-{heads}-{dim}.safetensors"
        tensors = {name: torch.randn(*shape, generator=draw) / 8 for name, shape in shapes[method].items()}
        save_calibration(place, tensors, {})
        options = ", n_local=4" if method == "locret" else ""
        return f"{method}(weights={str(place)!r}{options}) {rest}"

    return recipe


def model_of(**overrides: Any) -> Any:
    model = build("llama", **overrides) if overrides else shared("llama")
    model.set_attn_implementation("steno")
    return model


def read(model: Any, recipe: str, ids: torch.Tensor, chunk: int, **options: Any) -> tuple[steno.KVCache, torch.Tensor]:
    """A cache that read `ids` so many tokens at a time, evicting, and the last logits."""
    options = {"prompt_tokens": ids.shape[1], "evict_while_reading": True, **options}
    cache = steno.KVCache(model.config, recipe, **options)
    with torch.inference_mode(), cache.watching(model):
        for part in ids.split(chunk, dim=1):
            logits = model(part, past_key_values=cache, use_cache=True).logits[:, -1]
            held = {n for layer in cache.held_tokens() for row in layer for n in row}
            assert len(held) == 1  # heads and layers alike
    cache.check_integrity()
    return cache, logits


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize(
    ("length", "chunk", "budget"), [(1, 1, 5), (97, 16, 24), (120, 40, 24), (101, 1, 9), (50, 50, 20)]
)
def test_the_budget_holds_after_every_chunk(weights: Any, method: str, length: int, chunk: int, budget: int) -> None:
    model, ids = model_of(), prompt(length)
    recipe = weights(method, f"@ {budget}", model.config)
    cache = steno.KVCache(model.config, recipe, prompt_tokens=length, evict_while_reading=True)
    with torch.inference_mode(), cache.watching(model):
        for start in range(0, length, chunk):
            model(ids[:, start : start + chunk], past_key_values=cache, use_cache=True)
            held = {n for layer in cache.held_tokens() for row in layer for n in row}
            assert held == {min(budget, start + chunk, length)}
    cache.check_integrity()
    for layer in cache.own_layers:
        for positions in layer.content.positions(0, length):
            assert positions.tolist() == sorted(set(positions.tolist()))


@pytest.mark.parametrize("method", READERS)
def test_peak_bytes_do_not_grow_with_the_document(weights: Any, method: str) -> None:
    model, budget, chunk, peaks = model_of(), 32, 16, []
    for length in (160, 480):
        cache, _ = read(model, weights(method, f"@ {budget}", model.config), prompt(length), chunk)
        token = TOKEN_BYTES + STATE_BYTES
        # every layer holds the budget, the one in work also what it is cut from; a bit per token says what was kept
        bound = LAYERS * budget * token + (budget + chunk) * token + LAYERS * (2 * length // 8 + 4096)
        assert cache.kv_bytes_peak <= bound < cache.kv_bytes_full
        peaks.append(cache.kv_bytes_peak)
    assert peaks[1] - peaks[0] <= LAYERS * 2 * 320 // 8 + 1024


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize("chunk", [1, 13, 60])
def test_a_budget_that_holds_all_changes_nothing(weights: Any, method: str, chunk: int) -> None:
    model, ids = model_of(), prompt(60)
    cache, logits = read(model, weights(method, "@ 60", model.config), ids, chunk)
    full, expected = steno.KVCache(model.config), None
    with torch.inference_mode():
        expected = model(ids, past_key_values=full, use_cache=True).logits[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.held_tokens() == full.held_tokens()


@pytest.mark.parametrize("method", READERS)
def test_one_chunk_is_the_prompt_read_at_once(weights: Any, method: str) -> None:
    model, ids = model_of(), prompt(90)
    recipe = weights(method, "@ 30", model.config)
    mine, logits = read(model, recipe, ids, 90)
    once, expected = read(model, recipe, ids, 90, evict_while_reading=False)
    assert torch.equal(logits, expected)
    for a, b in zip(mine.own_layers, once.own_layers, strict=True):
        pairs = zip(a.content.positions(0, 90), b.content.positions(0, 90), strict=True)
        assert all(torch.equal(x.sort().values, y.sort().values) for x, y in pairs)
    assert mine.kv_bytes == once.kv_bytes


def test_streaming_llm_holds_sinks_and_the_newest() -> None:
    cache, _ = read(model_of(), "streaming_llm(n_sink=3) @ 10", prompt(77), 20)
    expected = [0, 1, 2, *range(70, 77)]
    for layer in cache.own_layers:
        assert [sorted(p.tolist()) for p in layer.content.positions(0, 77)] == [expected] * 2


def test_keydiff_chooses_among_what_is_held() -> None:
    model, ids = model_of(), prompt(40)
    cache, _ = read(model, "keydiff @ 8", ids, 10)
    full = steno.KVCache(model.config)
    with torch.inference_mode():
        model(ids, past_key_values=full, use_cache=True)
    keys = full.own_layers[0].content.decode_row(0, torch.float32)  # keys of the first layer do not depend on eviction
    for head, (k, _) in enumerate(keys):
        held = torch.empty(0, dtype=torch.long)
        for start in range(0, 40, 10):
            held = torch.cat([held, torch.arange(start, start + 10)])
            scores = KeyDiff()._difference(k[held][None])[0]
            held = held[scores.argsort(descending=True, stable=True)[:8].sort().values]
        assert cache.own_layers[0].content.positions(0, 40)[head].tolist() == held.tolist()


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (3, 1, 80), (8, 1, 128)])
def test_decoding_goes_on_from_what_is_held(weights: Any, method: str, heads: int, kv_heads: int, dim: int) -> None:
    model = model_of(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim)
    assert isinstance(model.config, LlamaConfig)
    ids = prompt(83)
    cache, logits = read(model, weights(method, "@ 25%", model.config), ids, 32)
    with torch.inference_mode():
        for _ in range(5):
            logits = model(logits.argmax(-1)[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
            assert torch.isfinite(logits).all()
    cache.check_integrity()
    grows = 0 if method == "streaming_llm" else 5
    assert cache.held_tokens() == [[[20 + grows] * kv_heads]] * LAYERS
    assert cache.fork().held_tokens() == cache.held_tokens()


def test_rows_of_a_batch_do_not_touch(weights: Any) -> None:
    model = model_of()
    ids, recipe = prompt(70, rows=2), weights("trim_kv", "| int4 @ 66", model.config)
    both, logits = read(model, recipe, ids, 30)
    for b in range(2):
        alone, expected = read(model, recipe, ids[b : b + 1], 30)
        torch.testing.assert_close(logits[b : b + 1], expected, rtol=1e-4, atol=1e-4)
        for mine, its in zip(both.own_layers, alone.own_layers, strict=True):
            assert torch.equal(mine.content.rows[b].kept, its.content.rows[0].kept)


def test_what_cannot_be_is_refused(weights: Any) -> None:
    model = model_of()
    options = {"prompt_tokens": 9, "evict_while_reading": True}
    with pytest.raises(RecipeError, match="snapkv cannot evict while it reads; methods that can: streaming_llm"):
        steno.KVCache(model.config, "snapkv @ 9", **options)
    with pytest.raises(RecipeError, match="the full cache cannot evict"):
        steno.KVCache(model.config, None, **options)
    with pytest.raises(RecipeError, match="adakv needs the whole prompt"):
        steno.KVCache(model.config, "keydiff | adakv @ 9", **options)
    with pytest.raises(RecipeError, match="fastkv needs the whole prompt"):
        steno.KVCache(model.config, "fastkv | keydiff @ 9", **options)
    with pytest.raises(BadArgument, match="needs `prompt_tokens`"):
        steno.KVCache(model.config, "keydiff @ 9", evict_while_reading=True)
    with pytest.raises(CalibrationError, match="steno train locret --model M --out FILE"):
        steno.KVCache(model.config, "locret @ 9", **options)
    with pytest.raises(CalibrationError, match="run `steno calibrate prefixkv --model M` once"):
        steno.KVCache(model.config, "snapkv | prefixkv @ 9", model_hash="0" * 16)
    cache = steno.KVCache(model.config, "keydiff @ 9", prompt_tokens=40, evict_while_reading=True)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    with pytest.raises(CacheError, match="rows of different lengths"), torch.inference_mode():
        model(prompt(20, rows=2), attention_mask=mask, past_key_values=cache, use_cache=True)
    cache, _ = read(model, "keydiff @ 9", prompt(20), 20, prompt_tokens=40)
    with pytest.raises(CacheError, match="what was dropped cannot come back"):
        cache.crop(-1)
    trim = steno.KVCache(model.config, weights("trim_kv", "@ 9", model.config))
    with pytest.raises(CacheError, match=r"cache\.watching\(model\)"):
        model(prompt(20), past_key_values=trim, use_cache=True)
