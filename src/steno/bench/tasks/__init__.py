"""The tables of tasks: listing one buys it the contract tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from steno.bench.tasks.common_words import CommonWords
from steno.bench.tasks.frequent_words import FrequentWords
from steno.bench.tasks.jsonl import JsonLines
from steno.bench.tasks.long_generation import LongGeneration
from steno.bench.tasks.longbench import LongBench
from steno.bench.tasks.niah import NeedleGrid
from steno.bench.tasks.perplexity import Perplexity
from steno.bench.tasks.questions import Questions
from steno.bench.tasks.ruler_needles import RULER_NEEDLES
from steno.bench.tasks.ruler_qa import RulerQA
from steno.bench.tasks.stress import Stress
from steno.bench.tasks.task import Task
from steno.bench.tasks.variable_tracking import VariableTracking
from steno.errors import BadArgument, nearest

_RULER: tuple[Task, ...] = (*RULER_NEEDLES, VariableTracking(), CommonWords(), FrequentWords())
_OWN: tuple[Task, ...] = (NeedleGrid(), Perplexity(), Questions(), LongGeneration(), Stress())
TASKS: Mapping[str, Task] = MappingProxyType({task.id: task for task in (*_OWN, *_RULER)})
"""Tasks that need nothing but a model."""

FILE_TASKS: Mapping[str, Callable[[str, Path], Task]] = MappingProxyType(
    {
        "jsonl": JsonLines.read,
        "longbench": LongBench.read,
        "perplexity": Perplexity.read,
        "qa_1": RulerQA.read_single,
        "qa_2": RulerQA.read_multi,
    }
)
"""Tasks over a user's file, `name:FILE`."""

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ruler": tuple(task.id for task in _RULER),
        "all": tuple(TASKS),
    }
)


def find_tasks(name: str) -> list[Task]:
    """The tasks of a name: one of `TASKS`, a group, or `kind:FILE`.

    Raises BadArgument for an unknown name, PromptError for a file that cannot be read.
    """
    kind, _, file = name.partition(":")
    if file:
        if kind not in FILE_TASKS:
            raise BadArgument(f"unknown task {name!r}: no task {kind!r} reads a file; {nearest(kind, FILE_TASKS)}")
        return [FILE_TASKS[kind](name, Path(file))]
    if name in GROUPS:
        return [TASKS[member] for member in GROUPS[name]]
    if name not in TASKS:
        if kind in FILE_TASKS:
            raise BadArgument(f"task {kind!r} reads a file: write `{kind}:FILE`.")
        raise BadArgument(f"unknown task {name!r}; {nearest(name, {*TASKS, *GROUPS, *FILE_TASKS})}")
    return [TASKS[name]]
