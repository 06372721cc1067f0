"""Locret: a small trained network tells from a token's own query, key and value how strongly an answer will look at it.

Source: Huang, Yuan, Han, Xiao, Liu, 2024, https://arxiv.org/abs/2410.01805; the authors' code.
Differs: keys keep their true rotated positions where the authors cache keys before rotation and close the gaps, so a
    text cannot be longer than the model's positions. Stabilizers are a share of the budget, not 2500 tokens; scores
    are computed in fp32. The last `n_local` tokens are part of the budget and always kept, where the authors read them
    after the eviction. What `steno train` makes is far smaller than the paper's: hidden layers of 32, not 1024, 120
    passages instead of 3000, and questions that quote the text in place of LongAlpaca; labels are normalised within a
    head, since only their order counts.
Measured with the shipped heads: `steno bench --task niah --context 1024 --samples 10`, question unseen, smollm2-135m, at
    25%: 1 needle of 10, no better than snapkv (1) or streaming_llm (2). They show how the method works, not how well.
Cost: 2*S*hidden*((H + 2*Hkv)*D + Hkv) FLOPs a layer; the queries of what is read in one pass, fp32 copies of q, k and v.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import silu

from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_int, require_real, require_text
from steno.types import LayerKV, Need, Observation

TENSORS = ("w1", "w2")
"""Tensors of a weights file: `[L, hidden, (H + 2 Hkv) D]` and `[L, Hkv, hidden]`, no biases."""


@final
@dataclass(frozen=True, kw_only=True)
class Locret:
    """Scores of trained retaining heads; evicts while it reads.

    Parameters
    ----------
    n_local : int, default 32 tokens
        Last tokens that are always kept.
    stabilizers : float, default 0.25 of the budget
        Share of the budget for the newest tokens as long as more of the text follows.
    weights : str or None, default None
        A file of `steno train locret`; None: the one that was made for the model.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When scoring, if the file of `weights` cannot be used.
    """

    id: ClassVar[str] = "locret"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "Locret"
    paper: ClassVar[str] = "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2410.01805"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PRE_ROPE_QUERIES, Need.PRE_ROPE_KEYS})
    trained: ClassVar[bool] = True
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Keys keep their true rotated positions; stabilizers are a share of the budget. The shipped heads are far smaller "
        "than the paper's (32 hidden units, 120 short passages) and learned from questions that quote the text."
        " On needles the shipped heads are no better than streaming_llm."
    )
    evicts_while_decoding: ClassVar[bool] = False

    n_local: int = 32
    stabilizers: float = 0.25
    weights: str | None = None

    def __post_init__(self) -> None:
        require_int("n_local", self.n_local, 0)
        require_real("stabilizers", self.stabilizers, 0, 1)
        if self.weights is not None:
            require_text("weights", self.weights)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return self.n_local

    def token_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """What the retaining heads give each token, `[Hkv, S]` fp32; it depends on no other token."""
        assert obs.pre_rope_queries is not None, "the host gathers PRE_ROPE_QUERIES"
        assert obs.pre_rope_keys is not None, "the host gathers PRE_ROPE_KEYS"
        assert self.weights is not None, "the cache names the weights of the model"
        x = retaining_input(obs.pre_rope_queries, obs.pre_rope_keys, kv.values)
        tensors = load_calibration(self.weights, TENSORS)
        w1, w2 = tensors["w1"], tensors["w2"]
        fits = w1.ndim == w2.ndim == 3 and len(w1) == len(w2) == obs.num_layers and w1.shape[1] == w2.shape[2]
        if not fits or w1.shape[2] != x.shape[1] or w2.shape[1] != kv.num_kv_heads:
            raise CalibrationError(
                f"the retaining heads must be those of this model, w1 [{obs.num_layers}, hidden, {x.shape[1]}] and w2 "
                f"[{obs.num_layers}, {kv.num_kv_heads}, hidden]; got {list(w1.shape)} and {list(w2.shape)}: train on this "
                "model."
            )
        first, second = w1[obs.layer_idx].to(x.device), w2[obs.layer_idx].to(x.device)
        return second @ silu(x @ first.T).T  # [Hkv, S]

    def retention(self, keys: Tensor, state: Tensor, positions: Tensor, *, budget_tokens: int, is_last: bool) -> Tensor:
        """The scores, behind the newest tokens: stabilizers while more follows, the last `n_local` at the end."""
        newest = min(self.n_local if is_last else int(self.stabilizers * budget_tokens), positions.shape[1])
        if newest == 0:
            return state
        oldest = positions.topk(newest).values[:, -1:]  # [Hkv, 1]
        return state.masked_fill(positions >= oldest, torch.inf)  # [Hkv, n]

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """`retention` at the end of the prompt, `[Hkv, S]`."""
        positions = kv.positions.expand(kv.num_kv_heads, -1)  # [Hkv, S]
        state = self.token_state(kv, obs)
        return self.retention(kv.keys, state, positions, budget_tokens=obs.budget_tokens, is_last=True)


def retaining_input(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What a retaining head reads, `[S, (H + 2 Hkv) D]` fp32: a token's own queries, keys, both pre-RoPE, and values."""
    return torch.cat([x.transpose(0, 1).flatten(1).float() for x in (queries, keys, values)], dim=1)
