"""What quantizers of keys before RoPE share: where the tokens of a head stand, and their rotation.

Not a method by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steno.types import Rope


def held_positions(positions: Tensor) -> Tensor | int:
    """Positions `[n]`, n > 0, as they are held: the first alone where they follow each other, else int32."""
    first = int(positions[0])
    follow = torch.equal(positions, torch.arange(first, first + len(positions), device=positions.device))
    return first if follow else positions.to(torch.int32)


def rotated(plain: Tensor, rope: Rope | None, positions: Tensor | int, first: int) -> Tensor:
    """Keys before RoPE `[m, D]`, those from the token `first` of a head on, after it."""
    if rope is None:
        return plain
    if isinstance(positions, int):
        return rope.apply(plain, torch.arange(first, first + len(plain), device=plain.device) + positions)
    return rope.apply(plain, positions[first : first + len(plain)])
