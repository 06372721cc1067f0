"""Samplers: from the logits of one position to a token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steno.errors import BadArgument

Sampler = Callable[[Tensor, Sequence[int]], int]
"""Called with logits `[V]` and all tokens so far, prompt included; returns the next token."""


@final
@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; the filters and their order are transformers'.

    Parameters
    ----------
    temperature : float
        0 is greedy.
    top_k : int or None
        Keep the k most likely tokens.
    top_p : float or None
        Keep the smallest set of tokens whose probabilities add up to p.
    min_p : float or None
        Keep tokens at least min_p times as likely as the likeliest.
    repetition_penalty : float
        Above 1, tokens that occurred become less likely.
    seed : int or None
        None draws a new sequence each time.

    Raises
    ------
    BadArgument
        If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = [
            ("temperature", self.temperature, self.temperature >= 0, ">= 0"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, ">= 1"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "> 0"),
        ]
        for name, value, holds, rule in checks:
            if not holds:
                raise BadArgument(f"`{name}` must be {rule}; got {name}={value}.")

    def sampler(self) -> Sampler:
        """A sampler with a random state of its own."""
        processors = self._processors()
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)

        def draw(logits: Tensor, history: Sequence[int]) -> int:
            scores = logits.float()[None]  # [1, V]
            if processors:
                seen = history if self.repetition_penalty != 1.0 else ()  # no other filter looks at it
                scores = processors(torch.tensor([[*seen]], dtype=torch.long, device=logits.device), scores)
            if self.temperature == 0:
                return int(scores.argmax())
            return int(torch.multinomial(scores[0].softmax(-1).cpu(), 1, generator=generator))

        return draw

    def _processors(self) -> LogitsProcessorList:
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.temperature == 0:
            return chain
        if self.temperature != 1.0:
            chain.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k is not None:
            chain.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None:
            chain.append(TopPLogitsWarper(self.top_p))
        if self.min_p is not None:
            chain.append(MinPLogitsWarper(self.min_p))
        return chain


GREEDY = Sampling()
