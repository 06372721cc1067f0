"""A long answer: write down every entry of a log in order, about 256 tokens.

While it grows, methods that evict at each step must stay within their budget, and the row says what is held at the end
(`kv_bytes_end`). The score is the share of entries that are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from steno.bench.tasks.scoring import match_all
from steno.bench.tasks.task import Draw, Instance, Query, Room
from steno.bench.tasks.text import phrase, prose_words, sentences

INTRODUCTION = "Somewhere in this text is a log of numbered entries. Remember all of them.\n"
QUESTION = "Write down all {count} entries of the log, each as `Entry number: words`, in order and with nothing else."


@final
@dataclass(frozen=True, kw_only=True)
class LongGeneration:
    """answer_tokens: length of the right answer, but at most a quarter of the context."""

    id: str = "long_generation"
    title: str = "a long answer"
    answer_tokens: int = 256
    takes_context: bool = True

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        wanted = min(self.answer_tokens, room.context_tokens // 4)
        entries = [f"Entry 1: {phrase(draw.rng)}"]
        while room.count("\n".join(entries)) < wanted:
            entries.append(f"Entry {len(entries) + 1}: {phrase(draw.rng)}")
        log = "\n".join(entries)
        query = Query(
            question=QUESTION.format(count=len(entries)),
            answers=tuple(entries[1:]),
            answer_prefix=entries[0] + "\n",
            max_new_tokens=room.count(log) + 8,
        )
        start, depth = draw.rng.randrange(len(prose_words())), draw.rng.random()

        def build(num_words: int) -> str:
            text = sentences(start, num_words)
            place = round(depth * len(text))
            return f"{INTRODUCTION}{' '.join(text[:place])}\n\n{log}\n\n{' '.join(text[place:])}"

        return Instance(context=room.fit(build, [query]), queries=(query,))

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_all(output, answers)
