"""Lines of unequal length, one for each KV head of all rows: side by side, flat, and the best of each."""

from __future__ import annotations

import torch
from torch import Tensor


def best(scores: Tensor, counts: Tensor) -> Tensor:
    """Which places of each line have its `counts` `[R]` highest scores `[R, n]`, as a mask; of equals the earlier.

    Places that are not there score -inf; no more are taken than there are.
    """
    there = scores > -torch.inf
    counts = torch.minimum(counts.to(scores.device), there.sum(1))
    most = int(counts.max()) if len(counts) else 0
    if not most:
        return torch.zeros_like(there)
    least = scores.topk(most).values.gather(1, (counts - 1).clamp(min=0)[:, None])  # the lowest that is taken
    above, equal = scores > least, scores == least
    room = counts[:, None] - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= room))) & there & (counts > 0)[:, None]


def with_ends(scores: Tensor, counts: Tensor, *, first: int = 0, last: Tensor | int = 0) -> Tensor:
    """Scores `[R, n]` with +inf for the first and the last of the `counts` `[R]` places that each line has."""
    counts = counts.to(scores.device)[:, None]
    ends = last.to(scores.device)[:, None] if isinstance(last, Tensor) else last
    place = torch.arange(scores.shape[1], device=scores.device)
    return scores.masked_fill((place < counts) & ((place < first) | (place >= counts - ends)), torch.inf)


def padded(flat: Tensor, counts: Tensor, fill: float) -> Tensor:
    """`[N, ...]`, in runs of `counts` `[R]`, as `[R, max, ...]`; without a copy where the runs are alike."""
    widest = int(counts.max()) if len(counts) else 0
    if bool((counts == widest).all()):
        return flat.view(len(counts), widest, *flat.shape[1:])
    out = flat.new_full((len(counts), widest, *flat.shape[1:]), fill)
    out[~beyond(counts, widest, flat.device)] = flat
    return out


def beyond(counts: Tensor, width: int, device: torch.device) -> Tensor:
    """Which of `width` places of each line lie beyond its count: `[R, width]` bool."""
    return torch.arange(width, device=device) >= counts.to(device)[:, None]
