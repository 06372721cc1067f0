"""Attention in plain torch over tokens in any form, for what no kernel reads: key and value widths may differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def attend_heads(
    q: Tensor,
    heads: Sequence[tuple[Tensor, Tensor]],
    *,
    scale: float,
    softcap: float | None = None,
    log_counts: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query over all tokens of its KV head, none of them masked.

    q: `[H, T, Dk]`; heads: keys `[n_h, Dk]` and values `[n_h, Dv]` per KV head, of any lengths; log_counts: `[n_h]` per KV
    head, added to the logits. Returns out `[H, T, Dv]` in q's dtype and log-sum-exp `[H, T]` fp32, 0 and -inf over nothing.
    Cost: one `[G, T, n_h]` of logits per KV head, in fp32, or in fp64 for fp64 queries.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(compute).unflatten(0, (len(heads), -1))  # [Hkv, G, T, Dk]
    outs, lses = [], []
    for h, (keys, values) in enumerate(heads):
        logits = grouped[h] @ keys.to(compute).T  # [G, T, n_h]
        weights, lse = softmax_weights(
            logits, scale=scale, softcap=softcap, log_counts=log_counts[h] if log_counts else None
        )
        outs.append(weights @ values.to(compute))
        lses.append(lse)
    return torch.cat(outs).to(q.dtype), torch.cat(lses).float()


def softmax_weights(
    products: Tensor, *, scale: float, softcap: float | None = None, log_counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The middle of attention: from products `[..., n]` of queries and keys to the weights of the values and the log-sum-exp
    `[...]`, -inf over nothing. log_counts: `[n]`, added to the logits."""
    logits = products * scale
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logits = logits if log_counts is None else logits + log_counts.to(logits.dtype)
    lse = logits.logsumexp(-1)
    return (logits - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp(), lse
