"""Attention over a span table in plain torch: the oracle of every other implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from .table import SpanTable


def attend(
    q: Tensor, table: SpanTable, *, scale: float, softcap: float | None = None, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Softmax attention `[B, H, T, D]` and log-sum-exp `[B, H, T]` (fp32), in fp32, or in fp64 for fp64 queries.

    Cost: decodes every span; one `[G, T, S]` of logits per KV head.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, _, num_queries, head_dim = q.shape
    grouped = q.to(compute).reshape(batch * table.num_kv_heads, -1, num_queries, head_dim)  # [B * Hkv, G, T, D]
    outs, lses = zip(*(_attend_head(x, table, i, scale, softcap, causal) for i, x in enumerate(grouped)), strict=True)
    out = torch.stack(outs).reshape(q.shape).to(q.dtype)
    return out, torch.stack(lses).reshape(q.shape[:3]).float()


def _attend_head(
    q: Tensor, table: SpanTable, head: int, scale: float, softcap: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """One KV head of one row: q `[G, T, D]` to out `[G, T, D]` and lse `[G, T]`."""
    num_queries = q.shape[1]
    out, lse = torch.zeros_like(q), q.new_full(q.shape[:2], -torch.inf)
    first, end = table.offsets[head : head + 2].tolist()
    spans = table.rows[head // table.num_kv_heads][head % table.num_kv_heads]
    logits, values = [out[:, :, :0]], [q.new_zeros(0, q.shape[2])]
    for idx, span in zip(range(first, end), spans, strict=True):
        num_tokens = table.tokens_of(idx)
        keys, span_values, index = span.read(num_tokens, table.page_ids.get(idx), q.dtype)
        x = q @ keys.T * scale  # [G, T, m]
        x = softcap * torch.tanh(x / softcap) if softcap else x
        x = x if span.log_counts is None else x + span.log_counts[index].to(q.dtype)
        if causal and idx == end - 1:
            last_seen = num_tokens - num_queries + torch.arange(num_queries, device=q.device)  # [T]
            x = x.masked_fill(index > last_seen[:, None], -torch.inf)
        logits.append(x)
        values.append(span_values)
    x = torch.cat(logits, dim=2)
    if x.shape[2]:
        lse = x.logsumexp(dim=2)
        out = (x - lse.masked_fill(lse == -torch.inf, 0)[:, :, None]).exp() @ torch.cat(values)
    return out, lse
