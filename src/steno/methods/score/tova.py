"""TOVA: a cache of fixed size is a multi-state RNN; at each step forget what the current query attends to least.

Source: Oren, Hassid, Yarden, Adi, Schwartz, 2024, https://arxiv.org/abs/2401.06104, section 3.2.
Differs: keys are cached rotated at their true positions (the authors rotate again at every step, to the same
    effect); the position compression of the authors' code is left out. As in theirs, the newest token competes like
    all others.
Cost: 2*H*S*D FLOPs at the end of the prompt; one mean over H per decode step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from steno.kernels.attention import attention_weights
from steno.types import LayerKV, Need, Observation


@final
@dataclass(frozen=True, kw_only=True)
class TOVA:
    """Attention weight of the newest query, averaged over all heads of the layer; no parameters."""

    id: ClassVar[str] = "tova"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "TOVA"
    paper: ClassVar[str] = "Transformers are Multi-State RNNs"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2401.06104"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.QUERIES})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Keys are cached rotated at their true positions, without the position compression of the authors' code; "
        "as in theirs, the newest token competes like all others."
    )
    evicts_while_decoding: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True

    @property
    def query_window(self) -> int:
        return 1

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return 0

    def prefill_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """The last prompt query's attention, mean over all heads, the same for each KV head: `[Hkv, S]`."""
        assert obs.queries is not None, "the host gathers QUERIES"
        last = obs.queries[:, -1:]  # [H, 1, D]
        weights = attention_weights(last, kv.keys, scale=obs.scaling, softcap=obs.softcap)  # [H, 1, S]
        return weights.mean((0, 1)).repeat(kv.num_kv_heads, 1)  # [Hkv, S]

    def observe(self, state: Tensor, weights: Tensor, *, step: int) -> Tensor:
        """This step's weights, mean over all heads, in place of the old state."""
        return weights.float().mean(0).repeat(state.shape[0], 1)  # [Hkv, n]

    def priority(self, state: Tensor, positions: Tensor, budget_tokens: int) -> Tensor:
        """The state: nothing is protected."""
        return state

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """`priority` at the end of the prompt, `[Hkv, S]`."""
        positions = kv.positions.expand(kv.num_kv_heads, -1)  # [Hkv, S]
        return self.priority(self.prefill_state(kv, obs), positions, obs.budget_tokens)
