"""Hidden states are shown to the layers while hooks stand, and to nobody otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steno
from steno.models.host import is_attention
from steno.types import Need
from tiny import CONFIGS, build, prompt


def hooks_of(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def watching_cache(model: Any, needs: set[Need], **options: Any) -> steno.KVCache:
    """A cache that gathers `needs` and never compresses."""
    cache = steno.KVCache(model.config, prompt_tokens=10**6, **options)
    for layer in cache.own_layers:
        layer.policy = SimpleNamespace(
            needs=frozenset(needs), query_window=0, query_statistics_skip=0, router=None, attender=None, sharer=None,
            check_widths=lambda *shape: None,
        )  # fmt: skip
    return cache


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_see_what_goes_into_their_attention(name: str) -> None:
    model = build(name)
    model.set_attn_implementation("steno")
    truth: dict[int, torch.Tensor] = {}
    for module in model.modules():
        if is_attention(module):
            module.register_forward_pre_hook(
                lambda m, args, kwargs: truth.__setitem__(m.layer_idx, kwargs.get("hidden_states", *args[:1])),
                with_kwargs=True,
            )
    before = hooks_of(model)
    cache = watching_cache(model, {Need.HIDDEN_STATES})
    with torch.inference_mode(), cache.watching(model):
        assert hooks_of(model) == before + len(cache.own_layers)
        model(prompt(11), past_key_values=cache, use_cache=True)
    assert hooks_of(model) == before
    for idx, layer in enumerate(cache.layers):
        if layer in cache.own_layers:
            assert torch.equal(layer.observation()[1].hidden_states, truth[idx][0])


def test_no_hooks_where_nobody_looks_and_none_left_after_an_error() -> None:
    model = build("llama")
    model.set_attn_implementation("steno")
    with watching_cache(model, {Need.PRE_ROPE_KEYS}).watching(model):
        assert hooks_of(model) == 0
    cache = watching_cache(model, {Need.HIDDEN_STATES})
    with pytest.raises(IndexError), cache.watching(model), torch.inference_mode():
        model(torch.tensor([[10**6]]), past_key_values=cache, use_cache=True)
    assert hooks_of(model) == 0
