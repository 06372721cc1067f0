"""Evict: tokens that are not kept are dropped, and nothing of them remains.

Source: the rule of all eviction papers.
Differs: nothing to differ from.
Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from steno.types import LayerKV, Merged, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class Evict:
    """Drop; no parameters. The default."""

    id: ClassVar[str] = "evict"
    kind: ClassVar[str] = "merge"
    title: ClassVar[str] = "Evict"
    paper: ClassVar[str] = "(the baseline of the field)"
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = "Nothing to differ from."
    counts_tokens: ClassVar[bool] = False

    def merge(self, kv: LayerKV, kept: Tensor, scores: Tensor, obs: Observation) -> Merged:
        """The layer as it is: tokens of `kept` `[Hkv, S]` bool stay what they were, the caller drops the others."""
        return Merged(kv=kv, kept=kept)
