"""KVzip: let the model repeat its context; what it attends to while doing so is what any later question may need.

Source: Kim, Kim, Kwon, Lee, Yun, Song, 2025, https://arxiv.org/abs/2505.23416, section 3; the authors' code.
Differs: the score alone; the paper's one threshold over all layers and heads is the allocator `one_threshold`. The softmax
    is computed in fp32; besides the system prefix, which the caller keeps, the first `n_sink` tokens are protected, and,
    where asked for, the last `window`, since text that goes on looks at them more than a repetition does; chunks of 512
    tokens by default, not 2000, since small models repeat short chunks more faithfully.
Cost: a second prefill over the context, in chunks, and `reconstruction_mass` per chunk and layer: 2*H*Tq*(n + m +
    Tq)*D FLOPs; one fp32 temporary of G*block*(n + m + Tq) at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.methods.checks import require_int
from steno.types import LayerKV, Need, Observation

FIRST_PROMPT = "\n\nRepeat the previous context exactly."
"""What the model is asked before the first chunk; the assistant's turn and the chunk itself follow."""
NEXT_PROMPT = "\n\nRepeat the part of the previous context exactly, starting with "
"""What it is asked before a later chunk; the last `postfix_tokens` of the chunk before it end the request."""


@final
@dataclass(frozen=True, kw_only=True)
class KVzip:
    """The largest attention that a token receives while the context is repeated.

    Parameters
    ----------
    chunk_tokens : int, default 512 tokens
        How much of the context is repeated in one pass.
    postfix_tokens : int, default 8 tokens
        Last tokens of the chunk before, quoted in the request for the next one.
    n_sink : int, default 4 tokens
        First tokens that are always kept.
    window : int, default 0 tokens
        Last tokens of the prompt that are always kept; of a small budget no more than a quarter.

    Raises
    ------
    BadArgument
        If a value is not a whole number or out of range.
    """

    id: ClassVar[str] = "kvzip"
    kind: ClassVar[str] = "score"
    title: ClassVar[str] = "KVzip"
    paper: ClassVar[str] = "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction"
    year: ClassVar[int] = 2025
    arxiv: ClassVar[str] = "2505.23416"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.REPLAY})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "The score alone; the paper's one threshold over all layers and heads is the allocator `one_threshold`. The first "
        "`n_sink` tokens are protected besides the system prefix, and, where asked for, the last `window`; chunks of 512 "
        "tokens by default, not 2000."
    )
    evicts_while_decoding: ClassVar[bool] = False

    chunk_tokens: int = 512
    postfix_tokens: int = 8
    n_sink: int = 4
    window: int = 0

    def __post_init__(self) -> None:
        require_int("chunk_tokens", self.chunk_tokens, 1)
        require_int("postfix_tokens", self.postfix_tokens, 0)
        require_int("n_sink", self.n_sink, 0)
        require_int("window", self.window, 0)

    @property
    def query_window(self) -> int:
        return 0

    @property
    def query_statistics_skip(self) -> int:
        return 0

    @property
    def min_tokens(self) -> int:
        return self.n_sink

    def score(self, kv: LayerKV, obs: Observation) -> Tensor:
        """Scores `[Hkv, S]` fp32, sinks and window +inf."""
        assert obs.replay_mass is not None, "the host gathers REPLAY"
        window = min(self.window, obs.budget_tokens // 4)
        ends = (kv.positions < self.n_sink) | (kv.positions >= kv.num_tokens - window)  # [S]
        return obs.replay_mass.float().masked_fill(ends, torch.inf)  # [Hkv, S]


def reconstruction_mass(
    queries: Tensor,
    chunk_keys: Tensor,
    sink_keys: Tensor,
    own_keys: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    block: int = 128,
) -> Tensor:
    """Largest attention `[Hkv, m]` fp32 that each token of a chunk receives while the model repeats it.

    The softmax runs over [sinks | chunk | the repetition itself, causal]; the maximum over the queries and the group.

    Parameters
    ----------
    queries : `[H, Tq, D]`
        Queries of the repetition, post-RoPE.
    chunk_keys, sink_keys, own_keys : `[Hkv, m, D]`, `[Hkv, n, D]`, `[Hkv, Tq, D]`
        Keys of the chunk, of what stands before the context, and of the repetition, post-RoPE.
    scaling : float
        Factor on the logits.
    softcap : float or None, default None
        Logits become softcap * tanh(logits / softcap).
    block : int, default 128 tokens
        Queries of one KV head that are computed at a time.
    """
    num_kv_heads, num_sinks, m = own_keys.shape[0], sink_keys.shape[1], chunk_keys.shape[1]
    grouped = queries.reshape(num_kv_heads, -1, *queries.shape[1:]).float() * scaling  # [Hkv, G, Tq, D]
    keys = torch.cat([chunk_keys, sink_keys, own_keys], dim=1).float()  # [Hkv, m + n + Tq, D]
    mass = torch.zeros(num_kv_heads, m, device=queries.device)  # [Hkv, m]
    rows_at_once = grouped.shape[1] * min(block, queries.shape[1])
    scratch = torch.empty(rows_at_once * keys.shape[1], device=queries.device)
    for head in range(num_kv_heads):
        for start in range(0, queries.shape[1], block):
            rows = grouped[head, :, start : start + block]  # [G, b, D]
            seen = keys[head, : m + num_sinks + start + rows.shape[1]]  # [m + n + start + b, D]
            weights = _attention_(scratch, rows, seen, m, softcap)  # [G * b, m]
            torch.maximum(mass[head], weights.amax(0), out=mass[head])
    return mass


def _attention_(scratch: Tensor, queries: Tensor, keys: Tensor, m: int, softcap: float | None) -> Tensor:
    """Attention `[G * b, m]` of queries `[G, b, D]` to the first m of keys `[N, D]`, the last b causal."""
    group, b, dim = queries.shape
    logits = scratch[: group * b * keys.shape[0]].view(group * b, -1)  # [G * b, N]
    torch.mm(queries.reshape(-1, dim), keys.T, out=logits)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    future = torch.ones(b, b, dtype=torch.bool, device=keys.device).triu(1)
    logits.view(group, b, -1)[..., -b:].masked_fill_(future, -torch.inf)
    # in place: a fresh temporary costs more than its arithmetic
    weights = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    return weights[:, :m].mul_(weights.sum(-1, keepdim=True).reciprocal_())
