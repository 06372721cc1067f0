"""Hadamard: rotate keys, values and queries so that no channel stands out, and coarse codes lose less.

Source: Ashkboos, Mohtashami, Croci, Li, Cameron, Jaggi, Alistarh, Hoefler, Hensman, QuaRot, 2024,
    https://arxiv.org/abs/2404.00456, section 4 (the rotation of keys, queries and values in each head).
Differs: nothing is folded into the weights: queries are rotated after RoPE and outputs back at every step, so any model
    runs as it is; a head dimension 2^a m with m odd takes the Kronecker product with the orthonormal DCT of size m.
Cost: 2 D^2 FLOPs per query head and step, and per KV head and token once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.transformed import Basis, MatrixBasis
from steno.types import PAGE_TOKENS, KeptTokens, Need, Widths


@final
@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """An orthonormal Walsh-Hadamard rotation of every head; no parameters."""

    id: ClassVar[str] = "hadamard"
    kind: ClassVar[str] = "transform"
    title: ClassVar[str] = "Hadamard rotation"
    paper: ClassVar[str] = "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2404.00456"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "Queries and outputs are rotated at every step instead of folding the rotation into the weights; head dimensions "
        "that are no power of two take a Kronecker product with a DCT."
    )
    heads_together: ClassVar[bool] = False
    keeps_spans: ClassVar[bool] = True

    @property
    def query_window(self) -> int:
        return 0

    @property
    def first_tokens(self) -> int:
        return 0

    @property
    def recent_tokens(self) -> int:
        return 0

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS

    def stored(self, widths: Widths) -> Widths:
        return widths

    def basis_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """One matrix `[D, D]` fp32 for all heads and layers, or two where a transform before this one left unequal widths."""
        return -(-4 * sum(d**2 for d in {widths.keys, widths.values}) // num_layers)

    def fit(self, tokens: KeptTokens) -> Basis:
        """The rotation of these widths, whatever the tokens."""
        keys, values = tokens.keys[0], tokens.values[0]
        return hadamard_basis(keys.shape[1], values.shape[1], keys.device)


@lru_cache(maxsize=16)
def hadamard_basis(key_dim: int, value_dim: int, device: torch.device) -> MatrixBasis:
    """The rotation of keys and values of these widths, the same object for all who ask."""
    return MatrixBasis(key_matrix=rotation_on(key_dim, device)[None], value_matrix=rotation_on(value_dim, device)[None])


@lru_cache(maxsize=16)
def rotation_on(dim: int, device: torch.device) -> Tensor:
    """`rotation` on a device, the same tensor for all who ask."""
    return rotation(dim).to(device)


def rotation(dim: int) -> Tensor:
    """An orthonormal matrix `[dim, dim]` fp32 that spreads every channel over all: Hadamard of the power of two in `dim`,
    in a Kronecker product with the DCT of what is odd in it."""
    odd = dim // (dim & -dim)
    n = torch.arange(odd, dtype=torch.float64)
    matrix = torch.cos(math.pi / odd * n[:, None] * (n + 0.5)) * (2 / odd) ** 0.5  # DCT-II
    matrix[0] /= 2**0.5
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
    return matrix.float()
