"""Keys before and after rotation: its angles alone, whatever else a model's rotary embedding does to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from steno.errors import UnsupportedAttention


@final
class Rotation:
    """Turns channels i and i + R / 2 of each key by `position * frequencies[i]`; those from R on stay. Keeps its last angles.

    frequencies: R / 2 of them.
    """

    def __init__(self, frequencies: Sequence[float]) -> None:
        self.frequencies = tuple(frequencies)
        self._angles: tuple[Tensor, Tensor, Tensor] | None = None

    @classmethod
    def of(cls, layer: Any, device: torch.device) -> Rotation | None:
        """That of a `LayerCache`; None where the model does not rotate, or in a way that steno cannot undo."""
        try:
            rope = layer.rope_of(device)
        except UnsupportedAttention:
            return None
        return None if rope is None else cls(rope.inv_freq.tolist())

    @classmethod
    def from_json(cls, value: Any, head_dim: int) -> Rotation:
        """From a list of numbers in a file; raises ValueError if it is no such list."""
        if not isinstance(value, list) or not all(type(x) in (int, float) and abs(x) <= 1e6 for x in value):
            raise ValueError("a rotation must be a list of frequencies")
        if 2 * len(value) > head_dim:
            raise ValueError(f"a rotation of {2 * len(value)} channels does not fit heads of dimension {head_dim}")
        return cls(value)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[n, R / 2]` fp32 of positions `[n]`."""
        if self._angles is None or not torch.equal(self._angles[0], positions):
            frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
            angles = positions.double()[:, None] * frequencies
            self._angles = (positions, angles.cos().float(), angles.sin().float())
        return self._angles[1], self._angles[2]


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates x `[..., D]` fp32 in place by angles `[..., R / 2]` that broadcast."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    before = first.clone()
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).addcmul_(before, sin)
