"""RotateKV: rotate keys before RoPE across several heads, and lay channels of like level side by side; rotate values by head.

Source: Su, Chen, Shen, Wei, Yu, Yuan, Zhang, 2025, https://arxiv.org/abs/2501.16383, section 4; the authors' code (in which the
    rotation comes before the order of channels, as here).
Differs: the first tokens stay whole in place of those with the largest hidden states; without a file the channels are ordered by
    the prompt's own means; codes are a quantize stage's (`rotatekv | int2`), so there is no clipping, and the order of channels
    tells only where the stage groups the channels of a token; widths that are no power of two take a product with a DCT.
Cost: 2 Hkv D N FLOPs per token once and again per step, N = heads * D, to restore keys tile by tile; no dense copy remains.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.latent import LatentBasis
from steno.cache.transformed import Basis
from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_int, require_text
from steno.methods.transform.hadamard import rotation_on
from steno.types import PAGE_TOKENS, KeptTokens, Need, Widths


@final
@dataclass(frozen=True, kw_only=True)
class RotateKV:
    """A rotation of groups of heads before RoPE, and an order of channels.

    Parameters
    ----------
    heads : int, default 4
        KV heads that are rotated together; fewer where that does not divide the model's.
    sinks : int, default 4 tokens
        First tokens that stay whole.
    statistics : str or None, default None
        A file of `steno calibrate rotatekv` with the means of the keys. None: that of this model where there is one, else
        those of the prompt.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When a prompt is compressed, if the file of `statistics` cannot be used.
    """

    id: ClassVar[str] = "rotatekv"
    kind: ClassVar[str] = "transform"
    title: ClassVar[str] = "RotateKV"
    paper: ClassVar[str] = (
        "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via Outlier-Aware Adaptive Rotations"
    )
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2501.16383"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ROPE})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = False
    differs: ClassVar[str] = (
        "The first tokens stay whole in place of those with the largest hidden states; codes are a quantize stage's, without "
        "clipping; without a calibration file the order of channels is that of the prompt's means."
    )
    heads_together: ClassVar[bool] = True
    keeps_spans: ClassVar[bool] = False

    heads: int = 4
    sinks: int = 4
    statistics: str | None = None

    def __post_init__(self) -> None:
        require_int("heads", self.heads, 1)
        require_int("sinks", self.sinks, 0)
        if self.statistics is not None:
            require_text("statistics", self.statistics)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def first_tokens(self) -> int:
        return self.sinks

    @property
    def recent_tokens(self) -> int:
        return 0

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS

    def _group(self, num_kv_heads: int) -> int:
        return max(g for g in range(1, min(self.heads, num_kv_heads) + 1) if num_kv_heads % g == 0)

    def stored(self, widths: Widths) -> Widths:
        """The same numbers, and an int32 position."""
        return replace(widths, beside=widths.beside + 4)

    def basis_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """Both rotations fp32, the same for all layers, the order of channels and back int64, and the frequencies of RoPE."""
        heads, dim = widths.heads, widths.keys
        rotations = -(-4 * ((self._group(heads) * dim) ** 2 + dim**2) // num_layers)
        return rotations + 2 * 8 * heads * dim + 2 * dim

    def fit(self, tokens: KeptTokens) -> Basis:
        """The rotations of these widths, and channels in ascending order of their means after rotation."""
        num_kv_heads, dim, device = len(tokens.keys), tokens.keys[0].shape[1], tokens.keys[0].device
        width = self._group(num_kv_heads) * dim
        matrix = rotation_on(width, device)
        means = self._means(tokens).to(device).unflatten(0, (-1, width))  # [Hkv / g, g D]
        order = (means @ matrix).flatten().argsort(stable=True)
        return RotatedBasis(matrix=matrix, value_matrix=rotation_on(dim, device), order=order, back=order.argsort())

    def _means(self, tokens: KeptTokens) -> Tensor:
        """The mean key before RoPE, heads side by side: `[Hkv * D]` fp32."""
        if self.statistics is None:
            keys = [k if tokens.rope is None else tokens.rope.undo(k, tokens.positions[0]) for k in tokens.keys]
            return torch.cat([k.float().sum(0) / max(1, len(k)) for k in keys])
        means = load_calibration(self.statistics, ("key_mean",))["key_mean"]
        width = sum(k.shape[1] for k in tokens.keys)
        if list(means.shape) != [tokens.num_layers, width]:
            raise CalibrationError(
                f"the means of {self.statistics} must be those of this model, [{tokens.num_layers}, {width}]; got "
                f"{[*means.shape]}: calibrate on this model."
            )
        return means[tokens.layer_idx].float()


@final
@dataclass(frozen=True, kw_only=True)
class RotatedBasis(LatentBasis):
    """matrix: `[g D, g D]`, value_matrix: `[D, D]` fp32, orthonormal; order: `[Hkv * D]` int64 and its inverse `back`."""

    matrix: Tensor
    value_matrix: Tensor
    order: Tensor
    back: Tensor

    @property
    def num_kv_heads(self) -> int:
        return len(self.order) // len(self.value_matrix)

    def latent_keys(self, k: Tensor) -> Tensor:
        wide = k.transpose(0, 1).flatten(1)  # [n, C]
        return self._by_head((self._groups(wide) @ self.matrix.to(wide.dtype)).flatten(1)[:, self.order])

    def whole_keys(self, latents: Tensor) -> Tensor:
        wide = latents.transpose(0, 1).flatten(1)[:, self.back]
        return self._by_head((self._groups(wide) @ self.matrix.mT.to(wide.dtype)).flatten(1))

    def latent_values(self, v: Tensor) -> Tensor:
        return v @ self.value_matrix.to(v.dtype)

    def outputs(self, o: Tensor) -> Tensor:
        return o @ self.value_matrix.mT.to(o.dtype)

    def _groups(self, wide: Tensor) -> Tensor:
        """`[n, C]` to `[n, Hkv / g, g D]`."""
        return wide.unflatten(1, (-1, len(self.matrix)))

    def _by_head(self, wide: Tensor) -> Tensor:
        """`[n, C]` to `[Hkv, n, D]`."""
        return wide.unflatten(1, (self.num_kv_heads, -1)).transpose(0, 1).contiguous()
