"""Frozen data that the rooms hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

PAGE_TOKENS = 64
"""Tokens of one KV head of one layer in one page."""


class Need(Enum):
    """What a method must see beside keys, values and positions. The host gathers it while the prompt is read."""

    QUERIES = auto()
    """The last `query_window` queries, post-RoPE."""
    QUERY_STATISTICS = auto()
    """Mean and covariance of the pre-RoPE queries."""
    ATTENTION_MASS = auto()
    """The attention that each token received, summed over the queries of the prompt; gathered block by block."""
    PRE_ROPE_QUERIES = auto()
    """All queries of the prompt, pre-RoPE."""
    PRE_ROPE_KEYS = auto()
    """The keys, pre-RoPE."""
    HIDDEN_STATES = auto()
    """What goes into the attention module; shown by hooks that stand only while a prompt is read."""
    TOKEN_TEXT = auto()
    """Where sentences end, while the prompt is read and after."""
    IMAGE_MASK = auto()
    """Which tokens of the prompt are image or video tokens; told with `input_ids`, none where the model sees none."""
    REPLAY = auto()
    """The largest attention that each token receives while the model repeats the context."""
    ROPE = auto()
    """The rotary embedding of the layer, to take the rotation of keys back and to give it again."""


@dataclass(frozen=True, kw_only=True)
class LayerKV:
    """One sequence of one layer. Methods never see a batch or padding.

    keys, values: `[Hkv, S, D]`, keys post-RoPE; positions: `[S]` int64, the true positions, ascending.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def head_dim(self) -> int:
        return self.keys.shape[2]


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding of a layer, half-split convention (`rotate_half` of Llama).

    inv_freq: `[R/2]` fp32 with R the rotated dimensions (R < D under partial rotation); attention_scaling: factor on cos and sin.
    """

    inv_freq: Tensor
    attention_scaling: float = 1.0

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[N, R]` fp32 at `positions` `[N]`."""
        cos, sin = self._turns(positions)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)

    def _turns(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin `[N, R/2]` fp32, each for a channel of either half."""
        angles = positions.to(torch.float32)[:, None] * self.inv_freq[None, :]
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """What `x` `[..., N, D]`, rotated at `positions` `[N]`, was before rotation, in x's dtype."""
        cos, sin = self._turns(positions)
        (first, second), rest = self._halves(x)
        plain = torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1) / self.attention_scaling**2
        return torch.cat([plain.to(x.dtype), rest], dim=-1)

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x` `[..., N, D]` rotated at `positions` `[N]`, in x's dtype; `undo` takes it back."""
        cos, sin = self._turns(positions)
        (first, second), rest = self._halves(x)
        turned = (first * cos - second * sin).to(x.dtype), (second * cos + first * sin).to(x.dtype)
        return torch.cat([*turned, rest], dim=-1)

    def _halves(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The two halves of the rotated channels in fp32, and the other channels."""
        half = len(self.inv_freq)
        return (x[..., :half].float(), x[..., half : 2 * half].float()), x[..., 2 * half :]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What the host saw of one layer while the prompt was read; a field is None unless the method declares its need.

    queries: `[H, W, D]`, the last W queries post-RoPE (W = min(query_window, S)).
    query_mean `[H, D]`, query_cov `[H, D, D]` fp32: of pre-RoPE queries, biased covariance.
    attention_mass: `[H, S]` fp32, column sums of the softmax over all queries of the prompt.
    pre_rope_queries `[H, S, D]`, pre_rope_keys `[Hkv, S, D]`: before rotation.
    hidden_states: `[S, hidden]`, what goes into the attention module.
    image_mask: `[S]` bool, which tokens are image or video tokens.
    replay_mass: `[Hkv, S]` fp32, largest attention in the reconstruction of the context.
    positions: `[S]` int64, the true ones of these tokens, ascending, where some went round the layer; None: 0 .. S - 1.
    prompt_tokens: of the whole prompt, more than S where some went round the layer; None: S.
    scaling, softcap: of the logits, `softcap * tanh(scaling * q.k / softcap)`, plain where softcap is None.
    budget_tokens: what the layer may keep, tokens per KV head on average.
    """

    layer_idx: int
    num_layers: int
    scaling: float
    budget_tokens: int
    softcap: float | None = None
    rope: Rope | None = None
    queries: Tensor | None = None
    query_mean: Tensor | None = None
    query_cov: Tensor | None = None
    attention_mass: Tensor | None = None
    pre_rope_queries: Tensor | None = None
    pre_rope_keys: Tensor | None = None
    hidden_states: Tensor | None = None
    image_mask: Tensor | None = None
    replay_mass: Tensor | None = None
    positions: Tensor | None = None
    prompt_tokens: int | None = None

    def index_of(self, positions: Tensor) -> Tensor:
        """Where tokens of these true positions stand among the S."""
        return positions if self.positions is None else torch.searchsorted(self.positions, positions)


@dataclass(frozen=True, kw_only=True)
class Route:
    """The tokens of a pass that a layer computes; the others go round it on the residual stream.

    index: `[n]` int64, ascending. gates: `[n]` fp32, factors on what the layer adds to each of them; None: 1.
    """

    index: Tensor
    gates: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Merged:
    """A layer in which the kept tokens stand for all.

    kv: as before, with keys and values of the kept entries changed; kept: `[Hkv, S]` bool, which entries stay, never more
    of a head than there were. counts: `[Hkv, S]` fp32 >= 1, how many tokens a kept entry stands for (`+log n` on its
    logit); None: one each.
    """

    kv: LayerKV
    kept: Tensor
    counts: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class KeptTokens:
    """Tokens of one sequence of one layer that become a segment; heads may differ in length, and in which tokens they hold.

    keys, values: `[n_h, D]` per KV head; positions: `[n_h]` int64 per KV head, the true positions, ascending.
    log_counts: `[n_h]` fp32 per KV head, to be added to the logits; None: nothing is added.
    rope: given to those who declare `Need.ROPE`. observation: of the prompt; None for tokens that came after it.
    Behind a transform keys, values and the observed queries are in its basis.
    """

    keys: list[Tensor]
    values: list[Tensor]
    positions: list[Tensor]
    layer_idx: int
    num_layers: int
    log_counts: list[Tensor] | None = None
    rope: Rope | None = None
    observation: Observation | None = None

    @property
    def is_prompt(self) -> bool:
        return self.observation is not None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens per KV head."""
        return tuple(len(k) for k in self.keys)


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What is stored of a token in one layer: so many vectors for its keys and for its values, of so many numbers each.

    beside: bytes of a token beside them, of all heads.
    """

    heads: int
    keys: int
    values: int
    beside: int = 0


@dataclass(frozen=True, kw_only=True)
class IndexItems:
    """What an access method notes of some tokens of one KV head: a vector for each run of them.

    vectors: `[items, W]`; lengths: `[items]` int32, tokens of each run, where that is not told by the page or is not one.
    """

    vectors: Tensor
    lengths: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class PageFormat:
    """How a quantized page stores its 64 tokens: unsigned codes with an fp16 scale and minimum per group.

    bits: 8, 4 or 2. key_group: tokens of one channel that share a scale (keys are grouped along time, per channel).
    value_group: channels of one token that share a scale (values are grouped along channels, per token).
    codebook: a name in `steno.kernels.quant.codebooks.CODEBOOKS` if codes stand for its levels, with a scale per group and
    no minimum; then `bits` are those of the codebook, and groups of keys too are channels of one token.
    """

    bits: int
    key_group: int = 64
    value_group: int = 64
    codebook: str | None = None
