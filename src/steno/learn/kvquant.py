"""The thresholds and codebooks of KVQuant: quantiles of key channels, and k-means under the Fisher information of each number.

The Fisher information of a number is taken to be the square of the gradient of the model's loss on the text, as in the
paper; gradients go through the whole model, whose weights stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache

from steno.learn.checkpoint import by_layer
from steno.learn.gather import look
from steno.learn.options import Options
from steno.learn.pieces import pieces
from steno.methods.quantize.kvquant import BITS, TAILS, fit_levels, value_frame
from steno.models.host import NAME
from steno.models.kvcache import KVCache
from steno.session import LanguageModel
from steno.types import Need, Rope

PIECES, PIECE_TOKENS = 16, 512
OUTLIERS = 0.01
"""The share for which codebooks are fitted."""
SAMPLE = 1 << 17
"""Numbers of a layer that k-means looks at."""


@final
class _Tap(DynamicCache):
    """A cache that keeps the keys and values of each layer with their place in the graph."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = key_states, value_states
        for x in (key_states, value_states):
            x.retain_grad()
        return key_states, value_states


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """What `TENSORS` of the method names, thresholds fp16 and codebooks fp32."""
    parts = pieces(lm, text, count=PIECES, size=PIECE_TOKENS, seed=options.seed)
    ropes = [obs.rope for _, obs in look(lm, parts[0][:1], Need.ROPE)]
    gathered: list[list[tuple[Tensor, ...]]] = []
    for number, tokens in enumerate(parts):
        options.report("reading", number, len(parts) + len(ropes))
        gathered.append([_plain(*x, rope) for x, rope in zip(gradients(lm, tokens), ropes, strict=True)])
    layers = list(zip(*gathered, strict=True))

    def fit(layer_idx: int) -> dict[str, Tensor]:
        return _fit([torch.cat(x, dim=1) for x in zip(*layers[layer_idx], strict=True)])

    found = by_layer(len(layers), fit, options, before=len(parts))
    return {name: x.half() if name in ("key_low", "key_high") else x for name, x in found.items()}


def gradients(lm: LanguageModel, tokens: list[int]) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Keys after RoPE and values of each layer that keeps them under a recipe, `[Hkv, S, D]`, and the loss's gradients."""
    model: Any = lm.model
    ids = torch.tensor([tokens], device=model.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    model.set_attn_implementation("sdpa")
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()  # so that all behind it is in the graph
        tap = _Tap(model.config)
        with torch.enable_grad():
            model(inputs_embeds=embedded, labels=ids, past_key_values=tap, use_cache=True).loss.backward()
    finally:
        model.set_attn_implementation(NAME)
        for parameter in trained:
            parameter.requires_grad_(True)
    kept = KVCache(model.config)
    layers = [tap.seen[i] for i, layer in enumerate(kept.layers) if layer in kept.own_layers]
    assert all(x.grad is not None for layer in layers for x in layer)
    return [(k[0].detach(), v[0].detach(), k.grad[0], v.grad[0]) for k, v in layers]  # type: ignore[index]


def _plain(k: Tensor, v: Tensor, k_grad: Tensor, v_grad: Tensor, rope: Rope | None) -> tuple[Tensor, ...]:
    """Keys before RoPE, values, and the squares of their gradients: rotation turns gradients as it turns keys."""
    if rope is not None:
        positions = torch.arange(k.shape[1], device=k.device)
        k, k_grad = rope.undo(k, positions), rope.undo(k_grad.float(), positions)
    return k, v, k_grad.float().square().bfloat16(), v_grad.float().square().bfloat16()


def _fit(layer: list[Tensor]) -> dict[str, Tensor]:
    """Thresholds `[Hkv, D, tails]` and codebooks of one layer from all its numbers `[Hkv, n, D]`."""
    keys, values, key_weights, value_weights = (x.float() for x in layer)
    tails = torch.tensor(TAILS, device=keys.device)
    low, high = (torch.quantile(keys, x, dim=1).permute(1, 2, 0) for x in (tails, 1 - tails))
    at = TAILS.index(OUTLIERS / 2)
    ranges, offsets = (high - low)[..., at] / 2, (high + low)[..., at] / 2  # [Hkv, D]
    normal = (keys - offsets[:, None]) / ranges.clamp(min=1e-6)[:, None]
    found = {"key_low": low.half(), "key_high": high.half()}
    framed = [value_frame(v, OUTLIERS) for v in values]
    scaled = torch.stack(
        [(v - middle[:, None]) / scale[:, None] for v, (_, scale, middle) in zip(values, framed, strict=True)]
    )
    for side, x, weights in (("key", normal, key_weights), ("value", scaled, value_weights)):
        inside = x.abs() <= 1
        x, weights = x[inside], weights[inside]
        step = max(1, len(x) // SAMPLE)
        for bits in BITS:
            found[f"{side}_levels_{bits}"] = torch.tensor(fit_levels(x[::step], bits, weights[::step]))
    return found
