"""The tokens of one forward pass, as one layer gets them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """T new tokens of B rows, with their queries.

    q: `[B, H, T, D]`; k, v: `[B, Hkv, T, D]`. counts: real tokens per row, the last ones, when the batch is padded on the
    left; None if nothing is padded. scale, softcap: of the logits. sinks: `[H]` logits of a learned sink (gpt-oss).
    hidden: `[B, T, hidden]`, what went into the attention module, where a recipe looks at it. is_image: `[B, T]` bool, where
    a recipe asks. positions: `[T]`, the true ones of the only row, where tokens may go round a layer; None: they follow on.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    counts: list[int] | None
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    hidden: Tensor | None = None
    is_image: Tensor | None = None
    positions: Tensor | None = None

    @property
    def num_new(self) -> int:
        return self.q.shape[2]

    @property
    def row_counts(self) -> list[int]:
        """Real tokens per row."""
        return [self.num_new] * self.q.shape[0] if self.counts is None else self.counts

    def row(self, b: int) -> NewTokens:
        """The real tokens of one row, as a batch of one."""
        first = self.num_new - self.row_counts[b]
        q, k, v = (x[b : b + 1, :, first:] for x in (self.q, self.k, self.v))
        hidden = None if self.hidden is None else self.hidden[b : b + 1, first:]
        is_image = None if self.is_image is None else self.is_image[b : b + 1, first:]
        return replace(self, q=q, k=k, v=v, counts=None, hidden=hidden, is_image=is_image)

    def part(self, start: int, stop: int) -> NewTokens:
        """The tokens `start .. stop` of every row."""
        q, k, v = (x[:, :, start:stop] for x in (self.q, self.k, self.v))
        counts = self.counts
        if counts is not None:
            counts = [max(0, min(stop - start, stop - (self.num_new - n))) for n in counts]
        return replace(self, q=q, k=k, v=v, counts=counts)

    def scatter_(self, out: Tensor, b: int, row_out: Tensor) -> None:
        """Writes the output `[1, H, n, D]` of the real tokens of a row into `out` `[B, H, T, D]`."""
        out[b, :, self.num_new - row_out.shape[2] :] = row_out[0]

    def with_sinks(self, out: Tensor, lse: Tensor) -> Tensor:
        """Adds the learned sinks to a finished attention: out `[B, H, T, D]`, log-sum-exp `[B, H, T]`."""
        if self.sinks is None:
            return out
        share = torch.sigmoid(lse - self.sinks.float().view(1, -1, 1))  # what the sink leaves to the tokens
        return out * share[..., None].to(out.dtype)
