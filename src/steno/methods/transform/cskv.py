"""CSKV: old tokens as narrow vectors over all heads, the newest whole, and no token in both for longer than a window.

Source: Wang, Liu, Zhang, Ma, Fu, Ning, Wang, 2024, https://arxiv.org/abs/2409.10593, section 3; the authors' code.
Differs: the factors A and B are not trained by gradient: the layer-wise loss ||K - x A B||^2 has its minimum at the r
    principal directions of K (Eckart-Young), which are computed from calibrated second moments, or from those of the prompt
    without a file. Windows close as pages do with a quantize stage. The paper's 4-bit latents, fine-tuned through the
    quantizer, are a quantize stage without that: `cskv | int4`.
Cost: an eigendecomposition of `[C, C]` per layer once, C = Hkv D; per step and old token 2 C r FLOPs to restore keys, tile by
    tile, since each token is rotated by another angle; values are
    never restored, nor opened from codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from steno.cache.transformed import Basis
from steno.methods.checks import require_int, require_real, require_text
from steno.methods.transform.moments import low_rank_basis
from steno.types import KeptTokens, Need, Widths


@final
@dataclass(frozen=True, kw_only=True)
class CSKV:
    """Channel shrinking with a second branch of whole new tokens.

    Parameters
    ----------
    key_density, value_density : float, default 0.5
        Width of the narrow vectors as a share of all channels of a layer, `Hkv * D`.
    window : int, default 32 tokens
        New tokens stay whole until so many are there; then all of them shrink at once.
    statistics : str or None, default None
        A file of `steno calibrate cskv` with the second moments of keys and values. None: that of this model where there is
        one, else those of the prompt.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When a prompt is compressed, if the file of `statistics` cannot be used.
    """

    id: ClassVar[str] = "cskv"
    kind: ClassVar[str] = "transform"
    title: ClassVar[str] = "CSKV"
    paper: ClassVar[str] = "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2409.10593"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ROPE})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The minimum of the layer-wise reconstruction loss is computed in closed form instead of fine-tuned; without a "
        "calibration file the moments are those of the prompt; latents in 4 bits are a quantize stage, cskv | int4, which is not "
        "trained for and closes windows at its own length."
    )
    heads_together: ClassVar[bool] = True
    keeps_spans: ClassVar[bool] = False

    key_density: float = 0.5
    value_density: float = 0.5
    window: int = 32
    statistics: str | None = None

    def __post_init__(self) -> None:
        require_real("key_density", self.key_density, 0, 1)
        require_real("value_density", self.value_density, 0, 1)
        require_int("window", self.window, 1)
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
        return self.window

    def _ranks(self, num_kv_heads: int, head_dim: int) -> tuple[int, int]:
        """As in the authors' code, a whole number for every head."""
        key, value = (max(1, int(x * head_dim)) * num_kv_heads for x in (self.key_density, self.value_density))
        return key, value

    def stored(self, widths: Widths) -> Widths:
        """One narrow vector for all heads, and an int32 position."""
        keys, values = self._ranks(widths.heads, widths.keys)
        return Widths(heads=1, keys=keys, values=values, beside=widths.beside + 4)

    def basis_bytes(self, widths: Widths, num_layers: int, number_bytes: int) -> int:
        """The directions of all channels, and the frequencies of RoPE."""
        heads, dim = widths.heads, widths.keys
        return heads * dim * sum(self._ranks(heads, dim)) * number_bytes + 2 * dim

    def fit(self, tokens: KeptTokens) -> Basis:
        """The principal directions of this layer over all its heads, of the calibration text or of this prompt."""
        key_rank, value_rank = self._ranks(len(tokens.keys), tokens.keys[0].shape[1])
        return low_rank_basis(tokens, 1, key_rank, value_rank, self.statistics)
