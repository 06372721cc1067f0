"""Recency: the first tokens of the prompt and its newest ones, chosen once; what comes after the prompt stays.

Source: the sinks and the local buffer of RazorAttention, Tang et al., 2024, https://arxiv.org/abs/2407.15891, algorithm 1; the
    cut at the end of the prompt that other papers call StreamingLLM.
Differs: the buffer does not roll while decoding; `streaming_llm` evicts at every step. Its length is what the budget leaves.
Cost: none beyond O(S) for the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from steno.methods.checks import require_int
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class Recency:
    """Sinks and a window are protected, the newest of the others come first.

    Parameters
    ----------
    n_sink : int, default 4 tokens
        First tokens that are always kept.
    window : int, default 1 token
        Last tokens that are always kept, and that no merger changes.

    Raises
    ------
    BadArgument
        If `n_sink` is not a whole number >= 0, or `window` not one >= 1.
    """

    id: ClassVar[str] = "recency"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "Sinks and newest tokens, once"
    paper: ClassVar[str] = "(the local buffer of RazorAttention)"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2407.15891"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = "The buffer takes what the budget leaves and does not roll while decoding."
    evicts_while_decoding: ClassVar[bool] = False

    n_sink: int = 4
    window: int = 1

    def __post_init__(self) -> None:
        require_int("n_sink", self.n_sink, 0)
        require_int("window", self.window, 1)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return self.n_sink + self.window

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """The positions as scores `[Hkv, S]`, sinks and window +inf."""
        first, last = kv.positions < self.n_sink, kv.positions >= kv.num_tokens - self.window
        scores = kv.positions.float().masked_fill(first | last, float("inf"))  # [S]
        return scores.repeat(kv.num_kv_heads, 1)  # [Hkv, S]
