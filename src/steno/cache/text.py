"""Where sentences end: what a cache is told of the text that it remembers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import final

import torch
from torch import Tensor

from steno.errors import BadArgument


@final
class TokenText:
    """The sentence of every token that a cache has seen, counted from 0, row by row. Mutable.

    ends: the token ids that end a sentence.
    """

    def __init__(self, ends: frozenset[int]) -> None:
        self.ends = ends
        self.rows: list[Tensor] = []  # [seen] int32 each
        self._next: list[int] = []  # the sentence of the token to come

    def announce(self, rows: Sequence[Sequence[int]]) -> None:
        """Notes tokens that are about to be read, behind those of each row; padding left out."""
        if not self.rows:
            self.rows, self._next = [torch.zeros(0, dtype=torch.int32) for _ in rows], [0] * len(rows)
        if len(rows) != len(self.rows):
            raise BadArgument(f"tokens of {len(self.rows)} rows must be announced; got {len(rows)}.")
        for b, ids in enumerate(rows):
            # of each token, and of the one behind them all
            sentences = [*accumulate((i in self.ends for i in ids), initial=self._next[b])]
            self.rows[b] = torch.cat([self.rows[b], torch.tensor(sentences[:-1], dtype=torch.int32)])
            self._next[b] = sentences[-1]

    def newest(self) -> Tensor:
        """The sentence of the newest token of each row, `[B]` int64."""
        return torch.stack([row[-1] for row in self.rows]).long()

    def crop(self, count: int) -> None:
        """Forgets the newest `count` tokens of every row."""
        for b, row in enumerate(self.rows):
            if 0 < count <= len(row):
                self._next[b] = int(row[len(row) - count])
                self.rows[b] = row[: len(row) - count].clone()

    def select(self, rows: Sequence[int]) -> None:
        """Keeps the given rows, in that order."""
        self.rows, self._next = [self.rows[b] for b in rows], [self._next[b] for b in rows]

    def fork(self) -> TokenText:
        """One that goes its own way."""
        twin = TokenText(self.ends)
        twin.rows, twin._next = list(self.rows), list(self._next)
        return twin
