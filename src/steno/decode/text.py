"""From tokens to text while they come: incomplete characters wait, and stop strings end the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from steno.decode.loop import Step

Detokenize = Callable[[Sequence[int]], str]


def with_text(
    steps: Iterable[Step], detokenize: Detokenize, *, end_tokens: frozenset[int], stop: Sequence[str] = ()
) -> Iterator[Step]:
    """Adds to each step the text it completes; ends before the first stop string.

    Text that may still become a stop string is held back until it is decided. A replacement character at the end is the
    sign of an incomplete one.
    """
    ids: list[int] = []
    shown = nfe = 0
    for step in steps:
        nfe = step.nfe
        ids += [t for t in step.token_ids if t not in end_tokens]
        text = detokenize(ids)
        ended = any(t in end_tokens for t in step.token_ids)
        found = min((i for i in (text.find(s) for s in stop) if i >= 0), default=-1)
        if found >= 0:
            yield replace(step, text=text[shown:found] if found > shown else "")
            return
        ready = len(text) if ended else _ready(text, stop)
        ready = max(ready, shown)
        yield replace(step, text=text[shown:ready])
        shown = ready
    # a limit on tokens may have come while text was held back
    rest = detokenize(ids)[shown:]
    if rest:
        yield Step(token_ids=(), text=rest, nfe=nfe)


def _ready(text: str, stop: Sequence[str]) -> int:
    """How much of `text` can be shown for good."""
    text = text.rstrip("\ufffd")
    held = 0
    for s in stop:
        for n in range(min(len(s) - 1, len(text)), held, -1):
            if text.endswith(s[:n]):
                held = n
                break
    return len(text) - held


def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """Tokens that end a sentence: whose text ends, quotes and brackets aside, in `. ! ? 。 ！ ？`, or holds a blank line."""
    ids = sorted(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids))
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    return frozenset(i for i, text in zip(ids, texts, strict=True) if _ends_sentence(text))


def _ends_sentence(text: str) -> bool:
    return "\n\n" in text or text.rstrip().rstrip("\"'”’»)]").endswith((".", "!", "?", "。", "！", "？"))
