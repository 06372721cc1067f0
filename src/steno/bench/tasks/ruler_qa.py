"""RULER's question answering over a local file in SQuAD's format: qa_1 hides the paragraph of the question among others,
qa_2 all paragraphs of its article (HotpotQA, one article a question).

Source: Hsieh et al. 2024, https://arxiv.org/abs/2404.06654, section 3; SQuAD: Rajpurkar et al. 2018.
Differs: a file that is too small for the context is not repeated; the documents are then all there are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from steno.bench.tasks.files import read_text
from steno.bench.tasks.scoring import match_any
from steno.bench.tasks.task import Draw, Instance, Query, Room
from steno.errors import PromptError

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


@final
@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, its answers, and which documents hold them."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]


@final
@dataclass(frozen=True, kw_only=True)
class RulerQA:
    """Questions over documents. With several hops all documents of the question's article are there."""

    id: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]
    several_hops: bool
    takes_context: bool = True

    @property
    def title(self) -> str:
        return f"RULER: {'multi' if self.several_hops else 'single'}-hop question answering"

    @classmethod
    def read_single(cls, name: str, path: Path) -> RulerQA:
        return cls._read(name, path, several_hops=False)

    @classmethod
    def read_multi(cls, name: str, path: Path) -> RulerQA:
        return cls._read(name, path, several_hops=True)

    @classmethod
    def _read(cls, name: str, path: Path, *, several_hops: bool) -> RulerQA:
        try:
            articles = json.loads(read_text(path))["data"]
            documents: dict[str, int] = {}
            questions = []
            for article in articles:
                whole = [documents.setdefault(p["context"], len(documents)) for p in article["paragraphs"]]
                for place, paragraph in zip(whole, article["paragraphs"], strict=True):
                    wanted = tuple(dict.fromkeys(whole)) if several_hops else (place,)
                    questions += [q for row in paragraph["qas"] if (q := _question(row, wanted)) is not None]
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise PromptError(f"{path} is not in SQuAD's format: {type(error).__name__}: {error}.") from None
        if not questions:
            raise PromptError(f"{path} has no question with an answer.")
        return cls(id=name, documents=tuple(documents), questions=tuple(questions), several_hops=several_hops)

    def num_instances(self, samples: int) -> int:
        return min(samples, len(self.questions))

    def generate(self, draw: Draw, room: Room) -> Instance:
        # evenly over the file, so that few samples still see many articles
        question = self.questions[draw.index * len(self.questions) // draw.count]
        others = [i for i in range(len(self.documents)) if i not in question.documents]
        draw.rng.shuffle(others)
        places = [draw.rng.random() for _ in self.documents]
        query = Query(
            question=f"{INSTRUCTION}\n\nQuestion: {question.text}",
            answers=question.answers,
            answer_prefix=" Answer:",
            max_new_tokens=32,
        )

        def build(n: int) -> str:
            shown = sorted([*question.documents, *others[:n]], key=lambda i: places[i])
            listed = "\n\n".join(f"Document {i}:\n{self.documents[d]}" for i, d in enumerate(shown, start=1))
            return f"{INSTRUCTION}\n\nThe following are given documents.\n\n{listed}"

        return Instance(context=room.fit(build, [query], at_most=len(others)), queries=(query,))

    def score(self, output: str, answers: Sequence[str]) -> float:
        return match_any(output, answers)


def _question(row: Any, documents: tuple[int, ...]) -> Question | None:
    """A question of SQuAD; None if it has no answer in the text."""
    answers = tuple(dict.fromkeys(str(a["text"]) for a in row.get("answers", ()) if a["text"]))
    if not answers or row.get("is_impossible", False):
        return None
    return Question(text=str(row["question"]), answers=answers, documents=documents)
