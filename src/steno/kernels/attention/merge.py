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
    out, lse = outs[0].to(torch.promote_types(outs[0].dtype, torch.float32)), lses[0]
    for other, other_lse in zip(outs[1:], lses[1:], strict=True):
        share = (other_lse - lse).sigmoid_().nan_to_num_(0.0)  # not a number where both are empty
        out = torch.lerp(out, other.to(out.dtype), share.to(out.dtype).unsqueeze(-1))
        lse = torch.logaddexp(lse, other_lse)
    return out.to(outs[0].dtype), lse
