"""Palu: keep of every token, per group of heads, only a few numbers, from which keys and values are projected back.

Source: Chang, Lin, Lin, Chen, Hu, Wang, Huang, Ceze, Abdelfattah, Wu, 2024, https://arxiv.org/abs/2407.21118, section 3;
    the authors' code.
Differs: the factors are found from the second moment of keys and values themselves: the whitened SVD of a projection W
    truncated to rank r is W V V^T with the r principal directions V of x W, so projecting the cached vectors gives the same
    latents up to a rotation, for any model and with no change of its weights. Without a file the moments are those of the
    prompt. Ranks are one for all layers in place of the Fisher search. A bias of the projections counts as part of the
    vectors. The Hadamard on latents is a stage of its own: `palu | hadamard | int4`.
Cost: an eigendecomposition of `[g D, g D]` per group and layer once; per step and token 2 g D r FLOPs per KV head to restore
    keys, tile by tile, since each token is rotated by another angle; values are
    never restored, nor opened from codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from steno.cache.transformed import Basis
from steno.methods.checks import require_int, require_real, require_text
from steno.methods.transform.moments import low_rank_basis
from steno.types import PAGE_TOKENS, KeptTokens, Need, Widths


@final
@dataclass(frozen=True, kw_only=True)
class Palu:
    """Low-rank latents of keys before RoPE and of values.

    Parameters
    ----------
    key_share, value_share : float, default 0.5
        Rank of the latents as a share of their width.
    heads : int, default 4
        KV heads that share a latent; fewer where that does not divide the model's.
    statistics : str or None, default None
        A file of `steno calibrate palu` with the second moments of keys and values. None: that of this model where there is
        one, else those of the prompt.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When a prompt is compressed, if the file of `statistics` cannot be used.
    """

    id: ClassVar[str] = "palu"
    kind: ClassVar[str] = "transform"
    title: ClassVar[str] = "Palu"
    paper: ClassVar[str] = "Palu: Compressing KV-Cache with Low-Rank Projection"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.21118"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ROPE})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Cached vectors are projected on the principal directions of calibrated second moments, which is what the whitened "
        "SVD of the weights comes to; ranks are one for all layers instead of Fisher-searched; without a calibration file "
        "the moments are those of the prompt."
    )
    heads_together: ClassVar[bool] = True
    keeps_spans: ClassVar[bool] = False

    key_share: float = 0.5
    value_share: float = 0.5
    heads: int = 4
    statistics: str | None = None

    def __post_init__(self) -> None:
        require_real("key_share", self.key_share, 0, 1)
        require_real("value_share", self.value_share, 0, 1)
        require_int("heads", self.heads, 1)
        if self.statistics is not None:
            require_text("statistics", self.statistics)

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

    def _group(self, num_kv_heads: int) -> int:
        return max(g for g in range(1, min(self.heads, num_kv_heads) + 1) if num_kv_heads % g == 0)

    def _ranks(self, width: int) -> tuple[int, int]:
        return max(1, round(width * self.key_share)), max(1, round(width * self.value_share))

    def stored(self, widths: Widths) -> Widths:
        """A latent for each group, and an int32 position."""
        group = self._group(widths.heads)
        keys, values = self._ranks(group * widths.keys)
        return Widths(heads=widths.heads // group, keys=keys, values=values, beside=widths.beside + 4)

    def basis_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """The directions of every group, and the frequencies of RoPE."""
        group = self._group(widths.heads)
        return widths.heads * widths.keys * sum(self._ranks(group * widths.keys)) * number_bytes + 2 * widths.keys

    def fit(self, tokens: KeptTokens) -> Basis:
        """The principal directions of this layer, of the calibration text or of this prompt."""
        num_kv_heads, dim = len(tokens.keys), tokens.keys[0].shape[1]
        group = self._group(num_kv_heads)
        key_rank, value_rank = self._ranks(group * dim)
        return low_rank_basis(tokens, num_kv_heads // group, key_rank, value_rank, self.statistics)
