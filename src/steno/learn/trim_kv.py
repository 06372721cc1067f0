"""Retention gates of TRIM-KV: they learn to forget what a layer's attention can do without."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from steno.learn.gather import look
from steno.learn.options import Options
from steno.learn.passages import passages
from steno.learn.training import train
from steno.methods.score.trim_kv import log_retention
from steno.session import LanguageModel
from steno.types import LayerKV, Need, Observation

HIDDEN = 32
BIAS = 6.0
CAPACITY_SHARE = 0.25
"""Tokens that a head may remember before the capacity loss begins, as a share of the passage."""
CAPACITY_WEIGHT = 1.0
NUM_QUERIES = 48
"""Queries of a passage whose attention is compared in one step."""
LEARNING_RATE = 5e-3


def learn(lm: LanguageModel, text: str, options: Options) -> Mapping[str, Tensor]:
    """`w1` `[L, 32, width]`, `b1` `[L, 32]`, `w2` `[L, Hkv, 32]` and `bias` `[L, Hkv]` fp16."""

    @lru_cache(maxsize=1)
    def layers_of(step: int) -> tuple[list[tuple[LayerKV, Observation]], int]:
        [passage] = passages(lm, text, seed=options.seed, first=step, last=step + 1)
        return look(lm, passage.tokens, Need.QUERIES, Need.HIDDEN_STATES), passage.num_document_tokens

    seen, _ = layers_of(0)
    (kv, obs), num_layers = seen[0], len(seen)
    assert obs.hidden_states is not None, "it was asked for"
    generator = torch.Generator().manual_seed(options.seed)
    width, device = obs.hidden_states.shape[1], kv.keys.device
    scale = width**0.5 * obs.hidden_states.float().std()
    gates = {
        "w1": torch.randn(num_layers, HIDDEN, width, generator=generator).to(device) / scale,
        "b1": torch.zeros(num_layers, HIDDEN, device=device),
        "w2": torch.randn(num_layers, kv.num_kv_heads, HIDDEN, generator=generator).to(device) / HIDDEN**0.5,
        "bias": torch.full((num_layers, kv.num_kv_heads), BIAS, device=device),
    }

    def loss_of(step: int) -> Tensor:
        seen, end = layers_of(step)
        num_tokens = seen[0][0].num_tokens
        draw = torch.Generator().manual_seed(options.seed * 1_000_003 + step)
        # half of the queries are those of questions and answers, which look far back
        late = torch.randint(end, num_tokens, (NUM_QUERIES // 2,), generator=draw)
        rows = torch.cat([late, torch.randint(num_tokens, (NUM_QUERIES - NUM_QUERIES // 2,), generator=draw)])
        hidden = torch.stack([o.hidden_states for _, o in seen if o.hidden_states is not None]).float()
        log_beta = log_retention(hidden, gates["w1"], gates["b1"], gates["w2"], gates["bias"])  # [L, Hkv, S]
        lost = [_lost_attention(*layer, log_beta[i], rows.to(hidden.device)) for i, layer in enumerate(seen)]
        return torch.stack(lost).mean() + CAPACITY_WEIGHT * over_capacity(log_beta, CAPACITY_SHARE * num_tokens)

    return train(gates, loss_of, options, learning_rate=LEARNING_RATE)


def retained_logits(logits: Tensor, log_beta: Tensor, rows: Tensor) -> Tensor:
    """Logits `[Hkv, ..., R, S]` times beta^age, the future -inf; rows `[R]`: where the queries stand; log_beta `[Hkv, S]`."""
    age = rows[:, None] - torch.arange(log_beta.shape[-1], device=rows.device)  # [R, S]
    decay = (log_beta[:, None, :] * age.clamp(min=0)).exp()  # [Hkv, R, S]
    decay = decay.reshape(decay.shape[0], *[1] * (logits.ndim - 3), *decay.shape[1:])
    return (logits * decay).masked_fill(age < 0, -torch.inf)


def _lost_attention(kv: LayerKV, obs: Observation, log_beta: Tensor, rows: Tensor) -> Tensor:
    """Mean KL divergence of the retained attention from the layer's own."""
    assert obs.queries is not None, "it was asked for"
    queries = obs.queries[:, rows].float().reshape(kv.num_kv_heads, -1, len(rows), kv.head_dim)  # [Hkv, G, R, D]
    logits = queries @ kv.keys.float()[:, None].mT * obs.scaling  # [Hkv, G, R, S]
    own = retained_logits(logits, torch.zeros_like(log_beta), rows).log_softmax(-1)
    kept = retained_logits(logits, log_beta, rows).log_softmax(-1)
    seen = own > -torch.inf
    return (own.exp() * (own - kept).masked_fill(~seen, 0)).sum(-1).mean()


def over_capacity(log_beta: Tensor, capacity: float) -> Tensor:
    """Mean over times t of max(0, sum of beta_i^(t - i) over the i up to t, less the capacity) / t; log_beta `[..., S]`.

    At eight times, evenly spread.
    """
    num_tokens = log_beta.shape[-1]
    times = torch.linspace(0, num_tokens - 1, 8, device=log_beta.device).long()  # [8]
    age = times[:, None] - torch.arange(num_tokens, device=log_beta.device)  # [8, S]
    held = (log_beta[..., None, :] * age.clamp(min=0)).exp().masked_fill(age < 0, 0).sum(-1)  # [..., 8]
    return ((held - capacity).clamp(min=0) / (times + 1)).mean()
