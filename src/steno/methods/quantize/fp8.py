"""FP8: numbers with 8-bit floats' four or five bits of exponent, and one scale per token and head.

Source: Micikevicius et al., FP8 Formats for Deep Learning, 2022, https://arxiv.org/abs/2209.05433; Open Compute Project,
    8-bit Floating Point Specification, 2023 (E4M3 without infinities, largest 448, and E5M2).
Differs: serving engines have one calibrated or fixed scale per tensor; here every token of every KV head has its own, from
    its largest number, in fp16, so nothing saturates and nothing is calibrated (16 / D bits a value). E5M2 uses it up to
    448 too, where fp16 still holds the scale. Products are computed in fp32, not in FP8.
Cost: one pass over the tokens of a page when it closes. 8 + 16 / D bits a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from steno.methods.checks import require_choice
from steno.types import PAGE_TOKENS, Need, PageFormat

WHOLE_TOKEN = 1 << 16
"""A group of channels that is the whole token, whatever its head dimension."""


@final
@dataclass(frozen=True, kw_only=True)
class FP8:
    """Pages of 8-bit floats.

    Parameters
    ----------
    dtype : str, default "e4m3"
        "e4m3": 3 bits of mantissa; "e5m2": 2 bits, and a wider range within a token.

    Raises
    ------
    BadArgument
        If `dtype` is neither.
    """

    id: ClassVar[str] = "fp8"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "FP8 pages"
    paper: ClassVar[str] = "FP8 Formats for Deep Learning"
    year: ClassVar[int] = 2022
    arxiv: ClassVar[str] = "2209.05433"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Every token of every KV head has its own fp16 scale in place of a calibrated one per tensor; products are computed "
        "in fp32."
    )

    dtype: str = "e4m3"

    def __post_init__(self) -> None:
        require_choice("dtype", self.dtype, ("e4m3", "e5m2"))

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=8, key_group=WHOLE_TOKEN, value_group=WHOLE_TOKEN, codebook=self.dtype)

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS
