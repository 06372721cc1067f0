"""The most similar of some keys for each of others."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 1024
"""Keys that are compared at a time, so that the temporaries stay small beside the keys."""


def nearest_keys(keys: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For each of `keys` `[M, D]` the largest cosine with `others` `[N, D]`, N >= 1, and whose it is: `[M]` fp32 and int64.

    The first of equals. Temporaries: one fp32 copy of each, and `BLOCK * N` cosines.
    """
    directions, targets = normalize(keys.float(), dim=-1), normalize(others.float(), dim=-1)
    best = [(block @ targets.T).max(dim=1) for block in directions.split(BLOCK)]
    return torch.cat([b.values for b in best]), torch.cat([b.indices for b in best])
