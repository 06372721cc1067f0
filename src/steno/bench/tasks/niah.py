"""A needle in a haystack: one number in prose, at depths spread evenly over the instances; with --context a grid.

Source: Kamradt 2023, "Needle in a haystack: pressure testing LLMs", with the wording of RULER's single needle.
Differs: the haystack is the Python language reference, which every machine has, instead of essays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from steno.bench.tasks.ruler_needles import NEEDLE, intro, needle_query
from steno.bench.tasks.scoring import match_all
from steno.bench.tasks.task import Draw, Instance, Room
from steno.bench.tasks.text import number, phrase, prose_words, sentences


@final
@dataclass(frozen=True, kw_only=True)
class NeedleGrid:
    """One seven-digit number for a key of two words."""

    id: str = "niah"
    title: str = "needle in a haystack, depth by length"
    takes_context: bool = True

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        key, value = phrase(draw.rng), number(draw.rng)
        needle = NEEDLE.format(kind="numbers", key=key, value=value)
        query = needle_query("numbers", [key], [value], room)
        start = draw.rng.randrange(len(prose_words()))
        depth = draw.index / max(1, draw.count - 1)

        def build(num_words: int) -> str:
            text = sentences(start, num_words)
            text.insert(round(depth * len(text)), needle)
            return intro("numbers", several=False) + " ".join(text)

        return Instance(context=room.fit(build, [query]), queries=(query,), depth=depth)

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_all(output, answers)
