"""A document that was read, and what can be done with it: ask, follow, save, report."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, final

from steno.codec.cache import save_cache
from steno.codec.identity import HowRead, about_model
from steno.codec.lossy import Plan
from steno.codec.quality import LOSSLESS, LayerWeights, check_quality
from steno.decode.loop import Step, decode_steps, forced_steps
from steno.decode.sampler import GREEDY, Sampler, Sampling
from steno.decode.text import with_text
from steno.errors import PromptError
from steno.models.kvcache import KVCache
from steno.prompt import PromptedModel


@final
@dataclass(frozen=True, kw_only=True)
class ReadReport:
    """What reading a document cost. Bytes are measured on what is held; seconds are wall time."""

    model: str
    dtype: str
    recipe: str
    prompt_tokens: int
    held_tokens_mean: float
    kv_bytes_full: int
    kv_bytes: int
    kv_bytes_peak: int
    prefill_s: float
    compress_s: float
    note: str = ""
    kv_bytes_offloaded: int = 0
    stored_tokens: int = 0
    """Tokens that came from the store instead of being read."""

    def __str__(self) -> str:
        ratio = self.kv_bytes_full / self.kv_bytes if self.kv_bytes else float("nan")
        lines = [
            f"{self.prompt_tokens} tokens read by {self.model} in {self.prefill_s + self.compress_s:.2f} s with `{self.recipe}`",
            f"memory: {self.kv_bytes / 1e6:.2f} MB held, {self.kv_bytes_full / 1e6:.2f} MB full in {self.dtype} "
            f"({ratio:.1f} times), {self.kv_bytes_peak / 1e6:.2f} MB peak; {self.held_tokens_mean:.0f} tokens per head",
        ]
        if self.kv_bytes_offloaded:
            lines.append(f"beside: {self.kv_bytes_offloaded / 1e6:.2f} MB in a file, not in memory")
        if self.stored_tokens:
            lines.append(f"from the store: {self.stored_tokens} tokens")
        return "\n".join(lines + ([self.note] if self.note else []))


class Answer(Iterator[Step]):
    """The steps of one answer, and the fork of the cache that they grow; it is decoded while it is iterated."""

    def __init__(self, steps: Iterator[Step], cache: KVCache) -> None:
        self._steps, self.cache = steps, cache

    def __next__(self) -> Step:
        return next(self._steps)


class Context:
    """A document that was read, and its memory. Questions fork it; it never changes."""

    def __init__(
        self,
        lm: PromptedModel,
        cache: KVCache,
        tokens: list[int],
        *,
        how: HowRead,
        has_question: bool = False,
        prefill_s: float = 0.0,
        compress_s: float = 0.0,
        note: str = "",
        stored_tokens: int = 0,
    ) -> None:
        self.lm, self.cache, self.tokens, self.how, self.has_question = lm, cache, tokens, how, has_question
        self.prefill_s, self.compress_s, self.note, self.stored_tokens = prefill_s, compress_s, note, stored_tokens

    def report(self) -> ReadReport:
        """Tokens, bytes and seconds of the read."""
        held = [n for layer in self.cache.held_tokens() for row in layer for n in row]
        return ReadReport(
            model=self.lm.name,
            dtype=str(self.lm.model.dtype).removeprefix("torch."),
            recipe=str(self.cache.recipe),
            prompt_tokens=len(self.tokens),
            held_tokens_mean=sum(held) / len(held) if held else 0.0,
            kv_bytes_full=self.cache.kv_bytes_full,
            kv_bytes=self.cache.kv_bytes,
            kv_bytes_peak=self.cache.kv_bytes_peak,
            prefill_s=self.prefill_s,
            compress_s=self.compress_s,
            note=self.note,
            kv_bytes_offloaded=self.cache.kv_bytes_offloaded,
            stored_tokens=self.stored_tokens,
        )

    def save(self, path: str | Path, quality: str = LOSSLESS, *, refinements: int = 0) -> int:
        """Writes the context to a file that `LanguageModel.open` reads; the bytes of the file.

        quality: `lossless`, or a level from `q1`, the smallest file, to `q5`. At a level the file holds what the context holds
        in another form, and opens as a dense cache. refinements: in so many layers beside a coarse one, which can answer
        before the others are there; each makes it three times finer.
        The file appears whole or not at all, and only its owner can read it: it has the tokens of the document in it.
        Raises CacheError if it holds what a file cannot hold yet, BadArgument if there is no such level or the file cannot be
        written.
        """
        check_quality(quality, refinements)
        plan = None
        if quality != LOSSLESS:
            weights = LayerWeights.of(self.lm.loaded.model_hash)
            plan = Plan(quality=quality, refinements=refinements, weights=weights)
        return save_cache(Path(path).expanduser(), self.cache, self.tokens, self.about(quality), plan)

    def about(self, quality: str = LOSSLESS) -> dict[str, Any]:
        """What the header of a file says of the context."""
        read = {"has_question": self.has_question, "read": asdict(self.how)}
        return about_model(self.lm.loaded) | {"level": quality} | read

    def ask(
        self,
        question: str | None,
        *,
        max_new_tokens: int = 256,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        answer_prefix: str = "",
        keep_logprobs: bool = False,
    ) -> Answer:
        """Answers a question about the document, step by step. The context is forked: not re-read, not changed.

        question: None answers the one that was read with the document.
        answer_prefix: words that the answer begins with, put into the model's mouth.

        Raises
        ------
        PromptError
            If the question is empty, missing or there twice, or question and answer do not fit the model's positions.
        """
        new = self._turn(question, answer_prefix)
        return self.go_on(new, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, keep_logprobs=keep_logprobs)

    def go_on(
        self,
        given: Sequence[int],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        stop: Sequence[str] = (),
        keep_logprobs: bool = False,
    ) -> Answer:
        """Decodes after what was read and the `given` tokens, at least one, without a template. Errors as in `ask`."""
        if max_new_tokens < 1:
            raise PromptError(f"`max_new_tokens` must be >= 1; got max_new_tokens={max_new_tokens}.")
        if isinstance(stop, str) or not all(stop):
            raise PromptError(f"`stop` must be a list of strings, none of them empty; got stop={stop!r}.")
        lm = self.lm
        answer = self._decode(list(given), sampling.sampler(), max_new_tokens, lm.end_tokens, keep_logprobs)
        return Answer(with_text(answer, lm.detokenize, end_tokens=lm.end_tokens, stop=stop), answer.cache)

    def follow_answer(
        self,
        answer: Sequence[int],
        question: str | None,
        *,
        answer_prefix: str = "",
        passes: Iterable[int] = repeat(1),
    ) -> Answer:
        """Teacher forcing: the steps that decode just these tokens as the answer, with the log-probabilities behind each.

        passes: how many tokens each step takes. One, as decoding goes, lets eviction and page selection take part as they
        would there; where the recipe does neither (`Recipe.acts_at_each_step`) more are faster, and the newest tokens
        become pages a little later. Other arguments and errors as in `ask`.
        """
        return self._follow(self._turn(question, answer_prefix), answer, passes)

    def follow_text(self, continuation: Sequence[int], *, passes: Iterable[int] = repeat(1)) -> Answer:
        """Teacher forcing of text that goes on where the document ends; the first token is given, the others are steps.

        passes: as in `follow_answer`.
        Raises PromptError if there are fewer than two tokens, or they do not fit the model's positions.
        """
        if len(continuation) < 2:
            raise PromptError(
                f"a continuation needs at least 2 tokens, one given and one to predict; got {continuation}."
            )
        return self._follow(list(continuation[:1]), continuation[1:], passes)

    def _turn(self, question: str | None, answer_prefix: str) -> list[int]:
        """Tokens from the end of what was read to the first of the answer."""
        lm = self.lm
        if self.has_question and question is not None:
            raise PromptError(
                "this context was read with its question: ask(None) answers it; read anew to ask another."
            )
        if question is None and not self.has_question:
            raise PromptError("there is no question: give one, or read the document with `question=…`.")
        asked = [] if question is None else lm.question_tokens(question)
        return asked + lm.tokenize(lm.template.after + answer_prefix)

    def _follow(self, new: list[int], tokens: Sequence[int], passes: Iterable[int]) -> Answer:
        cache = self._fork(len(new), len(tokens))
        steps = forced_steps(
            self.lm.model, cache, new, tokens, passes=passes, announce=lambda ids: cache.announce([ids])
        )
        return Answer(steps, cache)

    def _fork(self, num_new: int, max_new_tokens: int) -> KVCache:
        """A cache to go on with; raises PromptError if that does not fit the model's positions."""
        self.lm.check_length(len(self.tokens) + num_new, max_new_tokens)
        return self.cache.fork()

    def _decode(
        self, new: list[int], sampler: Sampler, max_new_tokens: int, end_tokens: frozenset[int], keep_logprobs: bool
    ) -> Answer:
        cache = self._fork(len(new), max_new_tokens)
        steps = decode_steps(
            self.lm.model,
            cache,
            new,
            history=self.tokens,
            sampler=sampler,
            max_new_tokens=max_new_tokens,
            end_tokens=end_tokens,
            keep_logprobs=keep_logprobs,
            announce=lambda ids: cache.announce([ids]),
        )
        return Answer(steps, cache)
