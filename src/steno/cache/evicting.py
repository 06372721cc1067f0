"""The prompt of one layer under a method that evicts while it reads: never more than the budget and one chunk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from steno.cache.access import Shared
from steno.cache.compress import slot_row
from steno.cache.observe import PromptObserver
from steno.cache.paged import PagedRows
from steno.cache.policy import LayerPolicy, Reader, Selection
from steno.cache.prompt import PRE_ROPE
from steno.cache.row import pack_kept
from steno.cache.slots import SlotRows
from steno.cache.tail import Tail
from steno.cache.tokens import NewTokens
from steno.cache.write import SegmentWriter
from steno.errors import CacheError
from steno.kernels.attention.prefill import causal_attention
from steno.types import LayerKV, Observation, Rope


@final
@dataclass(frozen=True, kw_only=True)
class HeldRow:
    """What one sequence still holds, heads by themselves, in the order of the text.

    keys, values: `[Hkv, n, D]`; positions: `[Hkv, n]` int32; state: `[Hkv, n]` fp32, the method's; seen: tokens read so far.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    state: Tensor
    seen: int

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.positions, self.state))

    def grown(self, k: Tensor, v: Tensor, state: Tensor) -> HeldRow:
        """With T new tokens: keys and values `[Hkv, T, D]`, state `[Hkv, T]`."""
        new = torch.arange(self.seen, self.seen + k.shape[1], dtype=torch.int32, device=k.device).expand(len(k), -1)
        return HeldRow(
            keys=torch.cat([self.keys, k], dim=1),
            values=torch.cat([self.values, v], dim=1),
            positions=torch.cat([self.positions, new], dim=1),
            state=torch.cat([self.state, state], dim=1),
            seen=self.seen + k.shape[1],
        )

    def kept(self, reader: Reader, budget: int, *, is_last: bool) -> HeldRow:
        """The `budget` tokens of each head that are kept first; among equals the earlier."""
        if self.keys.shape[1] <= budget:
            return self
        positions = self.positions.long()
        scores = reader.retention(self.keys, self.state, positions, budget_tokens=budget, is_last=is_last)  # [Hkv, n]
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :budget].sort(dim=1).values  # [Hkv, budget]
        wide = best[:, :, None].expand(-1, -1, self.keys.shape[2])  # [Hkv, budget, D]
        return HeldRow(
            keys=self.keys.gather(1, wide),
            values=self.values.gather(1, wide),
            positions=self.positions.gather(1, best),
            state=self.state.gather(1, best),
            seen=self.seen,
        )


class EvictingPrompt:
    """B rows of equal length whose prompt is not complete, cut to the budget after every chunk but the last. Mutable.

    prompt_tokens: length at which the prompt is complete. dense_bytes: what the rows held at most in the last pass.
    """

    def __init__(
        self,
        policy: LayerPolicy,
        reader: Reader,
        rope_of: Callable[[torch.device], Rope | None],
        new: NewTokens,
        *,
        layer_idx: int,
        num_layers: int,
        prompt_tokens: int,
    ) -> None:
        self.policy, self.reader, self.prompt_tokens = policy, reader, prompt_tokens
        self.layer_idx, self.num_layers, self.scaling = layer_idx, num_layers, new.scale
        self.rope = rope_of(new.q.device) if policy.needs & PRE_ROPE else None
        whole = new.k[0, :, :1].expand(-1, prompt_tokens, -1)  # no memory: only its shape is asked for
        self.budget = policy.budget_tokens(
            LayerKV(keys=whole, values=whole, positions=torch.arange(prompt_tokens)), num_layers
        )
        num_heads, device = new.k.shape[1], new.k.device
        self.rows = [
            HeldRow(
                keys=k[:, :0],
                values=v[:, :0],
                positions=torch.empty(num_heads, 0, dtype=torch.int32, device=device),
                state=torch.empty(num_heads, 0, device=device),
                seen=0,
            )
            for k, v in zip(new.k, new.v, strict=True)
        ]
        self.dense_bytes = 0

    def read(self, new: NewTokens) -> Tensor:
        """Takes new tokens in, attends causally over all that is held, then evicts: `[B, H, T, D]`."""
        if new.counts is not None:
            raise CacheError(
                "rows of different lengths cannot be read with eviction: their budgets would not be known; read them one by "
                "one, or without evict_while_reading."
            )
        outs, dense_bytes = [], 0
        for b, held in enumerate(self.rows):
            row = new.row(b)
            grown = held.grown(row.k[0], row.v[0], self._state(row, held.seen))
            outs.append(
                causal_attention(
                    row.q, grown.keys[None], grown.values[None], scale=new.scale, softcap=new.softcap, sinks=new.sinks
                )
            )
            dense_bytes += grown.num_bytes
            is_last = grown.seen >= self.prompt_tokens
            self.rows[b] = grown if is_last else grown.kept(self.reader, self.budget, is_last=False)
        self.dense_bytes = dense_bytes
        return torch.cat(outs)

    def _state(self, row: NewTokens, seen: int) -> Tensor:
        positions = torch.arange(seen, seen + row.num_new, device=row.k.device)
        kv = LayerKV(keys=row.k[0], values=row.v[0], positions=positions)
        observer = PromptObserver(self.policy, self.rope, scale=row.scale, softcap=row.softcap)
        observer.num_seen = seen
        observer.see(row.q[0], None if row.hidden is None else row.hidden[0])
        return self.reader.token_state(
            kv,
            observer.observation(
                kv, layer_idx=self.layer_idx, num_layers=self.num_layers, budget_tokens=self.budget, replay_mass=None
            ),
        )

    def compress(self, shared: Shared) -> PagedRows | SlotRows:
        """What the recipe keeps of the complete prompt."""
        evictor = self.policy.evictor
        writer = SegmentWriter(policy=self.policy, layer_idx=self.layer_idx, num_layers=self.num_layers)
        seen = Observation(
            layer_idx=self.layer_idx, num_layers=self.num_layers, scaling=self.scaling, budget_tokens=self.budget
        )
        kept = [held.kept(self.reader, self.budget, is_last=True) for held in self.rows]
        rows, tails, slots = [], [], []
        for held in kept:
            num_held = held.keys.shape[1]
            # where they stand among the held tokens; where they stand in the text is told afterwards
            kv = LayerKV(keys=held.keys, values=held.values, positions=torch.arange(num_held, device=held.keys.device))
            selection = Selection(kv=kv, state=list(held.state))
            if evictor is not None:
                slot = slot_row(selection, self.budget, num_held)
                for block in slot.blocks:
                    block.positions[:, : block.length] = held.positions
                slot.prompt_tokens, slot.evicted_at = held.seen, held.seen if num_held < held.seen else 0
                slots.append(slot)
                continue
            row, tail = writer.write_prompt(selection, seen, num_held)
            if num_held < held.seen:
                row.kept, row.prompt_tokens = pack_kept(list(held.positions.long()), held.seen), held.seen
            rows.append(row)
            tails.append(tail)
        if evictor is not None:
            return SlotRows(slots, [held.seen for held in kept], evictor, kept[0].keys.shape[2])
        return PagedRows(rows, Tail.of(tails, self.policy.residual_tokens), writer, shared)

    def keep(self) -> None:
        """Nothing to do: what is held was copied when it was taken in."""

    def held_tokens(self) -> list[list[int]]:
        """Held tokens `[B][Hkv]`."""
        return [[held.keys.shape[1]] * held.keys.shape[0] for held in self.rows]

    def check_crop(self) -> None:
        """Raises CacheError: tokens were chosen in view of those that would go."""
        raise CacheError("cannot crop while the prompt is read with eviction: what was dropped cannot come back.")

    def crop(self, count: int) -> None:
        """Never reached: `check_crop` raises."""
        self.check_crop()

    def select(self, rows: list[int]) -> None:
        """Keeps the given rows, in that order."""
        self.rows = [self.rows[r] for r in rows]
