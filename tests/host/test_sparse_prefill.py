"""Attention of the prefill among some tokens only, as ZipVL does."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import steno
from steno.errors import CacheError
from steno.kernels.attention import prefill
from steno.methods import ZipVLAttention
from steno.types import LayerKV, Observation
from tiny import prompt, shared
from tiny_vlm import BUILDERS, inputs, vlm


def observed(**options: Any) -> Observation:
    return Observation(**{"layer_idx": 0, "num_layers": 2, "scaling": 0.4, "budget_tokens": 9, **options})


def probed(method: ZipVLAttention, kv: LayerKV, q: Tensor, obs: Observation) -> list[float]:
    """The attention that each token got from the probes, number by number."""
    mass, group = [0.0] * kv.num_tokens, q.shape[0] // kv.num_kv_heads
    for head in range(q.shape[0]):
        for t in method.probes(kv.num_tokens, obs.layer_idx).tolist():
            exps = [math.exp(obs.scaling * float(q[head, t] @ kv.keys[head // group, j])) for j in range(t + 1)]
            for j, e in enumerate(exps):
                mass[j] += e / sum(exps)
    return mass


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.99])
def test_the_fewest_tokens_that_hold_tau_take_part(tau: float) -> None:
    g = torch.Generator().manual_seed(0)
    kv = LayerKV(keys=torch.randn(2, 40, 8, generator=g) * 2, values=torch.randn(2, 40, 8), positions=torch.arange(40))
    q, obs = torch.randn(4, 40, 8, generator=g), observed()
    method = ZipVLAttention(tau=tau, recent_probes=5, random_probes=6)
    mass = probed(method, kv, q, obs)
    best = sorted(mass, reverse=True)
    count = next(p for p in range(1, 41) if sum(best[:p]) >= tau * sum(mass))
    where = method.probes(40, 0).tolist()
    assert where[-5:] == [35, 36, 37, 38, 39]
    assert len(set(where)) == 11
    mean = [m / sum(t >= j for t in where) for j, m in enumerate(mass)]
    ranked = sorted(range(40), key=lambda j: (-mean[j], j))[:count]
    assert method.within(kv, q, obs).tolist() == sorted({*ranked, 39})


def test_even_attention_and_attention_to_one() -> None:
    keys = torch.zeros(1, 50, 8)
    kv = LayerKV(keys=keys, values=keys, positions=torch.arange(50))
    q = torch.ones(2, 50, 8)
    only_last = ZipVLAttention(tau=0.5, recent_probes=1, random_probes=0)
    assert len(only_last.within(kv, q, observed())) in (25, 26)  # half of them, and the last
    keys[0, 7] = 100
    assert only_last.within(kv, q, observed()).tolist() == [7, 49]
    assert ZipVLAttention(tau=1).within(kv, q, observed()) is None


@pytest.mark.parametrize("name", BUILDERS)
def test_all_tokens_are_the_identity(name: str) -> None:
    model, given = vlm(name), inputs(name)
    options = {"max_new_tokens": 8, "do_sample": False}
    model.set_attn_implementation("sdpa")
    expected = model.generate(**given, past_key_values=DynamicCache(config=model.config.get_text_config()), **options)
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, "zipvl_attention(tau=1)")
    assert torch.equal(model.generate(**given, past_key_values=cache, **options), expected)


@pytest.mark.parametrize("recipe", ["zipvl_attention(tau=0.5)", "zipvl_attention(tau=0.5) | h2o(heavy_share=1) @ 40"])
def test_only_those_attend_in_each_row_and_all_are_kept(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded rows in a batch choose for themselves; what the attention computed is counted."""
    model = shared("llama")
    model.set_attn_implementation("steno")
    ids, mask = prompt(60, 2), torch.ones(2, 60, dtype=torch.long)
    ids[1, :17], mask[1, :17] = 0, 0
    sizes: list[int] = []

    def counted(real: Any, q: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(q.shape[2])
        return real(q, *args, **options)

    for name in ("causal_attention", "causal_attention_and_mass"):
        monkeypatch.setattr(f"steno.cache.prompt.{name}", partial(counted, getattr(prefill, name)))
    with torch.no_grad():
        cache = steno.KVCache(model.config, recipe)
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits[:, -1]
        held = cache.held_tokens()
        assert len(sizes) == 6
        assert all(n < full for n, full in zip(sizes, [60, 43] * 3, strict=True))
        for row, start in enumerate((0, 17)):
            alone = steno.KVCache(model.config, recipe)
            single = model(ids[row : row + 1, start:], past_key_values=alone).logits[0, -1]
            assert torch.allclose(logits[row], single, atol=2e-4, rtol=2e-4)
            assert alone.held_tokens() == [[layer[row]] for layer in held]
    budget = 40 if "@" in recipe else 60
    assert held == [[[budget] * 2, [min(budget, 43)] * 2]] * 3
    cache.check_integrity()


def test_tokens_that_take_no_part_get_nothing_from_the_attention() -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    outs: list[Tensor] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(lambda m, args, out: outs.append(out[0][0]))
    try:
        with torch.no_grad():
            model(prompt(50), past_key_values=steno.KVCache(model.config, "zipvl_attention(tau=0.4)"))
    finally:
        hook.remove()
    silent = (outs[0] == 0).all(1)
    assert 5 < int(silent.sum()) < 45
    assert not silent[-1]


def test_a_prompt_in_parts_is_refused() -> None:
    model = shared("llama")
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, "zipvl_attention", prompt_tokens=40)
    with pytest.raises(CacheError, match="prefill_chunk_size"), torch.no_grad():
        model(prompt(30), past_key_values=cache)
