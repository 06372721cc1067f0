"""Several questions on one context: five numbers in prose, asked for one after the other of the same compressed memory.

A method that compresses for one question loses the others; see Kim et al. 2025, "KVzip", https://arxiv.org/abs/2505.23416,
section 4. The score of an instance is the mean over its questions.
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
class Questions:
    id: str = "questions"
    title: str = "five questions on one context"
    num_questions: int = 5
    takes_context: bool = True

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        facts: dict[str, str] = {}
        while len(facts) < self.num_questions:
            facts[phrase(draw.rng)] = number(draw.rng)
        queries = tuple(needle_query("numbers", [key], [value], room) for key, value in facts.items())
        start = draw.rng.randrange(len(prose_words()))
        depths = sorted(draw.rng.random() for _ in facts)

        def build(num_words: int) -> str:
            text = sentences(start, num_words)
            for (key, value), depth in reversed(list(zip(facts.items(), depths, strict=True))):
                text.insert(round(depth * len(text)), NEEDLE.format(kind="numbers", key=key, value=value))
            return intro("numbers", several=True) + " ".join(text)

        return Instance(context=room.fit(build, queries), queries=queries)

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_all(output, answers)
