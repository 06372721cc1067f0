"""What Palu and CSKV share: low-rank bases from second moments, of a calibration file or of the prompt.

Not a method by itself. A file holds `key_moment` and `value_moment`, `[L, C, C]` with C = Hkv D, of keys before RoPE and
values, heads side by side.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from steno.cache.latent import LowRankBasis, principal_directions, second_moment
from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.types import KeptTokens

MOMENTS = ("key_moment", "value_moment")


def low_rank_basis(
    tokens: KeptTokens, num_groups: int, key_rank: int, value_rank: int, statistics: str | None
) -> LowRankBasis:
    """The principal directions of this layer in `num_groups` groups of neighbouring heads.

    Raises CalibrationError if the file of `statistics` is not one of this model.
    """
    dim = tokens.keys[0].shape[1]
    if statistics is None:
        keys = [k if tokens.rope is None else tokens.rope.undo(k, tokens.positions[0]) for k in tokens.keys]
        moments = second_moment(keys), second_moment(tokens.values)
        return _basis(*moments, num_groups, key_rank, value_rank, dim, tokens.keys[0].dtype)
    found = load_calibration(statistics, MOMENTS)
    key, value = found["key_moment"], found["value_moment"]
    width = len(tokens.keys) * dim
    if list(key.shape) != [tokens.num_layers, width, width] or key.shape != value.shape:
        raise CalibrationError(
            f"the moments of {statistics} must be those of this model, [{tokens.num_layers}, {width}, {width}]; got "
            f"{[*key.shape]} and {[*value.shape]}: calibrate on this model."
        )
    like = tokens.keys[0]
    ranks = num_groups, key_rank, value_rank, dim
    return _calibrated(key, value, tokens.layer_idx, *ranks, like.dtype, like.device)


@lru_cache(maxsize=256)
def _calibrated(
    key: Tensor,
    value: Tensor,
    layer_idx: int,
    num_groups: int,
    key_rank: int,
    value_rank: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LowRankBasis:
    """One basis for all sequences; the tensors of a file are the same objects as long as it does not change."""
    moments = key[layer_idx].to(device).float(), value[layer_idx].to(device).float()
    return _basis(*moments, num_groups, key_rank, value_rank, dim, dtype)


def _basis(
    key: Tensor, value: Tensor, num_groups: int, key_rank: int, value_rank: int, dim: int, dtype: torch.dtype
) -> LowRankBasis:
    return LowRankBasis(
        key_directions=principal_directions(key, num_groups, key_rank).to(dtype),
        value_directions=principal_directions(value, num_groups, value_rank).to(dtype),
        head_dim=dim,
    )
