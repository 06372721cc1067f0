"""Documents cut from a text, with questions that quote them: what an answer looks at, without anybody writing answers."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from steno.errors import PromptError
from steno.session import LanguageModel

WORDS = 300
"""Words of a document."""
QUOTES = 6
"""Questions about a document."""
TRIES = 200
_SENTENCE = re.compile(r"(?<=[.!?]) ")


@final
@dataclass(frozen=True, kw_only=True)
class Passage:
    """tokens: a document under the model's template, then questions with their answers; num_document_tokens: up to its end."""

    tokens: list[int]
    num_document_tokens: int


def passages(lm: LanguageModel, text: str, *, seed: int, first: int, last: int) -> Iterator[Passage]:
    """The passages `first .. last - 1` of a sequence without end; each depends on the seed and its number alone.

    Raises PromptError if the text has fewer than 64 words, or no sentences of at least 12 words.
    """
    words = text.split()
    if len(words) < 64:
        raise PromptError(f"there must be at least 64 words of text to learn from; got {len(words)}.")
    if not any(len(sentence.split()) >= 12 for sentence in _SENTENCE.split(" ".join(words))):
        raise PromptError("the text to learn from must have sentences of at least 12 words, which can be asked about.")
    for number in range(first, last):
        rng = random.Random(f"{seed} {number}")
        tokens, quotable = _document(lm, words, rng)
        end = len(tokens)
        for sentence in rng.sample(quotable, min(QUOTES, len(quotable))):
            beginning, rest = sentence.split()[:6], sentence.split()[6:40]
            question = f'How does the sentence go on that begins with "{" ".join(beginning)}"?'
            tokens += lm.question_tokens(question) + lm.tokenize(lm.template.after)
            tokens += lm.tokenize(" ".join(rest), literal=True)
        if lm.loaded.max_positions is not None:
            tokens = tokens[: lm.loaded.max_positions]
        if len(tokens) > end:
            yield Passage(tokens=tokens, num_document_tokens=end)


def _document(lm: LanguageModel, words: list[str], rng: random.Random) -> tuple[list[int], list[str]]:
    """The tokens of a document, at most half of the model's positions, and its sentences that can be asked about."""
    room = lm.loaded.max_positions // 2 if lm.loaded.max_positions is not None else None
    for _ in range(TRIES):
        start = rng.randrange(max(1, len(words) - WORDS))
        document = " ".join(words[start : start + WORDS])
        tokens, _ = lm.prompt_tokens(document)
        if room is not None and len(tokens) > room:
            document = " ".join(document.split()[: WORDS * room // len(tokens) * 3 // 4])
            tokens, _ = lm.prompt_tokens(document)
        quotable = [s for s in _SENTENCE.split(document)[1:-1] if 12 <= len(s.split()) <= 60]
        quotable = quotable or [s for s in _SENTENCE.split(document) if len(s.split()) >= 12]
        if quotable:
            return tokens, quotable
    raise PromptError(f"{TRIES} pieces of the text had no sentence of 12 words to ask about; learn from other text.")
