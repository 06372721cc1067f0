"""RULER's frequent words: the three coded words that come most often, frequencies after a zeta law.

Source: Hsieh et al. 2024, https://arxiv.org/abs/2404.06654, section 3; alpha 2, 2000 coded words of six letters, the most
frequent one replaced by dots.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from steno.bench.tasks.scoring import match_all
from steno.bench.tasks.task import Draw, Instance, Query, Room

TASK = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared "
    "words in the above coded text?"
)
PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
NUM_CODED = 2000
ZETA_2 = math.pi**2 / 6
LEAST_WORDS = 64
"""Below it the third word would come less than four times."""


@final
@dataclass(frozen=True, kw_only=True)
class FrequentWords:
    id: str = "fwe"
    title: str = "RULER: frequent words"
    takes_context: bool = True

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        coded: list[str] = []
        while len(coded) < NUM_CODED:
            word = "".join(draw.rng.choices(string.ascii_lowercase, k=6))
            if word not in coded:
                coded.append(word)
        coded[0] = "..."
        seed = draw.rng.random()
        query = Query(question=QUESTION, answers=tuple(coded[1:4]), answer_prefix=PREFIX, max_new_tokens=50)

        def build(n: int) -> str:
            counts = [int((LEAST_WORDS + n) * rank**-2 / ZETA_2) for rank in range(1, NUM_CODED + 1)]
            words = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
            random.Random(seed).shuffle(words)
            return TASK + " ".join(words)

        return Instance(context=room.fit(build, [query]), queries=(query,))

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_all(output, answers)
