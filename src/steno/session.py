"""What a user touches: load a model, read a document into a compressed cache, ask as often as you like."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import repeat
from pathlib import Path
from typing import Any, final

import torch

from steno.codec.arrays import CHUNK_TOKENS
from steno.codec.cache import read_tokens, restore_cache, save_cache
from steno.codec.container import SavedFile
from steno.codec.identity import HowRead, about_model, check_model, how_read, recipe_of
from steno.codec.lossy import Plan
from steno.codec.quality import LOSSLESS, LayerWeights, check_quality
from steno.decode.loop import Step, decode_steps, forced_steps
from steno.decode.sampler import GREEDY, Sampler, Sampling
from steno.decode.text import sentence_ends, with_text
from steno.errors import BadArgument, DamagedChunk, PromptError, RecipeError, StenoWarning
from steno.methods import KVzip
from steno.models.default import DEFAULT_MODEL
from steno.models.host import NAME
from steno.models.kvcache import KVCache
from steno.models.load import LoadedModel, load_model
from steno.pipeline import RecipePolicy
from steno.prompt import Template
from steno.recipe import Recipe, as_recipe
from steno.replay import over_all_passes, replay_context
from steno.store.shelf import Shelf, can_begin
from steno.store.store import Store, as_store
from steno.types import Need

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""


def load(
    source: str | Path = DEFAULT_MODEL, *, store: Store | str | Path | None = None, **options: Any
) -> LanguageModel:
    """Loads the embedded default, a Hugging Face id, a local folder or a GGUF file; options as in `load_model`.

    store: where reads begin with what earlier ones left, and leave what they compute; a folder or URL, or a `Store`.
    """
    return LanguageModel(load_model(source, **options), as_store(store))


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


class LanguageModel:
    """A model under steno's attention, its tokenizer, how it is prompted, and where what it reads is kept."""

    def __init__(self, loaded: LoadedModel, store: Store | None = None) -> None:
        self.loaded, self.store = loaded, store
        self.model, self.tokenizer, self.name = loaded.model, loaded.tokenizer, loaded.name
        self.model.set_attn_implementation(NAME)
        self.template = Template.of(self.tokenizer)

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        ids = [self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id]
        flat = [i for x in ids for i in (x if isinstance(x, list) else [x])]
        return frozenset(i for i in flat if i is not None)

    @cached_property
    def sentence_ends(self) -> frozenset[int]:
        """Tokens that end a sentence."""
        return sentence_ends(self.tokenizer)

    def tokenize(self, text: str, *, literal: bool = False) -> list[int]:
        """Token ids of text, none added; special tokens in it are recognised, or plain text if `literal`."""
        # verbose=False: a text longer than the model gets our own error, not a warning before it
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=literal, verbose=False))

    def prompt_tokens(self, document: str) -> tuple[list[int], int]:
        """Tokens of the prompt up to the end of the document, and how many stand before the document.

        The document is tokenized apart, so that it cannot contain the template's control tokens by accident.
        """
        prefix = self.tokenize(self.template.before)
        return prefix + self.tokenize(document, literal=True), len(prefix)

    def question_tokens(self, question: str) -> list[int]:
        """Tokens from the end of the document to the end of a question about it."""
        if not question.strip():
            raise PromptError("the question is empty.")
        return self.tokenize(self.template.between) + self.tokenize(question, literal=True)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def read(
        self,
        text: str,
        recipe: Recipe | str | None = None,
        *,
        question: str | None = None,
        reserve_tokens: int = 0,
        chunk_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Context:
        """Reads a document into a cache under `recipe`.

        Parameters
        ----------
        text : str
            The document; questions about it come later, and compression does not see them.
        recipe : Recipe, str or None
            E.g. `"shorthand @ 43%"` or `"snapkv | adakv | int4 @ 40%"`; None keeps everything.
        question : str or None
            A question that is read with the document, so that compression sees it; `ask(None)` answers it.
        reserve_tokens : int
            Positions to leave free for questions and answers.
        chunk_tokens : int or None
            Read so many tokens at a time. A method of `steno.methods.READERS` then evicts after each chunk, so that no
            layer ever holds more than the budget and one chunk; any other recipe gives what one piece would give.
        progress : callable or None
            Called while the document is read.

        Raises
        ------
        PromptError
            If the document or the question is empty, or they are longer than the model's positions.
        RecipeError
            If the recipe cannot be parsed, or its budget cannot hold.
        BadArgument
            If `chunk_tokens` is below 1.
        """
        parsed = as_recipe(recipe)
        if not text.strip():
            raise PromptError("the document is empty; give it some text to read.")
        tokens, num_prefix = self.prompt_tokens(text)
        if question is not None:
            tokens += self.question_tokens(question)
        self.check_length(len(tokens), reserve_tokens)
        how = self.how(parsed, num_prefix, chunk_tokens)
        return self._read(tokens, how, parsed, progress, has_question=question is not None)

    def read_tokens(
        self,
        tokens: Sequence[int],
        recipe: Recipe | str | None = None,
        *,
        num_prefix_tokens: int = 0,
        chunk_tokens: int | None = None,
        progress: Progress | None = None,
    ) -> Context:
        """Reads tokens as they are, without a template; the first `num_prefix_tokens` are always kept by a replay.

        `chunk_tokens` as in `read`. Raises PromptError if there are none or too many, RecipeError as `read` does.
        """
        if not tokens:
            raise PromptError("there are no tokens to read.")
        self.check_length(len(tokens), 0)
        parsed = as_recipe(recipe)
        how = self.how(parsed, num_prefix_tokens, chunk_tokens)
        return self._read(list(tokens), how, parsed, progress, has_question=False)

    def open(self, path: str | Path, *, refinements: int | None = None, recompute: bool = True) -> Context:
        """A context that `Context.save` wrote. Without loss it answers token by token what the saved one would have.

        refinements: of a file that has some, how many are read; None: all. 0 opens the coarse layer alone, for which it is
        enough that the file is there up to its end.

        recompute: where keys and values are cut or changed, read the tokens again, as they were read then, with a notice.

        Raises
        ------
        BadArgument
            If there is no such file, or this model is not the one that read the context.
        DamagedFile
            If the header or the tokens are cut or changed, or the file is no saved context; without `recompute`, if
            anything is.
        """
        file = SavedFile(Path(path).expanduser())
        check_model(file, self.loaded)
        tokens = read_tokens(file)
        self.check_length(len(tokens), 0)
        try:
            return self._restored(file, tokens, refinements=refinements)
        except DamagedChunk as error:
            if not recompute:
                raise
            warnings.warn(f"{error} Its {len(tokens)} tokens are read again.", StenoWarning, stacklevel=2)
            how, has_question = how_read(file, len(tokens)), file.header.get("has_question") is True
            return self._read(tokens, how, recipe_of(file), None, has_question=has_question)

    def _restored(
        self, file: SavedFile, tokens: list[int], *, stored_tokens: int = 0, refinements: int | None = None
    ) -> Context:
        recipe = recipe_of(file)
        ends = self.sentence_ends if Need.TOKEN_TEXT in recipe.needs else None
        cache = KVCache(self.model.config, recipe, model_hash=self.loaded.model_hash, sentence_ends=ends)
        cache.announce([tokens])
        restore_cache(
            file,
            cache,
            num_tokens=len(tokens),
            device=self.model.device,
            dtype=self.model.dtype,
            refinements=refinements,
        )
        how, has_question = how_read(file, len(tokens)), file.header.get("has_question") is True
        return Context(self, cache, tokens, how=how, has_question=has_question, stored_tokens=stored_tokens)

    def how(self, recipe: Recipe, prefix_tokens: int, chunk_tokens: int | None) -> HowRead:
        """How tokens are read under a recipe; arguments as in `HowRead`."""
        how = HowRead(prefix_tokens=prefix_tokens, chunk_tokens=chunk_tokens)
        if self.store is None or not can_begin(recipe, how):
            return how
        return replace(
            how, pass_tokens=CHUNK_TOKENS
        )  # whatever is stored already, the same passes give the same numbers

    def shelf_of(self, text: str, recipe: Recipe | str | None = None) -> Shelf | None:
        """What the store holds of a document under a recipe; None without a store."""
        parsed, (tokens, num_prefix) = as_recipe(recipe), self.prompt_tokens(text)
        return self._shelf(tokens, self.how(parsed, num_prefix, None), parsed, has_question=False)

    def _shelf(self, tokens: list[int], how: HowRead, recipe: Recipe, *, has_question: bool) -> Shelf | None:
        if self.store is None:
            return None
        return Shelf(self.store, self.loaded, recipe, tokens, how, has_question=has_question)

    def _read(
        self, tokens: list[int], how: HowRead, recipe: Recipe, progress: Progress | None, *, has_question: bool
    ) -> Context:
        if how.chunk_tokens is not None and how.chunk_tokens < 1:
            raise BadArgument(f"`chunk_tokens` must be >= 1; got chunk_tokens={how.chunk_tokens}.")
        note = check_budget(recipe, len(tokens))
        shelf = self._shelf(tokens, how, recipe, has_question=has_question)
        stored = shelf.open(lambda file: self._restored(file, tokens, stored_tokens=len(tokens))) if shelf else None
        if stored is not None:
            return stored
        ends = self.sentence_ends if Need.TOKEN_TEXT in recipe.needs else None
        evicts = how.chunk_tokens is not None and recipe.reader is not None
        cache = KVCache(
            self.model.config,
            recipe,
            prompt_tokens=len(tokens),
            evict_while_reading=evicts,
            model_hash=self.loaded.model_hash,
            sentence_ends=ends,
            input_ids=torch.tensor([tokens], device=self.model.device),
        )
        started = time.perf_counter()
        stored_tokens = self._prefill(cache, tokens, how.num_pass_tokens(len(tokens)), progress, shelf)
        prefilled = time.perf_counter()
        if Need.REPLAY in recipe.needs:
            self._replay(cache, tokens, how.prefix_tokens, recipe, progress)
        done = time.perf_counter()
        context = Context(
            self,
            cache,
            tokens,
            how=how,
            has_question=has_question,
            prefill_s=prefilled - started,
            compress_s=done - prefilled,
            note=note,
            stored_tokens=stored_tokens,
        )
        if shelf is not None:
            shelf.keep_context(cache, context.about())
        return context

    def check_length(self, num_tokens: int, reserve_tokens: int) -> None:
        """Raises PromptError if that many tokens and the reserve do not fit the model's positions."""
        positions = self.loaded.max_positions
        if positions is not None and num_tokens + reserve_tokens > positions:
            over = num_tokens + reserve_tokens - positions
            raise PromptError(
                f"the prompt has {num_tokens} tokens and {reserve_tokens} are kept for question and answer, {over} more than "
                f"the {positions} positions of {self.name}: shorten the document by about {over} tokens "
                f"({100 * over / num_tokens:.0f}%) or use a model with a longer context."
            )

    def _prefill(
        self, cache: KVCache, tokens: list[int], pass_tokens: int, progress: Progress | None, shelf: Shelf | None
    ) -> int:
        """Reads the tokens, or takes what the shelf has of them; how many it had."""
        inputs = torch.tensor([tokens], dtype=torch.long, device=self.model.device)
        done = stored_tokens = 0
        try:
            with torch.inference_mode(), cache.watching(self.model):
                while done < len(tokens):
                    given = shelf.give(cache, done) if shelf is not None else 0
                    done, stored_tokens = done + given, stored_tokens + given
                    if progress is not None:
                        passes = -(-len(tokens) // pass_tokens)
                        reading = partial(progress, "reading")
                        cache.reading.on_layer = over_all_passes(reading, done // pass_tokens, passes)
                    part = inputs[:, done : done + pass_tokens]
                    cache.announce(part.tolist())
                    self.model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
                    if shelf is not None:
                        shelf.keep_chunk(cache, done)
                    done += part.shape[1]
        finally:
            cache.reading.on_layer = None
        return stored_tokens

    def _replay(
        self, cache: KVCache, tokens: list[int], num_prefix: int, recipe: Recipe, progress: Progress | None
    ) -> None:
        if not isinstance(recipe.score, KVzip):
            raise RecipeError(f"a replay of the context is known for kvzip only; got {recipe.score!r}.")
        try:
            masses = replay_context(
                self.model,
                cache,
                tokens,
                num_prefix_tokens=num_prefix,
                method=recipe.score,
                tokenizer=self.tokenizer,
                after=self.template.after,
                max_positions=self.loaded.max_positions,
                progress=partial(progress, "replaying") if progress is not None else None,
            )
        finally:
            cache.reading.on_layer = None
        cache.compress(masses)


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
        lm: LanguageModel,
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


def check_budget(recipe: Recipe, num_tokens: int) -> str:
    """Raises BudgetError where a budget cannot hold for a prompt; returns a note where it has no effect."""
    tokens = recipe.budget.tokens
    if recipe.budget.share is not None:
        tokens = int(num_tokens * recipe.budget.share)
    if tokens is not None:
        RecipePolicy(recipe).check_budget(tokens, num_tokens)
        if recipe.score is not None and tokens >= num_tokens:
            return f"note: the budget of {recipe.budget} is not below the prompt of {num_tokens} tokens; nothing was dropped."
    return ""
