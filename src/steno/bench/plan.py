"""What a run measures, checked before anything is measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import final

from steno.bench.peers import PeerMethod
from steno.bench.tasks import find_tasks
from steno.bench.tasks.task import Draw, Instance, Room, Task
from steno.errors import BadArgument, PromptError
from steno.recipe import parse_recipe
from steno.session import LanguageModel, check_budget

PROTOCOLS = ("unseen", "seen")
FULL = "full"


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """One task at one length under one protocol: all recipes of it meet the same instances.

    context_tokens: None where the task's prompts have the length they have. protocol: `unseen` or `seen`, whether compression
    sees the question; `none` where there is none. prompt_tokens: of each instance's document.
    """

    task: Task
    context_tokens: int | None
    protocol: str
    recipes: tuple[str, ...]
    instances: tuple[Instance, ...]
    prompt_tokens: tuple[int, ...]

    @property
    def row_context_tokens(self) -> int:
        """The length that rows show: the given one, else that of the longest prompt."""
        return max(self.prompt_tokens) if self.context_tokens is None else self.context_tokens

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the generated instances."""
        text = json.dumps([asdict(instance) for instance in self.instances], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan_groups(
    lm: LanguageModel,
    *,
    recipes: Sequence[str],
    peers: Sequence[str] = (),
    tasks: Sequence[str],
    contexts: Sequence[int],
    protocols: Sequence[str],
    samples: int,
    seed: int,
) -> list[Group]:
    """All groups of a run, in order, each once.

    Raises
    ------
    BadArgument
        For an unknown task, recipe or peer, a budget that cannot hold, a file that cannot be read, or a length that the model
        or the task cannot have.
    """
    if samples < 1:
        raise BadArgument(f"`samples` must be >= 1; got samples={samples}.")
    names = tuple(dict.fromkeys(str(parse_recipe(text)) for text in recipes))
    others = tuple(dict.fromkeys(PeerMethod.parse(text).recipe for text in peers))
    found = list({task.id: task for name in tasks for task in find_tasks(name)}.values())
    groups = []
    for task in found:
        for context in dict.fromkeys(contexts) if task.takes_context else (None,):
            if context is not None:
                check_context(lm, context)
            instances = generate(lm, task, context, samples, seed)
            lengths = tuple(prompt_tokens(lm, instance) for instance in instances)
            if not task.takes_context:
                _check_lengths(lm, task, lengths)
            else:
                for name in names:
                    check_budget(parse_recipe(name), min(lengths))
            asks = any(instance.queries for instance in instances)
            for protocol in dict.fromkeys(protocols) if asks else ("none",):
                groups.append(
                    Group(
                        task=task,
                        context_tokens=context,
                        protocol=protocol,
                        recipes=names + others,
                        instances=instances,
                        prompt_tokens=lengths,
                    )
                )
    return groups


def generate(
    lm: LanguageModel, task: Task, context_tokens: int | None, samples: int, seed: int
) -> tuple[Instance, ...]:
    """The instances of a task; the same for the same model, length, number and seed."""
    count = task.num_instances(samples)
    room = Room(lm, context_tokens or 0)
    return tuple(task.generate(Draw.of(task.id, seed, context_tokens, i, count), room) for i in range(count))


def prompt_tokens(lm: LanguageModel, instance: Instance) -> int:
    """Tokens of an instance's document with what stands before it."""
    return len(lm.prompt_tokens(instance.context)[0])


def check_context(lm: LanguageModel, context_tokens: int) -> None:
    """Raises PromptError for a length that the model does not have."""
    positions = lm.loaded.max_positions
    if context_tokens < 1:
        raise PromptError(f"--context must be >= 1 token; got {context_tokens}.")
    if positions is not None and context_tokens > positions:
        raise PromptError(
            f"a context of {context_tokens} tokens is longer than {lm.name}, which has {positions} positions; give a "
            "shorter --context or another --model."
        )


def _check_lengths(lm: LanguageModel, task: Task, lengths: Sequence[int]) -> None:
    positions = lm.loaded.max_positions
    for number, length in enumerate(lengths, start=1):
        if positions is not None and length >= positions:
            raise PromptError(
                f"{task.id}: prompt {number} has {length} tokens, but {lm.name} has {positions} positions; shorten it or "
                "give another --model."
            )
