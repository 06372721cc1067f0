"""NVFP4: 4-bit floats (E2M1) in blocks of 16 channels, each with an 8-bit scale.

Source: NVIDIA, NVFP4 (Blackwell, 2025), https://developer.nvidia.com/blog/introducing-nvfp4-for-efficient-and-accurate-low-precision-inference/;
    Pretraining Large Language Models with NVFP4, 2025, https://arxiv.org/abs/2509.25149, section 2 (x = e2m1 * E4M3 block
    scale * fp32 tensor scale).
Differs: the fp32 scale is that of a page of 64 tokens of one KV head, set when the page closes, where the recipe has one per
    tensor, which an append-only cache would have to guess. Products are computed in fp32, not in FP8 or FP4.
Cost: one pass over the tokens of a page when it closes. 4.5 bits a value, and 32 bits a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from steno.types import PAGE_TOKENS, Need, PageFormat

BLOCK = 16


@final
@dataclass(frozen=True, kw_only=True)
class NVFP4:
    """Pages of 4-bit floats with a scale per 16 channels of a token."""

    id: ClassVar[str] = "nvfp4"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "NVFP4 pages"
    paper: ClassVar[str] = "Pretraining Large Language Models with NVFP4"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2509.25149"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The fp32 scale is that of a page of 64 tokens of one KV head in place of a tensor's; products are computed in fp32."
    )

    @property
    def page_format(self) -> PageFormat:
        return PageFormat(bits=4, key_group=BLOCK, value_group=BLOCK, codebook="nvfp4")

    @property
    def residual_tokens(self) -> int:
        return PAGE_TOKENS
