"""Put attention over the parts of a partition together, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint token sets.

    Parameters
    ----------
    outs: `[..., D]` each, any float dtype; lses: `[...]` fp32 each, -inf where a part has no visible token.

    Returns
    -------
    out `[..., D]` in the dtype of the first part, and lse `[...]`: `out = sum_i exp(lse_i - lse) out_i`; 0 and -inf if
    all parts are empty.
    """
    stacked = torch.stack(list(lses))  # [parts, ...]
    lse = stacked.logsumexp(dim=0)
    weights = (stacked - lse.masked_fill(lse == -torch.inf, 0)).exp()
    parts = torch.stack([out.to(weights.dtype) for out in outs])
    return (weights.unsqueeze(-1) * parts).sum(dim=0).to(outs[0].dtype), lse
