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

    def reserve(self, num_new: int) -> bool:
        """Makes room for so many more tokens in every row. True if the buffer moved."""
        needed = max(self.lengths) + num_new
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

    def oldest(self, rows: list[int], count: int) -> tuple[Tensor, Tensor]:
        """The oldest `count` tokens of some rows, `[R, Hkv, count, D]` each; of all rows, without a copy."""
        keys, values = self.keys[:, :, :count], self.values[:, :, :count]
        return (keys, values) if len(rows) == len(self.lengths) else (keys[rows], values[rows])

    def drop(self, counts: list[int]) -> None:
        """Removes the oldest `counts[b]` tokens of every row."""
        for b, count in enumerate(counts):
            rest = self.lengths[b] - count
            if count and rest:
                for x in (self.keys, self.values):
                    x[b, :, :rest] = x[b, :, count : count + rest].clone()
            self.lengths[b] = rest

    def row(self, row: int) -> tuple[Tensor, Tensor]:
        """Views `[Hkv, n, D]` of what a row holds."""
        n = self.lengths[row]
        return self.keys[row, :, :n], self.values[row, :, :n]

    def select(self, rows: list[int]) -> Tail:
        """A copy that holds the given rows in that order."""
        index = torch.tensor(rows, dtype=torch.long, device=self.keys.device)
        lengths = [self.lengths[r] for r in rows]
        return Tail(self.keys.index_select(0, index), self.values.index_select(0, index), lengths, self.quantum)
