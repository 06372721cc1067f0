"""The prompt of one layer while it is read: dense, observed, and maybe replayed; dropped once it is compressed."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.cache.observe import PromptObserver
from steno.cache.policy import LayerPolicy
from steno.cache.segment import HeadKV, owned
from steno.cache.tokens import NewTokens
from steno.errors import CacheError
from steno.kernels.attention import merge_attention
from steno.kernels.attention.prefill import attention_and_lse, causal_attention, causal_attention_and_mass
from steno.types import LayerKV, Need, Rope


@final
@dataclass(frozen=True, kw_only=True)
class ReplayedLayer:
    """One layer of a pass that replays the context.

    queries `[H, T, D]` and own_keys `[Hkv, T, D]` of the pass; kv: the prompt. past_lse, own_lse `[H, T]` fp32: log-sum-exp
    of the attention to the prompt and of the causal attention to the pass itself; None under a soft cap or sinks.
    """

    layer_idx: int
    queries: Tensor
    own_keys: Tensor
    kv: LayerKV
    scale: float
    softcap: float | None
    past_lse: Tensor | None = None
    own_lse: Tensor | None = None


ReplayObserver = Callable[[ReplayedLayer], None]
PRE_ROPE = {Need.QUERY_STATISTICS, Need.PRE_ROPE_QUERIES, Need.PRE_ROPE_KEYS}
"""Needs for which the rotation of the layer must be known."""


class Prompt:
    """Keys, values and observers of B rows whose prompt is not complete. Mutable.

    rows: keys and values `[Hkv, S_b, D]` per row. positions: `[S]`, the true ones, where tokens may go round the layer.
    """

    def __init__(self, policy: LayerPolicy, rope_of: Callable[[torch.device], Rope | None], new: NewTokens) -> None:
        rope = rope_of(new.q.device) if policy.needs & {*PRE_ROPE, Need.ROPE} else None
        self.policy = policy
        self.rope = rope if Need.ROPE in policy.needs else None
        self.rows: list[HeadKV] = [(k[:, :0], v[:, :0]) for k, v in zip(new.k, new.v, strict=True)]
        self.observers = [PromptObserver(policy, rope, scale=new.scale, softcap=new.softcap) for _ in new.q]
        self.positions: Tensor | None = None

    @property
    def dense_bytes(self) -> int:
        """Bytes of the keys and values read so far."""
        return 2 * sum(k.numel() * k.element_size() for k, _ in self.rows)

    def layer_kv(self, b: int) -> LayerKV:
        """What was read of one row, in the form that methods get."""
        keys, values = self.rows[b]
        positions = torch.arange(keys.shape[1], device=keys.device) if self.positions is None else self.positions
        return LayerKV(keys=keys, values=values, positions=positions)

    def read(self, new: NewTokens, attending: Callable[[int, Tensor], Tensor | None] | None = None) -> Tensor:
        """Takes new tokens in and attends causally over all read so far: `[B, H, T, D]`.

        attending: tells from a row and its new queries `[H, T, D]` which of the tokens take part in the attention, `[n]`;
        None, or an answer of None: all.
        """
        is_first = not any(k.shape[1] for k, _ in self.rows)
        if new.positions is not None:
            past = new.positions[:0] if self.positions is None else self.positions
            self.positions = torch.cat([past, new.positions])
        for b, count in enumerate(new.row_counts):
            if count:
                row = new.row(b)
                past_k, past_v = self.rows[b]
                k, v = row.k[0], row.v[0]
                if past_k.shape[1]:
                    k, v = torch.cat([past_k, k], dim=1), torch.cat([past_v, v], dim=1)
                self.rows[b] = k, v
                self.observers[b].see(
                    row.q[0],
                    None if row.hidden is None else row.hidden[0],
                    is_image=None if row.is_image is None else row.is_image[0],
                    positions=row.positions,
                )
        if new.counts is None and is_first and attending is None:
            return self._attend(new, new.k, new.v, self.observers)
        out = torch.zeros_like(new.q)
        for b, count in enumerate(new.row_counts):
            if count:
                row, (k, v) = new.row(b), self.rows[b]
                index = None if attending is None else attending(b, row.q[0])
                new.scatter_(out, b, self._attend(row, k[None], v[None], self.observers[b : b + 1], index))
        return out

    def _attend(
        self, new: NewTokens, k: Tensor, v: Tensor, observers: list[PromptObserver], index: Tensor | None = None
    ) -> Tensor:
        """Causal attention of the last T of S tokens, k and v `[B, Hkv, S, D]`, which shows its mass to those who ask.

        index: `[n]`, those of T = S tokens that take part; the others get zeros. None: all.
        """
        q, scale, softcap, sinks = new.q, new.scale, new.softcap, new.sinks
        if index is not None:
            q, k, v = (x[:, :, index] for x in (q, k, v))
        if Need.ATTENTION_MASS not in self.policy.needs:
            out = causal_attention(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
        else:
            out, mass = causal_attention_and_mass(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
            if index is not None:
                mass = mass.new_zeros(*mass.shape[:2], new.num_new).index_copy_(2, index, mass)
            for observer, row_mass in zip(observers, mass, strict=True):
                observer.see_mass(row_mass)
        return out if index is None else torch.zeros_like(new.q).index_copy_(2, index, out)

    def held_tokens(self) -> list[list[int]]:
        """Held tokens `[B][Hkv]`."""
        return [[k.shape[1]] * k.shape[0] for k, _ in self.rows]

    def keep(self) -> None:
        """Makes what was read independent of the model's activations, since the prompt goes on."""
        self.rows = [(owned(k), owned(v)) for k, v in self.rows]

    def replay(self, observer: ReplayObserver, layer_idx: int, new: NewTokens) -> Tensor:
        """Attends over the prompt and causally over the new tokens, shows it to the observer, and keeps nothing."""
        if len(self.rows) != 1:
            raise CacheError(f"a replay needs one row whose prompt is still dense; the cache has {len(self.rows)}.")
        kv = self.layer_kv(0)
        keys, values = kv.keys, kv.values
        view = ReplayedLayer(
            layer_idx=layer_idx,
            queries=new.q[0],
            own_keys=new.k[0],
            kv=kv,
            scale=new.scale,
            softcap=new.softcap,
        )
        if new.softcap is not None or new.sinks is not None:
            observer(view)
            k, v = torch.cat([keys, new.k[0]], dim=1), torch.cat([values, new.v[0]], dim=1)
            return causal_attention(new.q, k[None], v[None], scale=new.scale, softcap=new.softcap, sinks=new.sinks)
        past, past_lse = attention_and_lse(new.q, keys[None], values[None], scale=new.scale, causal=False)
        own, own_lse = attention_and_lse(new.q, new.k, new.v, scale=new.scale, causal=True)
        observer(replace(view, past_lse=past_lse[0], own_lse=own_lse[0]))
        return merge_attention([past, own], [past_lse, own_lse])[0]

    def check_crop(self) -> None:
        """Raises if the newest tokens cannot be removed."""
        if any(o.num_seen for o in self.observers) and (self.policy.needs or self.positions is not None):
            raise CacheError("cannot crop while the prompt is read: what was observed of it cannot be taken back.")

    def crop(self, count: int) -> None:
        """Removes the newest `count` tokens of every row."""
        self.rows = [(k[:, :-count], v[:, :-count]) for k, v in self.rows]

    def select(self, rows: list[int]) -> None:
        """Keeps the given rows, in that order."""
        self.rows = [self.rows[r] for r in rows]
        self.observers = [copy(self.observers[r]) for r in rows]
