"""A file in LongBench's format: JSONL of `input`, `context`, `answers`, `dataset`, `all_classes`; each dataset has its measure.

Source: Bai et al. 2023, "LongBench", https://arxiv.org/abs/2308.14508, and its published answer lengths.
Differs: the context stands alone and `input` is the question, without the instructions of each dataset; Chinese is
compared by character instead of by jieba's words; code by difflib's ratio instead of fuzzywuzzy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import final

from steno.bench.tasks.files import answers_field, json_lines, text_field
from steno.bench.tasks.scoring import code_similarity, f1, first_number, match_any, rouge_l
from steno.bench.tasks.task import Draw, Instance, Query, Room
from steno.errors import PromptError, nearest

Measure = Callable[[str, Sequence[str]], float]


def _first_line(measure: Measure) -> Measure:
    """The measure of the first line alone, as LongBench does for few-shot datasets."""
    return lambda output, answers: measure(output.lstrip("\n").split("\n")[0], answers)


DATASETS: Mapping[str, tuple[Measure, int]] = MappingProxyType({
    "narrativeqa": (f1, 128), "qasper": (f1, 128), "multifieldqa_en": (f1, 64), "multifieldqa_zh": (f1, 64),
    "hotpotqa": (f1, 32), "2wikimqa": (f1, 32), "musique": (f1, 32), "dureader": (rouge_l, 128),
    "gov_report": (rouge_l, 512), "qmsum": (rouge_l, 512), "multi_news": (rouge_l, 512), "vcsum": (rouge_l, 512),
    "trec": (_first_line(match_any), 64), "triviaqa": (_first_line(f1), 32), "samsum": (_first_line(rouge_l), 128),
    "lsht": (_first_line(match_any), 64), "passage_count": (first_number, 32), "passage_retrieval_en": (first_number, 32),
    "passage_retrieval_zh": (first_number, 32), "lcc": (code_similarity, 64), "repobench-p": (code_similarity, 64),
})  # fmt: skip
"""Measure and longest answer in tokens, as published."""
NO_INPUT = "Write a summary of the text above."


@final
@dataclass(frozen=True, kw_only=True)
class LongBench:
    """Instances of one dataset of LongBench."""

    id: str
    dataset: str
    instances: tuple[Instance, ...]
    takes_context: bool = False

    @property
    def title(self) -> str:
        return f"LongBench: {self.dataset}"

    @classmethod
    def read(cls, name: str, path: Path) -> LongBench:
        """The task of a file; raises PromptError with file and line if a line is broken, or names another dataset."""
        dataset, found = "", []
        for number, row in json_lines(path):
            here = text_field(path, number, row, "dataset").removesuffix("_e")
            if here not in DATASETS:
                raise PromptError(f"{path}, line {number}: unknown dataset {here!r}; {nearest(here, DATASETS)}")
            if dataset and here != dataset:
                raise PromptError(
                    f"{path}, line {number}: the file has {dataset!r} and {here!r}; give one file for each."
                )
            dataset = here
            query = Query(
                question=text_field(path, number, row, "input", empty=True).strip() or NO_INPUT,
                answers=answers_field(path, number, row),
                max_new_tokens=DATASETS[here][1],
            )
            if not query.answers:
                raise PromptError(f"{path}, line {number}: `answers` is empty; LongBench scores against answers.")
            found.append(Instance(context=text_field(path, number, row, "context"), queries=(query,)))
        if not found:
            raise PromptError(f"{path} has no lines; give a file of LongBench.")
        return cls(id=name, dataset=dataset, instances=tuple(found))

    def num_instances(self, samples: int) -> int:
        return min(samples, len(self.instances))

    def generate(self, draw: Draw, room: Room) -> Instance:
        return self.instances[draw.index]

    def score(self, output: str, answers: Sequence[str]) -> float:
        return DATASETS[self.dataset][0](output, answers)
