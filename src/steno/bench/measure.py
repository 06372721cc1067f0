"""One recipe on one instance: what it answers, how far it drifts from the full cache, what it holds and how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Protocol, final

import torch
from torch import Tensor

from steno.bench.tasks.task import Instance, Query, Task
from steno.context import Answer, Context, ReadReport
from steno.errors import BadArgument
from steno.session import LanguageModel

TIMED_STEPS, FORCED_AT_ONCE = 16, 8
"""Forced tokens that come one by one, as in decoding, and how many come at once after them."""


@final
@dataclass(frozen=True, kw_only=True)
class Trace:
    """What the full cache said at each token of an answer or a continuation.

    token_ids: `[n]`; choices: `[n]`, the likeliest token at each; logprobs: `[n, V]` in fp16, rounded by at most 0.05 %, so that
    hundreds of them fit in memory.
    """

    token_ids: tuple[int, ...]
    choices: Tensor
    logprobs: Tensor

    @classmethod
    def of(cls, steps: Spoken) -> Trace:
        return cls(token_ids=tuple(steps.token_ids), choices=steps.logprobs.argmax(-1), logprobs=steps.logprobs.half())


@final
@dataclass(frozen=True, kw_only=True)
class Reference:
    """The full cache on one instance: its score and a trace for each query, or one for the continuation."""

    score: float
    traces: tuple[Trace, ...]


@final
@dataclass(kw_only=True)
class Measurement:
    """One recipe on one instance. kls, agreed: per token; ttft_s per query, step_s per later token; refused: why, if it was."""

    score: float
    depth: float | None
    kls: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)
    nats: list[float] = field(default_factory=list)  # of the true tokens of a continuation
    reports: list[ReadReport] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)
    new_tokens: int = 0
    kv_bytes_end: int = 0
    kv_bytes_peak: int = 0
    refused: str = ""


@final
@dataclass(kw_only=True)
class Spoken:
    """The steps of one answer, gathered. ttft_s: to the first token; step_s: each later one. logprobs `[n, V]` fp32.

    A step of several tokens, which only forcing takes, has no time of a token. kv_bytes: held after the last step;
    kv_bytes_peak: the most until then.
    """

    text: str
    token_ids: list[int]
    logprobs: Tensor
    ttft_s: float | None
    step_s: list[float]
    kv_bytes: int
    kv_bytes_peak: int

    @classmethod
    def of(cls, answer: Answer) -> Spoken:
        text, ids, logprobs, seconds = "", list[int](), list[Tensor](), list[float | None]()
        last = time.perf_counter()
        for step in answer:
            text += step.text
            if step.logprobs is not None:
                now = time.perf_counter()
                seconds.append(now - last if len(step.token_ids) == 1 else None)
                last = now
                ids += step.token_ids
                logprobs.append(step.logprobs)
        return cls(
            text=text,
            token_ids=ids,
            logprobs=torch.cat(logprobs),
            ttft_s=seconds[0],
            step_s=[s for s in seconds[1:] if s is not None],
            kv_bytes=answer.cache.kv_bytes,
            kv_bytes_peak=answer.cache.kv_bytes_peak,
        )


def forced_passes(*, timed: bool) -> Iterator[int]:
    """How many forced tokens each pass takes: several at once; first single ones where they are to be timed."""
    return chain(repeat(1, TIMED_STEPS if timed else 0), repeat(FORCED_AT_ONCE))


class Reading(Protocol):
    """A document that was read, by us or by a peer; as `Context`, but an answer comes as a whole."""

    def report(self) -> ReadReport: ...
    def ask(self, question: str | None, *, max_new_tokens: int, answer_prefix: str) -> Spoken: ...
    def follow_answer(self, answer: Sequence[int], question: str | None, *, answer_prefix: str) -> Spoken: ...
    def follow_text(self, continuation: Sequence[int]) -> Spoken: ...


Read = Callable[[str, str | None], Reading]
"""Reads a document, and a question with it where it is not None."""


@final
@dataclass(frozen=True, kw_only=True)
class OwnReading:
    """A document that we read."""

    context: Context

    def report(self) -> ReadReport:
        return self.context.report()

    def ask(self, question: str | None, *, max_new_tokens: int, answer_prefix: str) -> Spoken:
        answer = self.context.ask(
            question, max_new_tokens=max_new_tokens, answer_prefix=answer_prefix, keep_logprobs=True
        )
        return Spoken.of(answer)

    def follow_answer(self, answer: Sequence[int], question: str | None, *, answer_prefix: str) -> Spoken:
        passes = self._passes(timed=False)
        return Spoken.of(self.context.follow_answer(answer, question, answer_prefix=answer_prefix, passes=passes))

    def follow_text(self, continuation: Sequence[int]) -> Spoken:
        return Spoken.of(self.context.follow_text(continuation, passes=self._passes(timed=True)))

    def _passes(self, *, timed: bool) -> Iterator[int]:
        return repeat(1) if self.context.cache.recipe.acts_at_each_step else forced_passes(timed=timed)


def own(lm: LanguageModel, recipe: str) -> Read:
    """How we read under a recipe."""
    return lambda document, question: OwnReading(context=lm.read(document, recipe, question=question))


def measure(
    lm: LanguageModel, task: Task, instance: Instance, read: Read, protocol: str, reference: Reference | None
) -> tuple[Measurement, Reference]:
    """Measures a way to read on one instance; also what it said, which is the reference of others where nothing is lost.

    reference: None for the full cache itself. A recipe that refuses an instance of no given length scores 0 on it.
    """
    result = Measurement(score=0.0, depth=instance.depth)
    traces: list[Trace] = []
    scores: list[float] = []
    try:
        if instance.continuation:
            scores.append(_follow(lm, instance, read, reference, result, traces))
        reading = None
        for i, query in enumerate(instance.queries):
            seen = query.question if protocol == "seen" else None
            if reading is None or seen is not None:
                reading = read(instance.context, seen)
                result.reports.append(reading.report())
            trace = reference.traces[i] if reference is not None else None
            scores.append(_ask(reading, task, query, seen is not None, trace, result, traces))
    except BadArgument as error:
        if task.takes_context:
            raise
        result.refused = str(error)
        scores = [0.0]
    result.score = sum(scores) / len(scores)
    return result, Reference(score=result.score, traces=tuple(traces))


def _ask(
    reading: Reading,
    task: Task,
    query: Query,
    is_seen: bool,
    trace: Trace | None,
    result: Measurement,
    traces: list[Trace],
) -> float:
    """One question: the recipe's own answer, scored; then, where it differs, the full cache's answer forced."""
    question, prefix = None if is_seen else query.question, query.answer_prefix
    spoken = reading.ask(question, max_new_tokens=query.max_new_tokens, answer_prefix=prefix)
    _note(spoken, result)
    traces.append(Trace.of(spoken))
    agreement = 1.0
    if trace is not None:
        logprobs = spoken.logprobs
        if tuple(spoken.token_ids) != trace.token_ids:
            logprobs = reading.follow_answer(trace.token_ids, question, answer_prefix=prefix).logprobs
        agreement = _compare(trace, logprobs, result)
    return task.score(spoken.text, query.answers) if query.answers else agreement


def _follow(
    lm: LanguageModel,
    instance: Instance,
    read: Read,
    reference: Reference | None,
    result: Measurement,
    traces: list[Trace],
) -> float:
    """The continuation, forced: the geometric mean of the true tokens' probabilities."""
    reading = read(instance.context, None)
    result.reports.append(reading.report())
    continuation = lm.tokenize(instance.continuation, literal=True)
    spoken = reading.follow_text(continuation[: instance.continuation_tokens + 1])
    _note(spoken, result)
    traces.append(Trace.of(spoken))
    if reference is not None:
        _compare(reference.traces[0], spoken.logprobs, result)
    nats = -spoken.logprobs.gather(1, torch.tensor(spoken.token_ids, device=spoken.logprobs.device)[:, None])[:, 0]
    result.nats += nats.tolist()
    return float(torch.exp(-nats.double().mean()))


def _note(spoken: Spoken, result: Measurement) -> None:
    """Time and memory of an answer that was just decoded."""
    assert spoken.ttft_s is not None, "the first token comes alone where it is timed"
    result.ttft_s.append(spoken.ttft_s)
    result.step_s += spoken.step_s
    result.new_tokens += len(spoken.token_ids)
    result.kv_bytes_end = max(result.kv_bytes_end, spoken.kv_bytes)
    result.kv_bytes_peak = max(result.kv_bytes_peak, spoken.kv_bytes_peak)


def _compare(trace: Trace, logprobs: Tensor, result: Measurement) -> float:
    """Adds KL and agreement per token; returns the share of tokens whose likeliest choice is the same."""
    full = trace.logprobs.float().log_softmax(-1)  # again a distribution after rounding
    kls = (full.exp() * (full - logprobs)).sum(-1).clamp_min(0)  # [n]
    agreed = trace.choices == logprobs.argmax(-1)
    result.kls += kls.tolist()
    result.agreed += agreed.tolist()
    return float(agreed.double().mean())
