"""The block formats of llama.cpp's KV cache: 32 channels of a token with one fp16 scale and no minimum.

q8_0: whole numbers up to 127; q4_0: -8 to 7, where -8 is the element of the largest magnitude, whatever its sign.

Source: Gerganov et al., llama.cpp, `ggml/src/ggml-common.h` and `ggml-quants.c` (`quantize_row_q8_0_ref`,
    `quantize_row_q4_0_ref`), 2023, https://github.com/ggml-org/llama.cpp.
Differs: codes and scales are the same to the bit, but lie in pages, codes in lines and scales beside them. A head
    dimension that is no multiple of 32 has a shorter last block, where llama.cpp refuses. No Hadamard rotation, which newer
    versions apply to keys and values first: give `hadamard` as a transform for it.
Cost: one pass over the tokens of a page when it closes. 8.5 and 4.5 bits a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from steno.types import PAGE_TOKENS, Need, PageFormat

BLOCK = 32
_PAPER = "llama.cpp: LLM inference in C/C++"
_DIFFERS = (
    "Codes and scales are those of llama.cpp to the bit, but lie in pages; the last block of a head may be shorter; no "
    "Hadamard rotation."
)


@final
@dataclass(frozen=True, kw_only=True)
class Q8_0:
    """8-bit blocks of llama.cpp."""

    id: ClassVar[str] = "q8_0"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "llama.cpp q8_0"
    paper: ClassVar[str] = _PAPER
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = _DIFFERS

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=8, key_group=BLOCK, value_group=BLOCK, codebook="q8_0")

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS


@final
@dataclass(frozen=True, kw_only=True)
class Q4_0:
    """4-bit blocks of llama.cpp."""

    id: ClassVar[str] = "q4_0"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "llama.cpp q4_0"
    paper: ClassVar[str] = _PAPER
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = _DIFFERS

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=4, key_group=BLOCK, value_group=BLOCK, codebook="q4_0")

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS
