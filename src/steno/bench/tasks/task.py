"""What a task is: it draws instances from a seed and scores answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from steno.errors import PromptError
from steno.session import LanguageModel

PROBE = 64


@final
@dataclass(frozen=True, kw_only=True)
class Query:
    """A question about a context.

    answers: right ones; none where the full cache's own answer is the measure. answer_prefix: words that the answer begins
    with. max_new_tokens: longest answer.
    """

    question: str
    answers: tuple[str, ...]
    max_new_tokens: int
    answer_prefix: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class Instance:
    """A context, and questions about it or a continuation of it.

    continuation: text that follows the context; its first token is given, the next `continuation_tokens` are scored.
    depth: where the needle lies, 0 first, 1 last.
    """

    context: str
    queries: tuple[Query, ...] = ()
    continuation: str = ""
    continuation_tokens: int = 0
    depth: float | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Draw:
    """Which instance is drawn: `index` of `count`, with a generator of its own."""

    rng: random.Random
    index: int
    count: int

    @classmethod
    def of(cls, task_id: str, seed: int, context_tokens: int | None, index: int, count: int) -> Draw:
        return cls(rng=random.Random(f"{task_id} {seed} {context_tokens} {index}"), index=index, count=count)


class Room:
    """How much text fits `context_tokens` tokens of the model: template, document, question and answer together, as in RULER."""

    def __init__(self, lm: LanguageModel, context_tokens: int) -> None:
        self.lm, self.context_tokens = lm, context_tokens

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.lm.tokenize(text, literal=True))

    def for_document(self, queries: Sequence[Query]) -> int:
        """Tokens left for the document beside the longest question and its answer."""
        template = self.lm.template
        frame = len(self.lm.tokenize(template.before)) + len(self.lm.tokenize(template.between))
        turns = [
            self.count(q.question) + len(self.lm.tokenize(template.after + q.answer_prefix)) + q.max_new_tokens
            for q in queries
        ]
        return self.context_tokens - frame - max(turns, default=0)

    def fit(self, build: Callable[[int], str], queries: Sequence[Query], *, at_most: int | None = None) -> str:
        """The longest `build(n)` that fits, n from 0 up; `build` grows with n.

        Raises PromptError if not even `build(0)` fits.
        """
        limit = self.for_document(queries)
        # counting tokens is what takes time here, so the search begins close to its end: two steps of the secant
        first, guess = self.count(build(0)), min(PROBE, at_most or PROBE)
        for _ in range(2):
            slope = max(1e-3, (self.count(build(guess)) - first) / guess)
            guess = max(1, int((limit - first) / slope))
            guess = guess if at_most is None else min(guess, max(1, at_most))
        return build(largest(lambda n: self.count(build(n)) <= limit, at_most, self.context_tokens, guess))


def largest(fits: Callable[[int], bool], at_most: int | None, context_tokens: int, guess: int = 16) -> int:
    """The largest n >= 0 that fits, sought from a guess in growing steps, then by halving."""
    if not fits(0):
        raise PromptError(f"a context of {context_tokens} tokens is too short for this task; give a longer --context.")
    low, high, n, step = 0, at_most, guess, max(1, guess // 256)
    while high is None or low < high:
        n = max(low + 1, n if high is None else min(n, high))
        if fits(n):
            low, n = n, n + step
        else:
            high, n = n - 1, n - step
        step *= 2
        if high is not None and not low < n <= high:
            n = (low + high + 1) // 2
    return low


class Task(Protocol):
    """Generates instances and scores answers. A task is a frozen dataclass; its fields are all it knows.

    id: the name on the command line. title: in words, for reports. takes_context: whether its length is asked for with
    --context; False where it is what it is.
    """

    @property
    def id(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def takes_context(self) -> bool: ...

    def num_instances(self, samples: int) -> int:
        """How many instances a run with `samples` has; fewer where a file has fewer."""
        ...

    def generate(self, draw: Draw, room: Room) -> Instance:
        """The instance, the same for the same draw and tokenizer; at most `room.context_tokens` long if `takes_context`."""
        ...

    def score(self, output: str, answers: Sequence[str]) -> float:
        """How right an answer is, 0 to 1."""
        ...
