"""How much attention tokens receive, without ever holding a T x T matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from steno.errors import BadArgument

from . import dense


def attention_mass(
    q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None, offset: int, block: int = 256
) -> Tensor:
    """Column sums of causal softmax attention.

    Parameters
    ----------
    q: `[H, T, D]`; k: `[Hkv, S, D]`. Query t sees the keys 0 to offset + t.
    block: queries that are computed at a time; the temporaries are `[H, block, S]` fp32.

    Returns
    -------
    `[H, S]` fp32; entry s is the sum over the queries of the attention to key s.
    """
    if offset < 0:
        raise BadArgument(f"offset must be at least 0; got {offset}.")
    mass = k.new_zeros(q.shape[0], k.shape[1], dtype=torch.float32)
    for start in range(0, q.shape[1], block):
        queries = q[:, start : start + block]
        seen = min(offset + start + queries.shape[1], k.shape[1])
        mass[:, :seen] += _softmax(queries, k[:, :seen], offset + start, scale, softcap).sum(dim=1)
    return mass


def attention_weights(q: Tensor, k: Tensor, *, scale: float, softcap: float | None = None) -> Tensor:
    """Softmax attention `[H, T, S]` fp32 of queries `[H, T, D]` to keys `[Hkv, S, D]`, causal among the last T keys."""
    if q.shape[1] > k.shape[1]:
        raise BadArgument(f"the keys must include those of the {q.shape[1]} queries; got {k.shape[1]} keys.")
    return _softmax(q, k, k.shape[1] - q.shape[1], scale, softcap)


def _softmax(q: Tensor, k: Tensor, offset: int, scale: float, softcap: float | None) -> Tensor:
    """Attention `[H, T, S]`; query t sees the keys 0 to offset + t."""
    grouped = q.float().reshape(k.shape[0], -1, q.shape[2])  # [Hkv, G * T, D]
    x = torch.bmm(grouped, k.float().transpose(1, 2)).mul_(scale).reshape(*q.shape[:2], -1)  # [H, T, S]
    if softcap:
        x = x.div_(softcap).tanh_().mul_(softcap)
    newer = x[..., offset:]  # [H, T, S - offset]; all queries see what comes before
    newer.masked_fill_(torch.ones(newer.shape[1:], dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    return x.softmax(dim=2)


def max_attention(q: Tensor, k: Tensor, lse: Tensor, *, scale: float) -> Tensor:
    """The largest attention weight that each key gets from any query: `max_q exp(scale * q.k - lse_q)`.

    q: `[H, T, D]`; k: `[Hkv, S, D]`; lse: `[H, T]`, the log-sum-exp of the softmax that the weights belong to, which may
    run over more keys than these. Returns `[Hkv, S]` fp32, the maximum over the queries of the group too.
    """
    if dense.can_run(q, k):
        return dense.max_attention(q, k, lse, scale=scale)
    return naive_max_attention(q, k, lse, scale=scale)


def naive_max_attention(q: Tensor, k: Tensor, lse: Tensor, *, scale: float, block: int = 512) -> Tensor:
    """`max_attention` in plain torch, `block` queries at a time."""
    num_kv_heads, num_keys, dim = k.shape
    # one more channel carries -lse, so that a product and a maximum are all there is to do
    queries = torch.cat([q.float() * scale, -lse.float()[..., None]], dim=-1).reshape(num_kv_heads, -1, dim + 1)
    keys = torch.cat([k.float(), k.new_ones(num_kv_heads, num_keys, 1, dtype=torch.float32)], dim=-1)
    best = torch.full((num_kv_heads, num_keys), -torch.inf, device=q.device)
    for head in range(num_kv_heads):
        for start in range(0, queries.shape[1], block):
            logits = keys[head] @ queries[head, start : start + block].T  # [S, block]
            torch.maximum(best[head], logits.amax(-1), out=best[head])
    return best.exp_()
