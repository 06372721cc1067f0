"""Pieces of a text: runs of tokens from places drawn under the seed."""

from __future__ import annotations

import random

from steno.errors import PromptError
from steno.session import LanguageModel

MIN_TOKENS = 64


def pieces(lm: LanguageModel, text: str, *, count: int, size: int, seed: int) -> list[list[int]]:
    """At most `count` runs of at most `size` tokens, in the order of the text; fewer where it is short, none overlap.

    Raises PromptError if the text has fewer than 64 tokens.
    """
    tokens = lm.tokenize(text)
    if len(tokens) < MIN_TOKENS:
        raise PromptError(f"calibration needs at least {MIN_TOKENS} tokens of text; got {len(tokens)}.")
    size = min(size, len(tokens), lm.loaded.max_positions or size)
    places = random.Random(seed).sample(range(len(tokens) // size), min(count, len(tokens) // size))
    return [tokens[place * size : (place + 1) * size] for place in sorted(places)]
