"""What the host cannot compute exactly raises, on one line; what looks special and can be computed is exact."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import steno
from steno.errors import BadArgument, CacheError, ModelError, StenoError, UnsupportedAttention
from steno.models.host import HostMask, host_mask, steno_attention
from tiny import build, prompt, shared


def hosted(name: str = "llama", **overrides: Any) -> Any:
    model = build(name, **overrides)
    model.set_attn_implementation("steno")
    return model


def run(model: Any, ids: torch.Tensor | None = None, recipe: str = "full", **options: Any) -> Any:
    ids = prompt(12, 2) if ids is None else ids
    with torch.no_grad():
        return model(ids, past_key_values=steno.KVCache(model.config, recipe), **options)


def training_with_dropout() -> None:
    run(hosted(attention_dropout=0.1).train())


def dense_mask() -> None:
    run(hosted(), attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool).tril())


def holes() -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 5] = 0
    run(hosted(), attention_mask=mask)


def right_padding() -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    run(hosted(), attention_mask=mask)


def mask_of_another_length() -> None:
    run(hosted(), attention_mask=torch.tensor([[0] * 3 + [1] * 12] * 2))


def asked_for_weights() -> None:
    run(hosted(), output_attentions=True)


def bidirectional() -> None:
    model = hosted()
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    run(model)


def backward() -> None:
    model = hosted()
    model(prompt(12), past_key_values=steno.KVCache(model.config)).logits.sum().backward()


def other_attention() -> None:
    model = build("llama")
    run(model)


def attend(**kwargs: Any) -> None:
    """The attention function as a model with that argument would call it."""
    layer = steno.KVCache(shared("llama").config).own_layers[0]
    layer.update(torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16))
    steno_attention(SimpleNamespace(is_causal=True), torch.randn(1, 4, 12, 16), layer, layer, None, **kwargs)


def different_dimensions() -> None:
    steno.KVCache(shared("llama").config).own_layers[0].update(torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 8))


def wrong_number_of_rows() -> None:
    model = hosted()
    cache = steno.KVCache(model.config)
    with torch.no_grad():
        model(prompt(5, 2), past_key_values=cache)
        model(prompt(1, 3), past_key_values=cache)


def kvzip_in_generate() -> None:
    model = hosted()
    model.generate(
        prompt(20), past_key_values=steno.KVCache(model.config, "kvzip @ 50%"), max_new_tokens=3, do_sample=False
    )


def lookup_while_evicting() -> None:
    model = hosted()
    cache = steno.KVCache(model.config, "h2o @ 20")
    model.generate(
        prompt(9).repeat(1, 4), past_key_values=cache, max_new_tokens=9, do_sample=False, prompt_lookup_num_tokens=4
    )


def empty_prompt_tokens() -> None:
    steno.KVCache(shared("llama").config, prompt_tokens=0)


CASES: list[tuple[Callable[[], None], type[StenoError], str]] = [
    (training_with_dropout, UnsupportedAttention, r"dropout of 0.1 in training mode; call model.eval\(\)"),
    (dense_mask, UnsupportedAttention, "4-D attention mask"),
    (holes, UnsupportedAttention, "padding or holes after the first token"),
    (right_padding, UnsupportedAttention, "only left padding"),
    (mask_of_another_length, UnsupportedAttention, "15 tokens instead of 12"),
    (asked_for_weights, UnsupportedAttention, "output_attentions=True"),
    (bidirectional, UnsupportedAttention, "not causal"),
    (lambda: attend(is_causal=False), UnsupportedAttention, "not causal"),
    (backward, UnsupportedAttention, "no gradient"),
    (other_attention, ModelError, 'set_attn_implementation\\("steno"\\)'),
    (lambda: attend(sliding_window=11), UnsupportedAttention, "sliding window of 11"),
    (different_dimensions, UnsupportedAttention, "MLA"),
    (lambda: attend(position_bias=torch.zeros(1)), UnsupportedAttention, "position_bias"),
    (lambda: attend(alibi=0.5), UnsupportedAttention, "alibi"),
    (wrong_number_of_rows, BadArgument, "as many rows as the cache, 2; got 3"),
    (kvzip_in_generate, CacheError, r"steno.load\(...\).read"),
    (lookup_while_evicting, CacheError, "Speculative decoding"),
    (empty_prompt_tokens, BadArgument, "`prompt_tokens` must be >= 1"),
]


@pytest.mark.parametrize(("action", "error", "message"), CASES, ids=lambda x: getattr(x, "__name__", None))
def test_error_is_clear_and_on_one_line(action: Callable[[], None], error: type[StenoError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        action()
    assert "\n" not in str(caught.value)
    assert 20 < len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "kwargs", [{"sliding_window": 12}, {"sliding_window": None}, {"position_ids": torch.arange(12)}, {"logger": "x"}]
)
def test_harmless_arguments_pass(kwargs: dict[str, Any]) -> None:
    attend(**kwargs)


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([[1, 1, 1, 1]], None),
        ([[0, 0, 0, 1], [1, 1, 1, 1]], [1, 2]),
        ([[0, 1, 1, 1], [1, 1, 1, 1]], None),
        ([[0, 0, 0, 0], [0, 1, 1, 1]], [0, 2]),
    ],
)
def test_left_padding_becomes_counts(mask: list[list[int]], counts: list[int] | None) -> None:
    found = host_mask(
        batch_size=len(mask), q_length=2, kv_length=4, q_offset=2, attention_mask=torch.tensor(mask, dtype=torch.bool)
    )
    assert isinstance(found, HostMask)
    assert (found.counts, found.reason) == (counts, "")


# gemma 2: soft cap and its own scale; gpt-oss: sinks; gemma 3: its own scale, sliding layers
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "gemma3", "qwen3"])
@pytest.mark.parametrize(
    ("recipe", "share"), [("full", 1e-4), ("int8", 0.1), ("tova @ 500", 1e-4), ("quest(dense_layers=0)", 1e-4)]
)
def test_special_attention_is_exact(name: str, recipe: str, share: float) -> None:
    model, ids = build(name), prompt(150)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids).logits
    model.set_attn_implementation("steno")
    cache = steno.KVCache(model.config, recipe)
    borders = [0, 130, 131, 132, 140, 150]
    with torch.no_grad():
        parts = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip(borders, borders[1:], strict=False)]
    error = torch.cat(parts, dim=1) - expected
    assert error.std() < share * expected.std()


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_without_a_cache_the_host_agrees_with_eager(name: str) -> None:
    model, ids = build(name), prompt(60, 2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        model.set_attn_implementation("steno")
        assert torch.allclose(model(ids, use_cache=False).logits, expected, atol=2e-4, rtol=2e-4)
