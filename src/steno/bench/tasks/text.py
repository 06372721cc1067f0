"""Text that every machine has: the Python language reference, words from it, and RULER's noise."""

from __future__ import annotations

import random
import re
import uuid
from functools import cache
from itertools import islice, product

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_WORD = re.compile(r"(?<![\w.'-])[a-z]{4,9}(?![\w'-])")


@cache
def paragraphs() -> tuple[str, ...]:
    """Paragraphs of the running interpreter's language reference, in the order of its chapters' names."""
    from pydoc_data.topics import topics

    whole = "\n\n".join(topics[name] for name in sorted(topics))
    return tuple(p for p in re.split(r"\n\s*\n", whole) if p.strip())


@cache
def prose_words() -> tuple[str, ...]:
    """The reference as words, whitespace collapsed, as RULER does with its essays."""
    return tuple(" ".join(paragraphs()).split())


@cache
def single_words() -> tuple[str, ...]:
    """Words of four to nine letters of the reference, each once, sorted."""
    return tuple(sorted(set(_WORD.findall(" ".join(paragraphs())))))


def distinct_words(rng: random.Random, count: int) -> list[str]:
    """Words, no two the same; hyphenated pairs once the single ones are used up."""
    singles = single_words()
    if count <= len(singles):
        return rng.sample(singles, count)
    pairs = (f"{a}-{b}" for a, b in product(singles, singles))
    found = [*singles, *islice(pairs, count - len(singles))]
    rng.shuffle(found)
    return found


def sentences(start: int, num_words: int) -> list[str]:
    """Sentences of `num_words` words of prose from word `start` on, from the beginning again where it ends."""
    words = prose_words()
    first = start % len(words)
    taken = list(words[first : first + num_words])
    while len(taken) < num_words:
        taken += words[: num_words - len(taken)]
    return re.split(r"(?<=[.!?]) ", " ".join(taken)) if taken else []


def phrase(rng: random.Random) -> str:
    """Two words with a hyphen, a key to ask for."""
    return "-".join(rng.sample(single_words(), 2))


def number(rng: random.Random) -> str:
    """Seven digits."""
    return str(rng.randint(10**6, 10**7 - 1))


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
