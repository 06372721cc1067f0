"""ZipCache: tokens that get much attention from those that can see them in 4 bits, the others in 2.

Source: He, Zhang, Wu, Liu, Zhou, Zhuang, 2024, https://arxiv.org/abs/2405.14256, sections 4.1 to 4.3.
Differs: attention is summed over all queries of the prompt, not over probes, which only estimate it. Tokens after the prompt
    are all in the higher precision, because who will attend to them is not known when they are encoded; each token is
    encoded once, where the code encodes the whole cache anew. Value tokens are normalized for each KV head by itself, with
    a scale and a minimum per token and head, where the code lets heads share those of different tokens.
Cost: the sums over the prompt's attention; a pass over the tokens; per step products with the packed codes of both sets.
    0.6 * 4 + 0.4 * 2 bits a value, 32 / D for values, a bit per token and head, and five numbers per channel and set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from steno.cache.parts import PartsSegment
from steno.cache.row import pack_kept, unpack_kept
from steno.cache.segment import HeadKV, Segment
from steno.kernels.quant.groups import FP16_MAX, MIN_SCALE, as_half
from steno.kernels.quant.matrices import Matrices, column_products, pack_integers, pack_plain, row_products
from steno.kernels.quant.packing import LANES, code_bytes
from steno.methods.checks import require_choice, require_int, require_real
from steno.types import PAGE_TOKENS, KeptTokens, Need


@final
@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """n tokens of one KV head in one precision, in runs of 64 and a shorter one.

    keys: codes `[D, 64]`, in units of `steps` `[D]` fp16 above `minima` `[D]`; values: `[64, D]`, to be multiplied by what
    the head's channels are normalized by.
    """

    keys: tuple[Matrices, ...]
    values: tuple[Matrices, ...]
    steps: Tensor
    minima: Tensor

    @property
    def num_tokens(self) -> int:
        return sum(m.num_matrices * m.columns for m in self.keys)

    def logits(self, q: Tensor) -> Tensor:
        scaled = q * self.steps.to(q.dtype)
        return torch.cat([row_products(scaled, m) for m in self.keys], dim=1) + (q @ self.minima.to(q.dtype))[:, None]

    def mix(self, weights: Tensor) -> Tensor:
        sizes = [m.num_matrices * m.rows for m in self.values]
        parts = zip(weights.split(sizes, dim=1), self.values, strict=True)
        return torch.stack([column_products(w.contiguous(), m) for w, m in parts]).sum(0)

    def keys_between(self, first: int, last: int) -> Tensor:
        """The keys `[last - first, D]` fp32 of some of its tokens; only their runs of 64 are opened."""
        at, past, codes = first // PAGE_TOKENS, -(-last // PAGE_TOKENS), list[Tensor]()
        for m in self.keys:
            if at < m.num_matrices and past > 0:
                codes.append(m[max(0, at) : past].decode().transpose(1, 2).flatten(0, 1))
            at, past = at - m.num_matrices, past - m.num_matrices
        some = torch.cat([self.steps.new_zeros(0, len(self.steps)), *codes])[first % PAGE_TOKENS :][: last - first]
        return some * self.steps.float() + self.minima.float()

    def decode_values(self) -> Tensor:
        """`[n, D]` fp32, normalized."""
        return torch.cat([m.decode().flatten(0, 1) for m in self.values])


def encode_set(keys: Tensor, values: Tensor, bits: int) -> TokenSet:
    """keys, values `[n, D]` fp32, values normalized; n > 0."""
    minima = as_half(keys.amin(0))
    steps = as_half(((keys.amax(0) - minima) / (2**bits - 1)).clamp(MIN_SCALE, FP16_MAX))
    codes = ((keys - minima) / steps).round().clamp(0, 2**bits - 1).nan_to_num(0.0).to(torch.uint8)
    return TokenSet(
        keys=tuple(pack_plain(run.transpose(1, 2), bits=bits) for run in _runs(codes)),
        values=tuple(pack_integers(run, bits=bits, group=values.shape[1]) for run in _runs(values)),
        steps=steps.half(),
        minima=minima.half(),
    )


def _runs(x: Tensor) -> list[Tensor]:
    """`[n, D]` as `[n / 64, 64, D]` and what is left `[1, n mod 64, D]`, those that hold something."""
    full = len(x) // PAGE_TOKENS * PAGE_TOKENS
    runs = [x[:full].unflatten(0, (-1, PAGE_TOKENS))] if full else []
    return runs + ([x[full:][None]] if full < len(x) else [])


@final
@dataclass(frozen=True, kw_only=True)
class ZipHead:
    """One KV head. salient: a bitmap of its tokens; sets: the salient ones and the others, None where there are none.

    channels: `[D]` fp16, what values were divided by.
    """

    num_tokens: int
    salient: Tensor
    sets: tuple[TokenSet | None, TokenSet | None]
    channels: Tensor

    def _places(self) -> list[tuple[Tensor, TokenSet]]:
        """Which tokens each set holds."""
        (chosen,) = unpack_kept(self.salient)
        rest = torch.ones(self.num_tokens, dtype=torch.bool, device=chosen.device)
        rest[chosen] = False
        places = (chosen, rest.nonzero()[:, 0])
        return [(index, tokens) for index, tokens in zip(places, self.sets, strict=True) if tokens is not None]

    def logits(self, q: Tensor) -> Tensor:
        out = q.new_empty(len(q), self.num_tokens)
        for index, tokens in self._places():
            out[:, index] = tokens.logits(q)
        return out

    def mix(self, weights: Tensor) -> Tensor:
        parts = [tokens.mix(weights[:, index]) for index, tokens in self._places()]
        return torch.stack(parts).sum(0) * self.channels.to(weights.dtype)

    def keys_between(self, first: int, last: int) -> Tensor:
        keys = torch.empty(last - first, len(self.channels), device=self.channels.device)
        for index, tokens in self._places():
            a, b = torch.searchsorted(index, index.new_tensor([first, last])).tolist()
            keys[index[a:b] - first] = tokens.keys_between(a, b)
        return keys

    def decode(self, dtype: torch.dtype) -> HeadKV:
        values = torch.empty(self.num_tokens, len(self.channels), device=self.channels.device)
        for index, tokens in self._places():
            values[index] = tokens.decode_values()
        return self.keys_between(0, self.num_tokens).to(dtype), (values * self.channels.float()).to(dtype)


@final
@dataclass(frozen=True, kw_only=True)
class ZipCache:
    """Two precisions, chosen by normalized attention.

    Parameters
    ----------
    bits : int, default 4 bits
        Of salient tokens, and of all after the prompt: 4 or 2.
    other_bits : int, default 2 bits
        Of the others: 4 or 2.
    salient : float, default 0.6
        Share of the prompt's tokens of each head that are salient.
    residual : int, default 100 tokens
        Later tokens are encoded when there are so many.

    Raises
    ------
    BadArgument
        If a value is none of these.
    """

    id: ClassVar[str] = "zipcache"
    kind: ClassVar[str] = "quantize"
    title: ClassVar[str] = "ZipCache"
    paper: ClassVar[str] = "ZipCache: Accurate and Efficient KV Cache Quantization with Salient Token Identification"
    year: ClassVar[int] = 2024
    arxiv: ClassVar[str] = "2405.14256"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ATTENTION_MASS})
    trained: ClassVar[bool] = False
    frees_memory: ClassVar[bool] = True
    differs: ClassVar[str] = (
        "Attention is summed over all queries, not over probes; tokens after the prompt are all in the higher precision and "
        "encoded once; value tokens have a scale for each KV head."
    )
    page_format: ClassVar[None] = None

    bits: int = 4
    other_bits: int = 2
    salient: float = 0.6
    residual: int = 100

    def __post_init__(self) -> None:
        require_choice("bits", self.bits, (4, 2))
        require_choice("other_bits", self.other_bits, (4, 2))
        require_real("salient", self.salient, 0, 1)
        require_int("residual", self.residual, 1)

    @property
    def residual_tokens(self) -> int:
        return self.residual

    @property
    def chunk_tokens(self) -> int:
        return 1

    def encode(self, tokens: KeptTokens) -> Segment:
        """Each head with its own salient tokens."""
        obs, scores = tokens.observation, None
        if obs is not None:
            mass = obs.attention_mass
            assert mass is not None, "declared in `needs`"
            scores = normalized_attention(mass, len(tokens.keys))

        def head(h: int, keys: Tensor, values: Tensor) -> ZipHead:
            seen = None if obs is None or scores is None else scores[h, obs.index_of(tokens.positions[h])]
            return self._head(keys, values, seen)

        return PartsSegment.of(tokens, head)

    def _head(self, keys: Tensor, values: Tensor, scores: Tensor | None) -> ZipHead:
        """keys, values `[n, D]` fp32; scores `[n]`, None: all are salient."""
        n = len(keys)
        num_others = 0 if scores is None else int((1 - self.salient) * n + 1e-9)
        order = torch.arange(n, device=keys.device) if scores is None else scores.argsort(stable=True)
        others, chosen = order[:num_others].sort().values, order[num_others:].sort().values
        peaks = as_half(values.abs().amax(0).sqrt())  # [D]
        peaks = torch.where(peaks == 0, 1.0, peaks)
        normal = values / peaks
        return ZipHead(
            num_tokens=n,
            salient=pack_kept([chosen], n),
            sets=(
                encode_set(keys[chosen], normal[chosen], self.bits) if len(chosen) else None,
                encode_set(keys[others], normal[others], self.other_bits) if num_others else None,
            ),
            channels=peaks.half(),
        )

    def bytes_bound(self, num_tokens: int, *, num_kv_heads: int, head_dim: int) -> int | None:
        """Those of a prompt, or of as many later tokens; of each set the last line of codes may be partly empty."""
        others = int((1 - self.salient) * num_tokens + 1e-9)
        layouts = [((num_tokens - others, self.bits), (others, self.other_bits)), ((num_tokens, self.bits),)]
        most = 0
        for layout in layouts:
            total = -(-num_tokens // 8) + 1 + 2 * head_dim
            for count, width in layout:
                page = code_bytes(head_dim, PAGE_TOKENS, width) + code_bytes(PAGE_TOKENS, head_dim, width)
                total += -(-(count + LANES) * page // PAGE_TOKENS) + 4 * count + 4 * head_dim
            most = max(most, total)
        return num_kv_heads * most


def normalized_attention(mass: Tensor, num_kv_heads: int) -> Tensor:
    """The mean attention `[Hkv, S]` that each token gets from those that see it, out of sums `[H, S]` over queries."""
    seen_by = torch.arange(mass.shape[1], 0, -1, device=mass.device)  # S - j queries may attend to token j
    return mass.unflatten(0, (num_kv_heads, -1)).sum(1) / seen_by
