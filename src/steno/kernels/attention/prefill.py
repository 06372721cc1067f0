"""Attention of many queries over dense keys: PyTorch's SDPA in blocks of queries, never a T×T mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 512


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> Tensor:
    """Causal attention of the last T of S tokens.

    q: `[B, H, T, D]`; k, v: `[B, Hkv, S, D]`, S >= T; query t sees keys `0 .. S - T + t`.
    softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2). sinks: `[H]` logits of a learned sink that takes
    weight and gives no value (gpt-oss). Returns `[B, H, T, D]` in q's dtype.
    """
    if softcap is None and sinks is None:
        return _sdpa(q, k, v, scale)
    blocks = [
        _explicit(q[:, :, a : a + QUERY_BLOCK], k, v, k.shape[2] - q.shape[2] + a, scale, softcap, sinks)
        for a in range(0, q.shape[2], QUERY_BLOCK)
    ]
    return torch.cat(blocks, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    num_new, num_keys = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if num_new == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=num_new > 1, scale=scale, enable_gqa=gqa)
    past, blocks = num_keys - num_new, []
    for a in range(0, num_new, QUERY_BLOCK):
        block = q[:, :, a : a + QUERY_BLOCK]
        end = past + a + block.shape[2]
        mask = None
        if block.shape[2] > 1:
            mask = torch.ones(block.shape[2], end, dtype=torch.bool, device=q.device).tril_(past + a)
        blocks.append(
            F.scaled_dot_product_attention(
                block, k[:, :, :end], v[:, :, :end], attn_mask=mask, scale=scale, enable_gqa=gqa
            )
        )
    return torch.cat(blocks, dim=2)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, past: int, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    num_rows, num_heads, num_new, dim = q.shape
    num_kv_heads, end = k.shape[1], past + num_new
    grouped = q.reshape(num_rows, num_kv_heads, -1, num_new, dim)  # [B, Hkv, G, T, D]
    logits = torch.einsum("bkgtd,bksd->bkgts", grouped, k[:, :, :end]) * scale  # [B, Hkv, G, T, S]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    future = torch.ones(num_new, end, dtype=torch.bool, device=q.device).triu_(past + 1)
    logits = logits.float().masked_fill(future, -torch.inf)
    if sinks is not None:
        column = sinks.float().view(1, num_kv_heads, -1, 1, 1).expand(num_rows, -1, -1, num_new, 1)
        weights = torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(logits, dim=-1)
    out = torch.einsum("bkgts,bksd->bkgtd", weights.to(v.dtype), v[:, :, :end])
    return out.reshape(num_rows, num_heads, num_new, dim)
