"""The rows of one layer whose method goes on evicting while the model decodes: dense slots, overwritten in place."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steno.cache.policy import Evictor
from steno.cache.segment import HeadKV
from steno.cache.tokens import NewTokens
from steno.errors import CacheError, IntegrityError
from steno.kernels.attention import DenseSpan, Span, SpanTable, attend, attention_weights


@dataclass(kw_only=True)
class SlotBlock:
    """KV heads of one sequence that hold equally many tokens. Mutable.

    keys, values: `[g, capacity, D]`; positions: `[g, capacity]` int32; state: `[g, capacity]` fp32, the evictor's;
    the first `length` slots are in use. budget: tokens that may stay after a step. Order of slots means nothing.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    state: Tensor
    length: int
    budget: int

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, positions: Tensor, state: Tensor, budget: int) -> SlotBlock:
        length = keys.shape[1]
        block = cls(
            keys=keys, values=values, positions=positions.to(torch.int32), state=state, length=length, budget=budget
        )
        return block._resized(min(budget, length) + 1)

    def _resized(self, capacity: int) -> SlotBlock:
        """A copy of the used slots with room for `capacity` tokens."""

        def grow(x: Tensor) -> Tensor:
            shape = (x.shape[0], max(capacity, self.length), *x.shape[2:])
            bigger = x.new_empty(shape)
            bigger[:, : self.length] = x[:, : self.length]
            return bigger

        return replace(
            self,
            keys=grow(self.keys),
            values=grow(self.values),
            positions=grow(self.positions),
            state=grow(self.state),
        )

    @property
    def num_heads(self) -> int:
        return self.keys.shape[0]

    def clone(self) -> SlotBlock:
        return self._resized(self.keys.shape[1])

    def append(self, k: Tensor, v: Tensor, start: int) -> SlotBlock:
        """Writes T new tokens, `[g, T, D]`, at positions `start ..`; returns the block, moved if it had to grow."""
        count = k.shape[1]
        block = self
        if self.length + count > self.keys.shape[1]:
            room = self.length + count if count > 1 else max(self.length + 1, min(self.budget + 1, 2 * self.length))
            block = self._resized(room)
        new = slice(block.length, block.length + count)
        block.keys[:, new], block.values[:, new] = k, v
        block.positions[:, new] = torch.arange(start, start + count, dtype=torch.int32, device=k.device)
        block.state[:, new] = 0
        block.length += count
        return block

    def evict(self, evictor: Evictor) -> SlotBlock:
        """Drops the tokens of lowest priority until the budget holds; among equals the newer goes."""
        excess = self.length - self.budget
        if excess <= 0:
            return self
        used = slice(0, self.length)
        positions = self.positions[:, used].long()
        priority = evictor.priority(self.state[:, used], positions, self.budget)  # [g, n]
        if excess == 1:
            lowest = priority == priority.amin(dim=1, keepdim=True)
            victim = torch.where(lowest, positions, -1).argmax(dim=1)  # [g]
            heads, last = torch.arange(self.num_heads, device=victim.device), self.length - 1
            for x in (self.keys, self.values, self.positions, self.state):
                x[heads, victim] = x[:, last].clone()
            self.length = last
            return self
        by_position = positions.argsort(dim=1)
        order = priority.gather(1, by_position).argsort(dim=1, descending=True, stable=True)
        keep = by_position.gather(1, order)[:, : self.budget].sort(dim=1).values  # [g, budget]
        heads = torch.arange(self.num_heads, device=keep.device)[:, None]
        kept = [x[heads, keep] for x in (self.keys, self.values, self.positions, self.state)]
        return SlotBlock.of(kept[0], kept[1], kept[2], kept[3], self.budget)

    def drop_from(self, position: int) -> None:
        """Removes the tokens at `position` and after; they are the last slots as long as nothing was evicted since."""
        self.length = int((self.positions[0, : self.length] < position).sum())


@dataclass(kw_only=True)
class SlotRow:
    """One sequence: one block if all heads have the same budget, otherwise a block per head.

    prompt_tokens: tokens before the first step. evicted_at: logical length at the last eviction; the row cannot be rolled
    back before it.
    """

    blocks: list[SlotBlock]
    prompt_tokens: int = 0
    evicted_at: int = 0

    def fork(self) -> SlotRow:
        return replace(self, blocks=[block.clone() for block in self.blocks])

    def lengths(self) -> list[int]:
        return [block.length for block in self.blocks for _ in range(block.num_heads)]


class SlotRows:
    """B sequences of one layer under decode-time eviction. Mutable."""

    def __init__(self, rows: list[SlotRow], seen: list[int], evictor: Evictor, head_dim: int) -> None:
        self.rows, self.seen, self.evictor, self.head_dim = rows, seen, evictor, head_dim

    def held_tokens(self) -> list[list[int]]:
        """Held tokens `[B][Hkv]`."""
        return [row.lengths() for row in self.rows]

    def step(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        """Appends new tokens, attends over all slots, then evicts down to the budget.

        Returns out `[B, H, T, D]` and log-sum-exp `[B, H, T]`. The output of a step still sees the tokens that the step
        evicts (as in H2O's and TOVA's code).
        """
        for b, count in enumerate(new.row_counts):
            if count:
                self._append(b, new.row(b))
        out, lse = self._attend(new)
        for b, count in enumerate(new.row_counts):
            if count:
                self._evict(self.rows[b], new.row(b), self.seen[b])
        return out, lse

    def _append(self, b: int, new: NewTokens) -> None:
        first, row = 0, self.rows[b]
        for i, block in enumerate(row.blocks):
            heads = slice(first, first + block.num_heads)
            row.blocks[i] = block.append(new.k[0, heads], new.v[0, heads], self.seen[b])
            first += block.num_heads
        self.seen[b] += new.num_new

    def _attend(self, new: NewTokens) -> tuple[Tensor, Tensor]:
        spans = [self._spans(row) for row in self.rows]
        if new.counts is None:
            table = SpanTable.build(spans, head_dim=self.head_dim)
            return attend(new.q, table, scale=new.scale, softcap=new.softcap)
        out, lse = torch.zeros_like(new.q), new.q.new_full(new.q.shape[:3], -torch.inf, dtype=torch.float32)
        for b, count in enumerate(new.counts):
            if count:
                table = SpanTable.build([spans[b]], head_dim=self.head_dim)
                row_out, row_lse = attend(new.row(b).q, table, scale=new.scale, softcap=new.softcap)
                new.scatter_(out, b, row_out)
                lse[b, :, new.num_new - count :] = row_lse[0]
        return out, lse

    def _spans(self, row: SlotRow) -> list[list[Span]]:
        return [
            [DenseSpan(block.keys[h, : block.length], block.values[h, : block.length])]
            for block in row.blocks
            for h in range(block.num_heads)
        ]

    def _evict(self, row: SlotRow, new: NewTokens, seen: int) -> None:
        group, first = new.q.shape[1] // new.k.shape[1], 0
        for i, block in enumerate(row.blocks):
            q = new.q[0, first * group : (first + block.num_heads) * group]  # [g * G, T, D]
            if self.evictor.needs_weights:
                keys, state = block.keys[:, : block.length], block.state[:, : block.length]
                weights = attention_weights(q, keys, scale=new.scale, softcap=new.softcap)  # [g * G, T, n]
                first_step = seen - new.num_new - row.prompt_tokens + 1
                for t in range(new.num_new):
                    state = self.evictor.observe(state, weights[:, t], step=first_step + t)
                block.state[:, : block.length] = state
            if block.length > block.budget:
                row.evicted_at = seen
            row.blocks[i] = block.evict(self.evictor)
            first += block.num_heads

    def decode_row(self, b: int, dtype: torch.dtype) -> list[HeadKV]:
        """Dense keys and values `[n_h, D]` of every head of a row, in the order of their slots."""
        return [
            (block.keys[h, : block.length].to(dtype), block.values[h, : block.length].to(dtype))
            for block in self.rows[b].blocks
            for h in range(block.num_heads)
        ]

    def positions(self, b: int, seen: int) -> list[Tensor]:
        """True positions of the held tokens of each head, in the order of their slots."""
        blocks = self.rows[b].blocks
        return [block.positions[h, : block.length].long() for block in blocks for h in range(block.num_heads)]

    def check_crop(self, count: int, seen: list[int]) -> None:
        """Raises CacheError if the newest `count` tokens have already had an effect on what is held."""
        dropped = any(row.evicted_at > n - count for row, n in zip(self.rows, seen, strict=True))
        if dropped or self.evictor.needs_weights:
            reason = "dropped others" if dropped else "counted their attention"
            raise CacheError(
                f"cannot roll back {count} tokens: a method that evicts while it decodes has {reason} since. "
                "Speculative decoding needs a recipe that does not evict while decoding."
            )

    def crop(self, count: int, seen: list[int]) -> None:
        """Removes the newest `count` tokens of every row; the owner has called `check_crop`."""
        for b, row in enumerate(self.rows):
            self.seen[b] = seen[b] - count
            for block in row.blocks:
                block.drop_from(self.seen[b])

    def select(self, rows: list[int]) -> SlotRows:
        """The given rows in that order, copied: slots are overwritten in place and cannot be shared."""
        forks = [self.rows[r].fork() for r in rows]
        return SlotRows(forks, [self.seen[r] for r in rows], self.evictor, self.head_dim)

    def check_integrity(self, seen: list[int]) -> None:
        """Raises IntegrityError if slots, positions or budgets disagree."""
        for b, row in enumerate(self.rows):
            if self.seen[b] != seen[b]:
                raise IntegrityError(f"row {b} must have seen {seen[b]} tokens; it has seen {self.seen[b]}.")
            for block in row.blocks:
                used = block.positions[:, : block.length]
                if block.length > max(block.budget, 0):
                    raise IntegrityError(f"row {b} must hold at most {block.budget} tokens; it holds {block.length}.")
                for head in used:
                    if head.unique().numel() != block.length or (block.length and int(head.max()) >= seen[b]):
                        raise IntegrityError(f"row {b}: positions must be distinct and below {seen[b]}.")
