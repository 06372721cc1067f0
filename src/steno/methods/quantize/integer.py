"""Integer pages: 8, 4 or 2 bits with a scale and a minimum per group, keys along time, values along channels.

Source: Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko, 2017, https://arxiv.org/abs/1712.05877, section
    2.1 (the affine scheme); the axes are those of KIVI, Liu et al., 2024, https://arxiv.org/abs/2402.02750.
Differs: the minimum is stored in place of a whole zero point, and the range of each group is its own, not
    calibrated.
Cost: one pass over the tokens of a page when it closes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from steno.methods.checks import require_choice
from steno.types import PAGE_TOKENS, Need, PageFormat

_GROUPS = (16, 32, 64)
_PAPER = "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"
_DIFFERS = (
    "The minimum is stored in place of a whole zero point; each group's range is its own, not calibrated; "
    "keys are grouped along time and values along channels, as in KIVI."
)


@final
@dataclass(frozen=True, kw_only=True)
class Int8:
    """8-bit pages.

    Parameters
    ----------
    group : int, default 64
        Tokens of a key channel, and channels of a value, that share a scale: 16, 32 or 64.

    Raises
    ------
    BadArgument
        If `group` is another number.
    """

    id: ClassVar[str] = "int8"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "8-bit pages"
    paper: ClassVar[str] = _PAPER
    year: ClassVar[int] = 2017
    arxiv: ClassVar[str] = "1712.05877"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = _DIFFERS

    group: int = 64

    def __post_init__(self) -> None:
        require_choice("group", self.group, _GROUPS)

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=8, key_group=self.group, value_group=self.group)

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS


@final
@dataclass(frozen=True, kw_only=True)
class Int4:
    """4-bit pages; see `Int8` for the parameters."""

    id: ClassVar[str] = "int4"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "4-bit pages"
    paper: ClassVar[str] = _PAPER
    year: ClassVar[int] = 2017
    arxiv: ClassVar[str] = "1712.05877"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = _DIFFERS

    group: int = 64

    def __post_init__(self) -> None:
        require_choice("group", self.group, _GROUPS)

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=4, key_group=self.group, value_group=self.group)

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS


@final
@dataclass(frozen=True, kw_only=True)
class Int2:
    """2-bit pages; see `Int8` for the parameters."""

    id: ClassVar[str] = "int2"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "2-bit pages"
    paper: ClassVar[str] = _PAPER
    year: ClassVar[int] = 2017
    arxiv: ClassVar[str] = "1712.05877"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = _DIFFERS

    group: int = 64

    def __post_init__(self) -> None:
        require_choice("group", self.group, _GROUPS)

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=2, key_group=self.group, value_group=self.group)

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS
