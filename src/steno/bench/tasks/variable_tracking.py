"""RULER's variable tracking: all names that hold a value through a chain of assignments hidden in noise.

Source: Hsieh et al. 2024, https://arxiv.org/abs/2404.06654, section 3; one chain, four hops, one solved example first.
Differs: the example takes at most a quarter of the context (RULER: 500 tokens).
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from steno.bench.tasks.scoring import match_all
from steno.bench.tasks.task import Draw, Instance, Query, Room, largest
from steno.bench.tasks.text import NOISE

TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = "Question: Find all variables that are assigned the value {value} in the text above."
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
EXAMPLE_TOKENS = 500


@final
@dataclass(frozen=True, kw_only=True)
class VariableTracking:
    id: str = "vt"
    title: str = "RULER: variable tracking"
    num_hops: int = 4
    takes_context: bool = True

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        example = self._example(draw.rng, room)
        names, value, chain = self._chain(draw.rng, 5)
        seed = draw.rng.random()
        query = Query(
            question=QUESTION.format(value=value),
            answers=tuple(names),
            answer_prefix=PREFIX.format(count=len(names), value=value),
            max_new_tokens=max(30, room.count(" ".join(names)) + 8),
        )
        context = room.fit(lambda n: example + TASK + self._hide(chain, n, seed), [query])
        return Instance(context=context, queries=(query,))

    def _example(self, rng: random.Random, room: Room) -> str:
        names, value, chain = self._chain(rng, 3)
        seed = rng.random()

        def build(n: int) -> str:
            turn = QUESTION.format(value=value) + PREFIX.format(count=len(names), value=value)
            return f"{TASK}{self._hide(chain, n, seed)}\n{turn}{' '.join(names)}\n\n\n"

        limit = min(EXAMPLE_TOKENS, room.context_tokens // 4)
        # where even the bare example takes more, it stands as it is and the noise around the question gives way
        return build(largest(lambda n: n == 0 or room.count(build(n)) <= limit, 40, room.context_tokens))

    def _chain(self, rng: random.Random, letters: int) -> tuple[list[str], str, list[str]]:
        """Names, their value, and the assignments in order."""
        names: list[str] = []
        while len(names) <= self.num_hops:
            name = "".join(rng.choices(string.ascii_uppercase, k=letters))
            if name not in names:
                names.append(name)
        value = str(rng.randint(10000, 99999))
        chain = [f"VAR {names[0]} = {value}"]
        return names, value, chain + [f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:], strict=False)]

    def _hide(self, chain: Sequence[str], num_noises: int, seed: float) -> str:
        """The chain in order at random places of the noise; the same places for the same seed and length."""
        lines = [NOISE] * num_noises
        places = sorted(random.Random(seed).choices(range(num_noises + 1), k=len(chain)))
        for place, line in reversed(list(zip(places, chain, strict=True))):
            lines.insert(place, line)
        return "\n".join(lines)

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_all(output, answers)
