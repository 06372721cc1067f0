"""StreamingLLM: keep the first few tokens, on which attention rests, and the newest ones.

Source: Xiao, Tian, Chen, Han, Lewis, 2023, https://arxiv.org/abs/2309.17453, section 3.2.
Differs: keys keep their true rotated positions instead of slot positions, so a stream cannot outrun the model's
    positions; the prompt is cut after each chunk that is read, or once at its end, not token by token.
Cost: none beyond O(Hkv * S) for the positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_int
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class StreamingLLM:
    """Attention sinks and a sliding window of whatever the budget leaves.

    Parameters
    ----------
    n_sink : int, default 4 tokens
        First tokens that are always kept.

    Raises
    ------
    BadArgument
        If `n_sink` is not a whole number >= 0.
    """

    id: ClassVar[str] = "streaming_llm"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "StreamingLLM"
    paper: ClassVar[str] = "Efficient Streaming Language Models with Attention Sinks"
    year: ClassVar[int] = 2023
    arxiv: ClassVar[str] = "2309.17453"
    needs: ClassVar[frozenset[Need]] = frozenset()
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Keys keep their true rotated positions instead of slot positions; "
        "the prompt is cut after each chunk that is read, or once at its end, not token by token."
    )
    evicts_while_decoding: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False

    n_sink: int = 4

    def __post_init__(self) -> None:
        require_int("n_sink", self.n_sink, 0)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return self.n_sink

    def prefill_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Zeros: the method looks at positions only."""
        return torch.zeros(kv.num_kv_heads, kv.num_tokens, device=kv.keys.device)  # [Hkv, S]

    def observe(self, state: Tensor, weights: Tensor, *, step: int) -> Tensor:
        """The state as it is."""
        return state

    def priority(self, state: Tensor, positions: Tensor, budget_tokens: int) -> Tensor:
        """Sinks first, then the newest."""
        return positions.float().masked_fill(positions < self.n_sink, torch.inf)  # [Hkv, n]

    def token_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Zeros, as after the prompt."""
        return self.prefill_state(kv, obs)

    def retention(self, keys: Tensor, state: Tensor, positions: Tensor, *, budget_tokens: int, is_last: bool) -> Tensor:
        """Sinks first, then the newest."""
        return self.priority(state, positions, budget_tokens)

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """`priority` at the end of the prompt, `[Hkv, S]`."""
        positions = kv.positions.expand(kv.num_kv_heads, -1)  # [Hkv, S]
        return self.priority(self.prefill_state(kv, obs), positions, obs.budget_tokens)
