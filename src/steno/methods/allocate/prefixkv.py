"""PrefixKV: every layer keeps the same share of its attention, so layers that concentrate it keep fewer tokens.

Source: Wang, Chen, Tan, Zhang, Cai, Lin, Han, Ding, 2024, https://arxiv.org/abs/2412.03409; the authors' code.
Differs: the offline variant; instead of one list of ratios for each budget the profile holds each layer's curve of
    gathered attention, and the share that all layers keep is found for whatever the budget is. The allocation only, for any
    scorer, where the authors keep one set of tokens for all heads of a layer; protected tokens are the scorer's, not the
    first 4 and the last; what is kept of the prompt stays while decoding.
Cost: 50 interpolations of L curves per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.allocate.rounding import largest_remainder
from steno.methods.checks import require_text
from steno.types import Need

POINTS = 101
"""Points of a curve, at equal steps from no token to all."""


@final
@dataclass(frozen=True, kw_only=True)
class PrefixKV:
    """Layer budgets at which all layers keep an equal share of their gathered attention.

    Parameters
    ----------
    weights : str or None, default None
        A file of `steno calibrate prefixkv`; None: the one that was made for the model.

    Raises
    ------
    BadArgument
        If `weights` is not text.
    CalibrationError
        When allocating, if the file of `weights` cannot be used.
    """

    id: ClassVar[str] = "prefixkv"
    kind: ClassVar[str] = "allocate"
    title: ClassVar[str] = "PrefixKV"
    paper: ClassVar[str] = (
        "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient Generation"
    )
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2412.03409"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    across_layers: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True
    by_head: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The offline variant, profiled on text; the allocation only, for any scorer, whose protected tokens replace the "
        "first 4 and the last; what is kept of the prompt stays while decoding."
    )

    weights: str | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            require_text("weights", self.weights)

    def allocate(self, scores: Tensor, *, budget_tokens: int, layer_idx: int, num_layers: int) -> Tensor:
        """Counts `[Hkv]` int64 from scores `[Hkv, S]`; the mean over layers is the budget."""
        assert self.weights is not None, "the cache names the weights of the model"
        curves = load_calibration(self.weights, ("curves",))["curves"]
        if list(curves.shape) != [num_layers, POINTS]:
            raise CalibrationError(
                f"the profile must be that of this model, [{num_layers}, {POINTS}]; got {list(curves.shape)}: calibrate on "
                "this model."
            )
        num_heads, num_tokens = scores.shape
        protected = max(1, int(torch.isposinf(scores).sum(-1).amax()))
        count = layer_counts(curves, num_tokens, budget_tokens, protected)[layer_idx]
        return torch.full((num_heads,), count, dtype=torch.int64, device=scores.device)


@lru_cache(maxsize=64)
def layer_counts(curves: Tensor, num_tokens: int, budget_tokens: int, protected: int) -> tuple[int, ...]:
    """Tokens per layer that sum to L times the budget: `protected` ones, and those up to one share of attention for all.

    curves: `[L, POINTS]`, the share of its attention that a layer keeps with that share of its best tokens.
    """
    num_layers, budget = len(curves), min(budget_tokens, num_tokens)
    room = num_tokens - min(protected, num_tokens)
    spare = num_layers * (budget - protected)
    if spare <= 0 or room == 0:
        return (budget,) * num_layers
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if float(kept_shares(curves, middle).sum()) * room < spare:
            low = middle
        else:
            high = middle
    shares = kept_shares(curves, high).double() * room
    shares = shares * min(1.0, spare / float(shares.sum()))
    return tuple(protected + n for n in largest_remainder(shares.tolist(), [room] * num_layers, spare))


def kept_shares(curves: Tensor, share: float) -> Tensor:
    """Share of the tokens `[L]` that each layer keeps to hold `share` of its attention, between two points linear."""
    rising = curves.double().cummax(1).values
    above = (rising >= share).double().argmax(1).clamp(min=1)  # [L], the first point that holds it
    upper, lower = rising.gather(1, above[:, None])[:, 0], rising.gather(1, above[:, None] - 1)[:, 0]
    part = ((share - lower) / (upper - lower).clamp(min=1e-12)).clamp(0, 1)
    reached = (above - 1 + part) / (POINTS - 1)
    return torch.where(rising[:, -1] >= share, reached, 1.0)
