"""KIVI: keys have outlier channels, values do not, so keys share scales along time and values along channels.

Source: Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu, 2024, https://arxiv.org/abs/2402.02750, section 4; the
    authors' code.
Differs: keys and values share one dense tail that empties whole when it holds R tokens (the paper's values keep a
    window of exactly R); groups are taken post-RoPE per KV head; codes are computed with the scales as stored.
Cost: one pass over R tokens every R steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from steno.errors import BadArgument
from steno.methods.checks import require_choice, require_int
from steno.types import PAGE_TOKENS, Need, PageFormat


@final
@dataclass(frozen=True, kw_only=True)
class KIVI:
    """Low-bit pages behind a dense tail of the newest tokens.

    Parameters
    ----------
    bits : int, default 2 bits
        8, 4 or 2, for keys and values.
    group : int, default 32
        Tokens of a key channel, and channels of a value, that share a scale: 16, 32 or 64.
    residual : int, default 128 tokens
        The tail becomes pages when it holds this many; a multiple of 64.

    Raises
    ------
    BadArgument
        If a value is none of these.
    """

    id: ClassVar[str] = "kivi"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "KIVI"
    paper: ClassVar[str] = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2402.02750"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Keys and values share one dense tail of T mod R tokens (the paper's values keep a window of exactly R); "
        "groups are taken post-RoPE per KV head."
    )

    bits: int = 2
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, (8, 4, 2))
        require_choice("group", self.group, (16, 32, 64))
        require_int("residual", self.residual, PAGE_TOKENS)
        if self.residual % PAGE_TOKENS:
            raise BadArgument(f"`residual` must be a multiple of {PAGE_TOKENS}; got residual={self.residual}.")

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=self.bits, key_group=self.group, value_group=self.group)

    @property
    def residual_tokens(self) -> int:
        return self.residual
