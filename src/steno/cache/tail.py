"""The tail: the newest tokens of every row, dense and still growing, in one buffer for the batch."""

from __future__ import annotations

import torch
from torch import Tensor


class Tail:
    """keys, values: `[B, Hkv, capacity, D]`; row b holds its first `lengths[b]` tokens. Mutable.

    It starts without spare capacity, so what is held after a read is what the formulas say; the first append grows it
    to `quantum` tokens.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: list[int], quantum: int) -> None:
        self.keys, self.values, self.lengths, self.quantum = keys, values, lengths, quantum

    @classmethod
    def of(cls, rows: list[tuple[Tensor, Tensor]], quantum: int) -> Tail:
        """From keys and values `[Hkv, n_b, D]` per row."""
        num_heads, _, dim = rows[0][0].shape
        longest = max(k.shape[1] for k, _ in rows)
        keys = rows[0][0].new_empty(len(rows), num_heads, longest, dim)
        values = torch.empty_like(keys)
        for b, (k, v) in enumerate(rows):
            keys[b, :, : k.shape[1]] = k
            values[b, :, : v.shape[1]] = v
        return cls(keys, values, [k.shape[1] for k, _ in rows], quantum)

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor, counts: list[int] | None = None) -> bool:
        """Appends T tokens, k and v `[B, Hkv, T, D]`; of row b only the last `counts[b]`. True if the buffer moved."""
        num_new = k.shape[2]
        moved = self._reserve(max(self.lengths) + num_new)
        if counts is None and len(set(self.lengths)) == 1:
            n = self.lengths[0]
            self.keys[:, :, n : n + num_new] = k
            self.values[:, :, n : n + num_new] = v
            self.lengths = [n + num_new] * len(self.lengths)
            return moved
        for b, n in enumerate(self.lengths):
            count = num_new if counts is None else counts[b]
            self.keys[b, :, n : n + count] = k[b, :, num_new - count :]
            self.values[b, :, n : n + count] = v[b, :, num_new - count :]
            self.lengths[b] = n + count
        return moved

    def _reserve(self, needed: int) -> bool:
        if needed <= self.capacity:
            return False
        capacity = -(-needed // self.quantum) * self.quantum
        num_rows, num_heads, _, dim = self.keys.shape
        keys = self.keys.new_empty(num_rows, num_heads, capacity, dim)
        values = torch.empty_like(keys)
        keys[:, :, : self.capacity] = self.keys
        values[:, :, : self.capacity] = self.values
        self.keys, self.values = keys, values
        return True

    def shrink(self) -> None:
        """Gives back what a long turn had needed: keeps the fewest whole quanta that hold the longest row, at least one."""
        wanted = max(1, -(-max(self.lengths) // self.quantum)) * self.quantum
        if wanted < self.capacity:
            self.keys, self.values = self.keys[:, :, :wanted].clone(), self.values[:, :, :wanted].clone()

    def take(self, row: int, count: int) -> tuple[Tensor, Tensor]:
        """Removes the oldest `count` tokens of a row and returns them, `[Hkv, count, D]` each."""
        keys, values = self.keys[row, :, :count].clone(), self.values[row, :, :count].clone()
        rest = self.lengths[row] - count
        if rest:
            self.keys[row, :, :rest] = self.keys[row, :, count : count + rest].clone()
            self.values[row, :, :rest] = self.values[row, :, count : count + rest].clone()
        self.lengths[row] = rest
        return keys, values

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """Views `[Hkv, n, D]` of what a row holds."""
        n = self.lengths[row]
        return self.keys[row, :, :n], self.values[row, :, :n]

    def select(self, rows: list[int]) -> Tail:
        """A copy that holds the given rows in that order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.keys.device)
        lengths = [self.lengths[r] for r in rows]
        return Tail(self.keys.index_select(0, index), self.values.index_select(0, index), lengths, self.quantum)
