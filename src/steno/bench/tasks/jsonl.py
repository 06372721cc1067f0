"""The user's own prompts: a JSONL file of `{"context", "question", "answers"}`.

An answer is right if any of `answers` stands in it, case ignored; where `answers` is empty, the measure is how far the
answer's tokens agree with the full cache's. `max_new_tokens` and `answer_prefix` may be given per line.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from steno.bench.tasks.files import answers_field, json_lines, text_field
from steno.bench.tasks.scoring import match_any
from steno.bench.tasks.task import Draw, Instance, Query, Room
from steno.errors import PromptError

DEFAULT_NEW_TOKENS = 64


@final
@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Contexts with questions from a file."""

    id: str
    instances: tuple[Instance, ...]
    title: str = "the user's own prompts"
    takes_context: bool = False

    @classmethod
    def read(cls, name: str, path: Path) -> JsonLines:
        """The task of a file; raises PromptError with file and line if a line is broken."""
        found = []
        for number, row in json_lines(path):
            room = row.get("max_new_tokens", DEFAULT_NEW_TOKENS)
            if not isinstance(room, int) or isinstance(room, bool) or room < 1:
                raise PromptError(f"{path}, line {number}: `max_new_tokens` must be a whole number >= 1; got {room!r}.")
            query = Query(
                question=text_field(path, number, row, "question"),
                answers=answers_field(path, number, row),
                max_new_tokens=room,
                answer_prefix=text_field(path, number, {"answer_prefix": "", **row}, "answer_prefix", empty=True),
            )
            found.append(Instance(context=text_field(path, number, row, "context"), queries=(query,)))
        if not found:
            raise PromptError(f"{path} has no lines; give some prompts.")
        return cls(id=name, instances=tuple(found))

    def num_instances(self, samples: int) -> int:
        return min(samples, len(self.instances))

    def generate(self, draw: Draw, room: Room) -> Instance:
        return self.instances[draw.index]

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_any(output, answers)
