"""TRIM-KV: a trained gate tells when a token is written how fast it will be forgotten.

Source: Bui, Sharma, Lamba, Mishra, Ying, 2025, https://arxiv.org/abs/2512.03324; the authors' code for inference.
Differs: tokens of the answer are all held: eviction ends with the prompt. The memory is the recipe's budget and the
    buffer is the chunk that is read at a time. Ties go to the newer token. What `steno train` makes is far smaller than
    the paper's: hidden layers of 32, not 512, a bias of 6 where beta starts at 0.9975 for short passages, not 10, and
    120 passages; gates learn layer by layer, to keep the frozen layer's own attention (forward KL) under the capacity
    loss, where the paper distils the whole model's output. The weight of the capacity loss over time, 1/t, is not
    certain in what is known of the paper. The first tokens stay (`sinks=0`: not): gates of the paper learn that the model
    hangs on them, those of so short a training do not.
Measured with the shipped gates: `steno bench --task niah --context 1024 --samples 10`, question unseen, smollm2-135m, at
    25%, without sinks: no needle of 10, less than snapkv (1) or streaming_llm (2); at 50% 1.01 nats of KL on text that goes
    on, with sinks 0.11 (docs/methods.md has all rows). They show how the method works, not how well.
Cost: 2*S*hidden*(model width + Hkv) FLOPs a layer; the hidden states of what is read in one pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu

from steno.calibration import load_calibration
from steno.errors import CalibrationError
from steno.methods.checks import require_int, require_text
from steno.types import LayerKV, Need, Observation

TENSORS = ("w1", "b1", "w2", "bias")
"""Tensors of a weights file: `[L, hidden, width]`, `[L, hidden]`, `[L, Hkv, hidden]`, `[L, Hkv]`."""

TIE = 1e-30
"""Where nothing is forgotten the newer token stays; next to any other log beta it vanishes."""


@final
@dataclass(frozen=True, kw_only=True)
class TrimKV:
    """Trained retention rates beta, of which beta^age is what a token is still worth; evicts while it reads.

    Parameters
    ----------
    sinks : int, default 4 tokens
        First tokens of the prompt that always stay.
    weights : str or None, default None
        A file of `steno train trim_kv`; None: the one that was made for the model.

    Raises
    ------
    BadArgument
        If a value is of another type or out of range.
    CalibrationError
        When scoring, if the file of `weights` cannot be used.
    """

    id: ClassVar[str] = "trim_kv"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "TRIM-KV"
    paper: ClassVar[str] = "Cache What Lasts: Token Retention for Memory-Bounded KV Cache in LLMs"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2512.03324"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.HIDDEN_STATES})
    trained: ClassVar[bool] = True
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Eviction ends with the prompt. The shipped gates are far smaller than the paper's (32 hidden units, 120 short "
        "passages) and learned layer by layer from the layer's own attention, not from the model's output."
        " The first tokens always stay, which so short a training does not teach (sinks=0: as in the paper)."
    )
    evicts_while_decoding: ClassVar[bool] = False

    sinks: int = 4
    weights: str | None = None

    def __post_init__(self) -> None:
        require_int("sinks", self.sinks, 0)
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
        return self.sinks

    def token_state(self, kv: LayerKV, obs: Observation) -> Tensor:
        """log beta of each token, `[Hkv, S]` fp32, below 0; it depends on no other token's gate."""
        assert obs.hidden_states is not None, "the host gathers HIDDEN_STATES"
        assert self.weights is not None, "the cache names the weights of the model"
        tensors = load_calibration(self.weights, TENSORS)
        width = obs.hidden_states.shape[1]
        w1, bias = tensors["w1"], tensors["bias"]
        inner = w1.shape[1] if w1.ndim == 3 else 0
        wanted = [
            [obs.num_layers, inner, width],
            [obs.num_layers, inner],
            [obs.num_layers, kv.num_kv_heads, inner],
            [obs.num_layers, kv.num_kv_heads],
        ]
        got = [list(tensors[name].shape) for name in TENSORS]
        if got != wanted:
            raise CalibrationError(
                f"the retention gates must be those of this model, of width {width} and {kv.num_kv_heads} KV heads in "
                f"{obs.num_layers} layers; got w1 {list(w1.shape)} and bias {list(bias.shape)}: train on this model."
            )
        gate = (tensors[name][obs.layer_idx].to(kv.keys.device) for name in TENSORS)
        return log_retention(obs.hidden_states.float(), *gate)

    def retention(self, keys: Tensor, state: Tensor, positions: Tensor, *, budget_tokens: int, is_last: bool) -> Tensor:
        """`log beta * age`, `[Hkv, n]`, where the newest token has age 2 as in the authors' code; +inf for sinks."""
        age = positions.amax() + 2 - positions  # [Hkv, n]
        return ((state - TIE) * age).masked_fill(positions < self.sinks, torch.inf)

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """`retention` at the end of the prompt, `[Hkv, S]`."""
        positions = kv.positions.expand(kv.num_kv_heads, -1)  # [Hkv, S]
        state = self.token_state(kv, obs)
        return self.retention(kv.keys, state, positions, budget_tokens=obs.budget_tokens, is_last=True)


def log_retention(hidden: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, bias: Tensor) -> Tensor:
    """log beta `[..., Hkv, S]` from hidden states `[..., S, width]`; the gate `[..., hidden, width]` and so on."""
    inner = silu(hidden @ w1.mT + b1[..., None, :])  # [..., S, hidden]
    return logsigmoid(w2 @ inner.mT + bias[..., None])  # [..., Hkv, S]
