"""Text that goes on: perplexity of 256 tokens after the context, and the drift from the full cache on each of them.

Tokens are forced through the loop that decodes, so the recipe takes part as it would there. The score is 1 / perplexity, the
geometric mean of the probability of the true token: between 0 and 1, more is better. `perplexity:FILE` takes the text
from a file instead of the Python language reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from steno.bench.tasks.files import read_text
from steno.bench.tasks.task import Draw, Instance, Room, largest
from steno.bench.tasks.text import paragraphs
from steno.errors import PromptError


@final
@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """A stretch of text: what is read, and what is predicted. continuation_tokens: how many are predicted."""

    id: str = "perplexity"
    title: str = "perplexity and drift on continuing text"
    continuation_tokens: int = 256
    lines: tuple[str, ...] | None = None
    takes_context: bool = True

    @classmethod
    def read(cls, name: str, path: Path) -> Perplexity:
        lines = tuple(line for line in read_text(path).split("\n") if line.strip())
        if not lines:
            raise PromptError(f"{path} is empty; give it some text to read.")
        return cls(id=name, lines=lines)

    def num_instances(self, samples: int) -> int:
        return samples

    def generate(self, draw: Draw, room: Room) -> Instance:
        lines, separator = (paragraphs(), "\n\n") if self.lines is None else (self.lines, "\n")
        words = [word for line in self._from(lines, draw, room) for word in (line + separator).split(" ")]
        frame = len(room.lm.tokenize(room.lm.template.before))
        limit = room.context_tokens - self.continuation_tokens - 1 - frame
        split = largest(
            lambda n: room.count(" ".join(words[: n + 1])) <= limit, len(words) - 1, room.context_tokens
        ) + 1  # fmt: skip
        rest = " " + " ".join(words[split : split + 2 * self.continuation_tokens])
        if room.count(rest) < self.continuation_tokens + 1 or room.count(" ".join(words[: split + 1])) <= limit:
            raise PromptError(
                f"{self.id} needs a text of more than {room.context_tokens} tokens; this one is shorter: give a shorter "
                "--context."
            )
        return Instance(
            context=" ".join(words[:split]), continuation=rest, continuation_tokens=self.continuation_tokens
        )

    def _from(self, lines: Sequence[str], draw: Draw, room: Room) -> Sequence[str]:
        """Lines enough for the context from a random place on; from the beginning if they would not be enough."""
        needed = 8 * room.context_tokens  # characters; few tokenizers read more of a token's text in the mean
        first = draw.rng.randrange(len(lines))
        for start in (first, 0):
            taken: list[str] = []
            size = 0
            for line in lines[start:]:
                taken.append(line)
                size += len(line)
                if size >= needed:
                    return taken
        return taken

    def score(self, output: str, answers: Sequence[str]) -> float:
        raise NotImplementedError("continuing text is scored by its probability, not by an answer")
