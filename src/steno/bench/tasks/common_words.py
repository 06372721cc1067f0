"""RULER's common words: the ten words of a numbered list that come more often than the others.

Source: Hsieh et al. 2024, https://arxiv.org/abs/2404.06654, section 3; 30 times against 3, below 4096 tokens 6 against 1;
one solved example first.
Differs: words of the Python language reference.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from steno.bench.tasks.scoring import match_all
from steno.bench.tasks.task import Draw, Instance, Query, Room
from steno.bench.tasks.text import distinct_words

TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
QUESTION = "Question: What are the 10 most common words in the above list?"
PREFIX = " Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON = 10
LONG_TOKENS = 4096


@final
@dataclass(frozen=True, kw_only=True)
class CommonWords:
    id: str = "cwe"
    title: str = "RULER: common words"
    takes_context: bool = True

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        is_long = room.context_tokens >= LONG_TOKENS
        seed = draw.rng.random()
        shots = distinct_words(draw.rng, 40 if is_long else 20)
        often, rarely = (10, 3) if is_long else (3, 1)
        listed = _numbered(shots[:NUM_COMMON], shots[NUM_COMMON:], often, rarely, seed)
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(shots[:NUM_COMMON], start=1))
        example = f"{TASK}{listed}\n{QUESTION}{PREFIX} {answer}\n"
        often, rarely = (30, 3) if is_long else (6, 1)
        # a numbered word takes three tokens at the least, so the pool is never used up
        pool = distinct_words(random.Random(seed), NUM_COMMON + room.context_tokens // (3 * rarely))
        common, uncommon = pool[:NUM_COMMON], pool[NUM_COMMON:]
        right = " ".join(f"{i}. {word}" for i, word in enumerate(common, start=1))
        query = Query(
            question=QUESTION,
            answers=tuple(common),
            answer_prefix=PREFIX,
            max_new_tokens=min(120, room.count(right) + 16),
        )
        context = room.fit(
            lambda n: example + TASK + _numbered(common, uncommon[:n], often, rarely, seed),
            [query],
            at_most=len(uncommon),
        )
        return Instance(context=context, queries=(query,))

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_all(output, answers)


def _numbered(common: Sequence[str], uncommon: Sequence[str], often: int, rarely: int, seed: float) -> str:
    """`1. word 2. word …`, shuffled."""
    words = list(common) * often + list(uncommon) * rarely
    random.Random(seed).shuffle(words)
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))
