"""RULER's eight needle tasks: single 1-3, multi-key 1-3, multi-value, multi-query.

Source: Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language Models?",
https://arxiv.org/abs/2404.06654, section 3 and appendix B.
Differs: essays are the Python language reference; words are its words; an answer may take its own tokens and 8 more,
not 128.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

from steno.bench.tasks.scoring import match_all
from steno.bench.tasks.task import Draw, Instance, Query, Room
from steno.bench.tasks.text import NOISE, number, phrase, prose_words, random_uuid, sentences

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
SPARE_TOKENS = 8
"""What an answer may take beyond its own tokens."""

Haystack = Literal["noise", "essay", "needles"]
_DRAW = {"words": phrase, "numbers": number, "uuids": random_uuid}


def intro(kind: str, *, several: bool) -> str:
    """What stands before the haystack."""
    if several:
        return (
            f"Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n"
        )
    one = kind.removesuffix("s")
    return (
        f"A special magic {one} is hidden within the following text. Make sure to memorize it. "
        f"I will quiz you about the {one} afterwards.\n"
    )


def needle_query(kind: str, keys: Sequence[str], values: Sequence[str], room: Room) -> Query:
    """The question for the values of some keys, and how the answer begins."""
    wanted = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if len(values) == 1:
        one = kind.removesuffix("s")
        question = f"What is the special magic {one} for {wanted} mentioned in the provided text?"
        prefix = f" The special magic {one} for {wanted} mentioned in the provided text is"
    else:
        question = f"What are all the special magic {kind} for {wanted} mentioned in the provided text?"
        prefix = f" The special magic {kind} for {wanted} mentioned in the provided text are"
    return Query(
        question=question,
        answers=tuple(values),
        answer_prefix=prefix,
        max_new_tokens=room.count(" " + ", ".join(values)) + SPARE_TOKENS,
    )


@final
@dataclass(frozen=True, kw_only=True)
class RulerNeedles:
    """Needles `key: value` in a haystack. num_keys: keys in the text; num_values: of each key; num_asked: keys asked for."""

    id: str
    title: str
    haystack: Haystack
    key_kind: Literal["words", "uuids"] = "words"
    value_kind: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1
    takes_context: bool = True

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        rng, kind = draw.rng, self.value_kind
        keys = [_DRAW[self.key_kind](rng) for _ in range(self.num_keys)]
        values = {key: [_DRAW[kind](rng) for _ in range(self.num_values)] for key in keys}
        needles = [NEEDLE.format(kind=kind, key=key, value=value) for key in keys for value in values[key]]
        rng.shuffle(needles)
        asked = keys[: self.num_asked]
        query = needle_query(kind, asked, [value for key in asked for value in values[key]], room)
        depths = sorted(rng.sample(range(40), len(needles)))
        start = rng.randrange(len(prose_words()))
        # other needles, drawn as they are needed and kept, so that a longer haystack begins like a shorter one
        others: list[str] = []

        def hay(n: int) -> list[str]:
            if self.haystack == "noise":
                return [NOISE] * n
            if self.haystack == "essay":
                return sentences(start, n)
            while len(others) < n:
                key = _DRAW[self.key_kind](rng)
                if key not in values:
                    others.append(NEEDLE.format(kind=kind, key=key, value=_DRAW[kind](rng)))
            return others[:n]

        separator = " " if self.haystack == "essay" else "\n"
        several = self.num_asked * self.num_values > 1

        def build(n: int) -> str:
            lines = hay(n)
            for needle, depth in zip(reversed(needles), reversed(depths), strict=True):
                lines.insert(round(depth / 39 * len(lines)), needle)
            return intro(kind, several=several) + separator.join(lines)

        return Instance(context=room.fit(build, [query]), queries=(query,))

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_all(output, answers)


RULER_NEEDLES = (
    RulerNeedles(id="niah_single_1", title="RULER: one number in noise", haystack="noise"),
    RulerNeedles(id="niah_single_2", title="RULER: one number in prose", haystack="essay"),
    RulerNeedles(id="niah_single_3", title="RULER: one UUID in prose", haystack="essay", value_kind="uuids"),
    RulerNeedles(id="niah_multikey_1", title="RULER: one of four keys", haystack="essay", num_keys=4),
    RulerNeedles(id="niah_multikey_2", title="RULER: one line among lines like it", haystack="needles"),
    RulerNeedles(
        id="niah_multikey_3",
        title="RULER: one UUID line among UUID lines",
        haystack="needles",
        key_kind="uuids",
        value_kind="uuids",
    ),
    RulerNeedles(id="niah_multivalue", title="RULER: four values of one key", haystack="essay", num_values=4),
    RulerNeedles(id="niah_multiquery", title="RULER: four keys at once", haystack="essay", num_keys=4, num_asked=4),
)
