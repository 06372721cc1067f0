"""What a user touches: load a model, read a document into a compressed cache, ask as often as you like."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from steno.codec.arrays import CHUNK_TOKENS
from steno.codec.cache import read_tokens, restore_cache
from steno.codec.container import SavedFile
from steno.codec.identity import HowRead, check_model, how_read, recipe_of
from steno.context import Context
from steno.errors import BadArgument, DamagedChunk, PromptError, RecipeError, StenoWarning
from steno.methods import KVzip
from steno.models.default import DEFAULT_MODEL
from steno.models.kvcache import KVCache
from steno.models.load import LoadedModel, load_model
from steno.pipeline import RecipePolicy
from steno.prompt import PromptedModel
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


class LanguageModel(PromptedModel):
    """A model that reads documents, and where what it reads is kept."""

    def __init__(self, loaded: LoadedModel, store: Store | None = None) -> None:
        super().__init__(loaded)
        self.store = store

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
