"""Attention of many queries over dense keys: flash kernels in parts, never a T×T mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from steno.kernels.attention import dense
from steno.kernels.attention.mass import attention_mass
from steno.kernels.attention.merge import merge_attention

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
        # in 16 bits SDPA rounds as the host does, and is far ahead where the processor has matrix units
        if dense.can_run(q, k, v) and (q.dtype == torch.float32 or q.shape[2] < k.shape[2]):
            return dense.flash_attention(q, k, v, scale=scale, causal=True)[0]
        return _sdpa(q, k, v, scale)
    blocks = [
        _explicit(q[:, :, a : a + QUERY_BLOCK], k, v, k.shape[2] - q.shape[2] + a, scale, softcap, sinks)
        for a in range(0, q.shape[2], QUERY_BLOCK)
    ]
    return torch.cat(blocks, dim=2)


def causal_attention_and_mass(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, softcap: float | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`causal_attention` and the attention that each key got from all queries, `[B, H, S]` fp32; sinks take none of it.

    Natively both come from one pass: column sums of weights that are there anyway.
    """
    if softcap is None and sinks is None and dense.can_run(q, k, v):
        return dense.flash_attention_and_mass(q, k, v, scale=scale)
    past = k.shape[2] - q.shape[2]
    mass = [attention_mass(*row, scale=scale, softcap=softcap, offset=past) for row in zip(q, k, strict=True)]
    return causal_attention(q, k, v, scale=scale, softcap=softcap, sinks=sinks), torch.stack(mass)


def attention_and_lse(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of T queries over S keys with its log-sum-exp: natively, else by PyTorch's flash kernel for CPUs, else in blocks.

    q: `[B, H, T, D]`; k, v: `[B, Hkv, S, D]`; causal: S = T and query t sees keys `0 .. t`; otherwise all keys.
    Returns out `[B, H, T, D]` in q's dtype and log-sum-exp `[B, H, T]` fp32.
    """
    if dense.can_run(q, k, v):
        return dense.flash_attention(q, k, v, scale=scale, causal=causal)
    if q.device.type == "cpu" and q.dtype != torch.float64:
        # the operator behind SDPA on a CPU; SDPA itself does not hand out the log-sum-exp
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse.float()
    outs, lses = [], []
    for a in range(0, q.shape[2], QUERY_BLOCK):
        block = q[:, :, a : a + QUERY_BLOCK]
        end = a + block.shape[2] if causal else k.shape[2]
        grouped = block.reshape(q.shape[0], k.shape[1], -1, block.shape[2], q.shape[3])  # [B, Hkv, G, T, D]
        logits = torch.einsum("bkgtd,bksd->bkgts", grouped, k[:, :, :end]).float() * scale
        if causal:
            logits.masked_fill_(
                torch.ones(block.shape[2], end, dtype=torch.bool, device=q.device).triu_(a + 1), -torch.inf
            )
        out = torch.einsum("bkgts,bksd->bkgtd", logits.softmax(-1).to(v.dtype), v[:, :, :end])
        outs.append(out.reshape(block.shape))
        lses.append(logits.logsumexp(-1).reshape(block.shape[:3]))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    num_new, num_keys = q.shape[2], k.shape[2]
    gqa = q.shape[1] != k.shape[1]
    if num_new == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=num_new > 1, scale=scale, enable_gqa=gqa)
    past = num_keys - num_new
    # two parts without a mask, the past and the new tokens among themselves, are faster than one with a mask
    parts = [
        attention_and_lse(q, k[:, :, :past], v[:, :, :past], scale=scale, causal=False),
        attention_and_lse(q, k[:, :, past:], v[:, :, past:], scale=scale, causal=True),
    ]
    return merge_attention([out for out, _ in parts], [lse for _, lse in parts])[0]


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
