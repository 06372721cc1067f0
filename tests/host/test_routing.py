"""Tokens that go round layers: what is computed, what is held, and that it is exact for those that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import steno
from steno.errors import BadArgument, CacheError, ModelError, RecipeError
from steno.models.host import is_attention
from tiny import CONFIGS, build, prompt, shared

ALL_OURS = ["llama", "qwen2", "qwen3", "phi3", "mixtral"]


def hosted(name: str = "llama", **overrides: Any) -> Any:
    model = build(name, **overrides)
    model.set_attn_implementation("steno")
    return model


def read(model: Any, ids: Tensor, recipe: str, **options: Any) -> tuple[steno.KVCache, Tensor, list[int]]:
    """The cache of a prompt, the logits of its last token, and how many tokens each layer's attention computed."""
    cache, tokens = steno.KVCache(model.config, recipe, **options), []
    hooks = [
        module.register_forward_pre_hook(lambda m, a, k: tokens.append(k["hidden_states"].shape[1]), with_kwargs=True)
        for module in model.modules()
        if is_attention(module)
    ]
    try:
        with torch.inference_mode(), cache.watching(model):
            logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    cache.check_integrity()
    return cache, logits, tokens


def rest(model: Any, cache: steno.KVCache, ids: Tensor) -> Tensor:
    """Logits of tokens after the prompt, one by one."""
    with torch.inference_mode():
        return torch.stack([model(i[None, None], past_key_values=cache).logits[0, -1] for i in ids])


@pytest.mark.parametrize("name", ALL_OURS)
def test_all_tokens_that_go_on_are_the_identity(name: str) -> None:
    model, ids = hosted(name), prompt(61)
    model.set_attn_implementation("sdpa")
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), max_new_tokens=9, do_sample=False)
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, "fastkv(layer=0, share=1)")
    with cache.watching(model):
        out = model.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert torch.equal(out, expected)
    assert cache.held_tokens() == [[[69, 69]]] * 3


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", ALL_OURS)
def test_later_layers_compute_what_went_on_and_hold_its_true_positions(name: str, layer: int) -> None:
    model, ids = hosted(name), prompt(70)
    cache, logits, tokens = read(model, ids, f"fastkv(layer={layer}, share=0.3, window=4)")
    assert tokens == [70 if i <= layer else 21 for i in range(3)]
    assert cache.held_tokens() == [[[n, n]] for n in tokens]
    assert cache.seen_tokens == 70
    gone_on = None
    for i, own in enumerate(cache.own_layers):
        positions = own.content.positions(0, 70)
        if i > layer:
            gone_on = positions[0] if gone_on is None else gone_on
            assert all(torch.equal(p, gone_on) for p in positions)
            assert gone_on.tolist()[-4:] == [66, 67, 68, 69]
    assert torch.allclose(logits, oracle(model, ids, layer, gone_on)[-1], atol=2e-4, rtol=2e-4)
    assert (cache.kv_bytes < cache.kv_bytes_full) == (layer < 2)
    # and so do all tokens after the prompt
    more = prompt(7, seed=5)[0]
    decoded = rest(model, cache, more)
    cache.check_integrity()
    for n in range(1, 8):
        whole = torch.cat([ids, more[None, :n]], dim=1)
        on = None if gone_on is None else torch.cat([gone_on, torch.arange(70, 70 + n)])
        assert torch.allclose(decoded[n - 1], oracle(model, whole, layer, on)[-1], atol=2e-4, rtol=2e-4)


def oracle(model: Any, ids: Tensor, layer: int, gone_on: Tensor | None) -> Tensor:
    """Logits `[n, V]` of transformers' own attention, run layer by layer, a part of the tokens behind `layer`."""
    inner = model.model
    model.set_attn_implementation("sdpa")
    try:
        with torch.inference_mode():
            hidden, where = inner.embed_tokens(ids), torch.arange(ids.shape[1])[None]
            for i, block in enumerate(inner.layers):
                if i == layer + 1 and gone_on is not None:
                    hidden, where = hidden[:, gone_on], where[:, gone_on]
                rotation = inner.rotary_emb(hidden, position_ids=where)
                hidden = block(hidden, attention_mask=None, position_ids=where, position_embeddings=rotation)
            return model.lm_head(inner.norm(hidden))[0]
    finally:
        model.set_attn_implementation("steno")


def test_a_planted_token_goes_on() -> None:
    """The token that the window attends to most at the chosen layer, and its neighbours within the pooling."""
    method = steno.recipe.as_recipe("fastkv(layer=1, share=0.15, window=2, kernel=3)").propagate
    g = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(2, 60, 8, generator=g), torch.randn(4, 2, 8, generator=g) * 0.01
    for h in range(4):
        queries[h] += keys[h // 2, 23] * 3
    kv = steno.types.LayerKV(keys=keys, values=keys, positions=torch.arange(60))
    obs = steno.types.Observation(layer_idx=1, num_layers=4, scaling=1.0, budget_tokens=9, queries=queries)
    on = method.after(kv, obs)
    assert len(on) == 9
    assert {22, 23, 24, 58, 59} <= set(on.tolist())
    assert on.tolist() == sorted(on.tolist())
    shuffled = torch.randperm(2, generator=g)  # of the heads within a group
    other = obs.__class__(**{**vars(obs), "queries": torch.cat([queries[:2][shuffled], queries[2:]])})
    assert torch.equal(method.after(kv, other), on)


@pytest.mark.parametrize(
    ("recipe", "held"),
    [
        ("fastkv(layer=0, share=0.4, window=4) | snapkv(window=4) @ 20%", [20, 20, 20]),
        ("fastkv(layer=0, share=0.4, window=4) | snapkv(window=4) | adakv | int8 @ 20%", [20, 20, 20]),
        ("fastkv(layer=1, share=0.1, window=4) | keydiff @ 20%", [20, 20, 10]),
        ("fastkv(layer=0, share=0.4) | h2o @ 20", [20, 20, 20]),
        ("fastkv(layer=0, share=0.4, window=70) | hadamard | int4", [100, 70, 70]),
        ("fastkv(layer=0, share=0.4) | zipcache", [100, 40, 40]),
    ],
)
def test_with_the_other_stages(recipe: str, held: list[int]) -> None:
    model = hosted()
    cache, _, _ = read(model, prompt(100), recipe)
    assert [sum(layer[0]) / 2 for layer in cache.held_tokens()] == held
    assert str(cache.recipe) == recipe
    twin, before = cache.fork(), cache.held_tokens()
    assert torch.isfinite(rest(model, cache, prompt(66, seed=3)[0])).all()
    cache.check_integrity()
    assert twin.held_tokens() == before
    assert torch.isfinite(rest(model, twin, prompt(3, seed=4)[0])).all()


def test_without_propagation_it_is_plain_snapkv() -> None:
    model, ids = hosted(), prompt(100)
    logits = []
    for recipe in ("fastkv(share=1) | snapkv(window=8) @ 30%", "snapkv(window=8) @ 30%"):
        cache, _, _ = read(model, ids, recipe)
        logits.append(rest(model, cache, prompt(5, seed=1)[0]))
    assert torch.equal(*logits)


def test_a_byte_budget_holds_where_tokens_went_round() -> None:
    model = hosted()
    cache, _, _ = read(model, prompt(300), "fastkv(layer=0, share=0.9) | keydiff @ 60kB")
    assert 50_000 < cache.kv_bytes <= 60_000


def test_the_saving_of_the_prefill_in_flops() -> None:
    """Multiplications of the whole forward pass, counted by torch, against those of the tokens that each layer computed."""
    from torch.utils.flop_counter import FlopCounterMode

    model, ids = hosted(num_hidden_layers=4), prompt(400)
    flops = []
    for recipe in ("fastkv(layer=1, share=1)", "fastkv(layer=1, share=0.2)"):
        with FlopCounterMode(display=False) as counter:
            _, _, tokens = read(model, ids, recipe)
        flops.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    assert tokens == [400, 400, 80, 80]
    head = 2 * 48 * 97  # of the last token only
    assert (flops[1] - head) / (flops[0] - head) == pytest.approx(sum(tokens) / 1600)


@pytest.mark.parametrize("name", [n for n in CONFIGS if n not in ALL_OURS])
def test_models_with_other_layers_are_told_so(name: str) -> None:
    model = hosted(name)
    with pytest.raises(ModelError, match="full attention"), steno.KVCache(model.config, "fastkv").watching(model):
        pass


def test_errors() -> None:
    model, ids = hosted(), prompt(40)
    with pytest.raises(CacheError, match=r"cache\.watching\(model\)"):
        model.generate(ids, past_key_values=steno.KVCache(model.config, "fastkv(share=0.5)"), max_new_tokens=2)
    with pytest.raises(CacheError, match="one sequence at a time"):
        read(model, prompt(40, 2), "fastkv(share=0.5)")
    cache = steno.KVCache(model.config, "fastkv(share=0.5)", prompt_tokens=40)
    with pytest.raises(CacheError, match="prefill_chunk_size"), cache.watching(model), torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    with pytest.raises(BadArgument, match="one of the model's 3"):
        read(model, ids, "fastkv(layer=3)")
    with pytest.raises(RecipeError, match="without kvzip"):
        steno.KVCache(model.config, "fastkv | kvzip @ 50%")
    with pytest.raises(RecipeError, match="keeps layers together"):
        steno.KVCache(model.config, "fastkv | xkv")
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_generate_within_watching_goes_on_without_hooks_in_the_way() -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, "fastkv(layer=0, share=0.5) | int8")
    with cache.watching(model):
        out = model.generate(prompt(90), past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert out.shape == (1, 99)
    assert cache.held_tokens() == [[[98, 98]], [[53, 53]], [[53, 53]]]
