"""What a store holds of one text under one recipe, and how a read begins with it.

Two kinds of entries. A *chunk* is 256 tokens of all layers, dense, as they are while a prompt is read: its numbers depend on the
tokens up to its end alone, so all texts with that beginning share it, and so do all recipes that choose what to keep only
when the prompt is over and look back at no more of it than its keys and values, or a few of the last queries. A *context* is
what any recipe but `full` kept of a whole text, found again by exactly that text. Pages would not do as chunks: the
rest of a prompt is read against dense keys, so a read that begins with pages would give another answer.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, final

import torch

from steno.codec.arrays import CHUNK_TOKENS
from steno.codec.cache import cache_parts
from steno.codec.container import SavedFile
from steno.codec.identity import HowRead, about_model
from steno.errors import CacheError, DamagedFile, StenoWarning, StoreError
from steno.models.kvcache import KVCache
from steno.models.learned import find_weights
from steno.models.load import LoadedModel
from steno.pipeline import RecipePolicy, with_weights
from steno.recipe import FULL, Recipe
from steno.store.address import chunk_names, context_name, root_of
from steno.store.check import open_entry
from steno.store.chunks import HeadKV, chunk_parts, read_chunk
from steno.store.store import Store
from steno.types import Need

AHEAD = 2
"""So many chunks are fetched and decoded while the one before them is."""

FROM_KEYS = {Need.REPLAY, Need.ROPE, Need.PRE_ROPE_KEYS, Need.TOKEN_TEXT, Need.QUERIES}
"""Needs that the keys and tokens of a beginning meet, or the last queries."""

T = TypeVar("T")
U = TypeVar("U")


def can_begin(recipe: Recipe, how: HowRead) -> bool:
    """Whether a read under the recipe can go on from dense chunks that another read left."""
    evicts = how.chunk_tokens is not None and recipe.reader is not None
    return recipe.propagate is None and recipe.needs <= FROM_KEYS and not evicts


@final
class Shelf:
    """The entries of one text under one recipe. Mutable: once the store fails, it is left alone until the read is over."""

    def __init__(
        self,
        store: Store,
        loaded: LoadedModel,
        recipe: Recipe,
        tokens: Sequence[int],
        how: HowRead,
        *,
        has_question: bool,
    ) -> None:
        self._store, self._loaded, self._recipe, self._tokens = store, loaded, recipe, tokens
        self._works = True
        about = about_model(loaded)
        about = {key: about[key] for key in ("tokenizer", "dtype", "rope")} | {
            "model": {key: value for key, value in about["model"].items() if key != "name"}
        }
        root = root_of(about, str(FULL), store.tenant, store.secret)
        self._chunks, self._before = chunk_names(root, tokens), root
        learned = about | {"learned": _learned(recipe, loaded.model_hash)}
        own = root_of(learned, str(recipe), store.tenant, store.secret)
        self.context_name = context_name(own, tokens, asdict(how) | {"has_question": has_question})
        window = RecipePolicy(recipe).query_window if Need.QUERIES in recipe.needs else 0
        begins = can_begin(recipe, how) and how.pass_tokens == CHUNK_TOKENS
        # so many chunks at most, as what is left must give the last queries
        self._most = max(0, len(tokens) - max(1, window)) // CHUNK_TOKENS if begins else 0

    @property
    def names(self) -> list[str]:
        """What a read leaves in the store: the chunks that it can begin with, and the context if it is not all of them."""
        chunks = self._chunks[: self._most]
        return chunks if self._recipe == FULL else [*chunks, self.context_name]

    @property
    def needed(self) -> list[str]:
        """What makes a read compute nothing but a last rest of up to 256 tokens."""
        return self._chunks[: self._most] if self._recipe == FULL else [self.context_name]

    # a whole context

    def open(self, restore: Callable[[SavedFile], T]) -> T | None:
        """What `restore` makes of the stored context; None if there is none, it is damaged, or the recipe is `full`."""
        name = self.context_name
        if self._recipe == FULL:
            return None

        def opened() -> T | None:
            data = self._store.get(name)
            if data is None:
                return None
            found = restore(open_entry(name, data))
            self._store.used([name])
            return found

        return self._try(opened, name)

    def keep_context(self, cache: KVCache, about: Mapping[str, Any]) -> None:
        """Stores what a recipe kept. about: for the header, as `Context.save` writes it."""
        if self._recipe == FULL or not self._works:
            return
        try:
            parts = cache_parts(cache, self._tokens, dict(about) | {"address": self.context_name})
        except CacheError as error:
            warnings.warn(f"the context is not stored: {error}", StenoWarning, stacklevel=2)
            return
        self._try(lambda: self._store.put(self.context_name, parts), self.context_name)

    # chunks

    def give(self, cache: KVCache, first_token: int) -> int:
        """Gives a cache the chunks from a token on that are there and whole, in place of reading them; how many tokens."""
        shape = _shape(cache)
        names = self._chunks[first_token // CHUNK_TOKENS : self._most]
        if shape is None or first_token % CHUNK_TOKENS or not names:
            return 0
        found: list[list[HeadKV]] = []
        try:
            for layers in ahead(partial(self._chunk, num_layers=len(cache.layers), shape=shape), names):
                if layers is None:
                    break
                found.append(layers)
        except DamagedFile as error:
            self.notice(names[len(found)], error)
        except StoreError as error:
            self._give_up(error)
        if not found:
            return 0
        used = names[: len(found)]
        self._try(lambda: self._store.used(used), used[0])
        num_tokens = len(found) * CHUNK_TOKENS
        cache.announce([list(self._tokens[first_token : first_token + num_tokens])])
        device = self._loaded.model.device
        for layer, parts in zip(cache.own_layers, zip(*found, strict=True), strict=True):
            keys, values = (torch.cat([pair[i] for pair in parts], dim=1).to(device) for i in (0, 1))
            layer.take_read(keys, values)
        return num_tokens

    def keep_chunk(self, cache: KVCache, first_token: int) -> None:
        """Stores the 256 tokens from `first_token` on, which were just read, where the prompt goes on behind them."""
        idx = first_token // CHUNK_TOKENS
        if idx >= self._most or not self._works or _shape(cache) is None:
            return
        last = first_token + CHUNK_TOKENS
        layers = []
        for layer in cache.own_layers:
            dense = layer.dense_prompt()
            if dense is None:
                return
            layers.append((dense[0][:, first_token:last], dense[1][:, first_token:last]))
        before = bytes.fromhex(self._chunks[idx - 1].split(".")[0]) if idx else self._before
        about = about_model(self._loaded)
        parts = chunk_parts(before, self._tokens[first_token:last], layers, about, is_first=idx == 0)
        self._try(lambda: self._store.put(self._chunks[idx], parts), self._chunks[idx])

    def _chunk(self, name: str, *, num_layers: int, shape: Sequence[int]) -> list[HeadKV] | None:
        data = self._store.get(name) if self._works else None
        if data is None:
            return None
        return read_chunk(name, data, dtype=self._loaded.model.dtype, num_layers=num_layers, shape=shape)

    def notice(self, name: str, error: Exception) -> None:
        """Tells that an entry is damaged, and will be read anew."""
        warnings.warn(
            f"{name} in the store is damaged and is read anew from its text ({error})", StenoWarning, stacklevel=3
        )

    def _try(self, operation: Callable[[], T], name: str) -> T | None:
        """What an operation on the store gives; None, with a notice, if the store fails or the entry is damaged."""
        if not self._works:
            return None
        try:
            return operation()
        except DamagedFile as error:
            self.notice(name, error)
        except StoreError as error:
            self._give_up(error)
        return None

    def _give_up(self, error: StoreError) -> None:
        self._works = False
        warnings.warn(f"the text is read without its store: {error}", StenoWarning, stacklevel=3)


def _shape(cache: KVCache) -> tuple[int, int, int] | None:
    """`[Hkv, 256, D]`, the shape of keys in a chunk; None if layers are not under the recipe, which can be given nothing."""
    if len(cache.own_layers) != len(cache.layers):
        return None
    config = cache.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, CHUNK_TOKENS, dim


def _learned(recipe: Recipe, model_hash: str) -> list[str]:
    """Digests of the files that the methods of a recipe learned."""
    named = with_weights(recipe, lambda method, command: find_weights(method, model_hash, command))
    files = [getattr(stage, "weights", None) for stage in named.stages]
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file is not None]


def ahead(load: Callable[[U], T], items: Sequence[U]) -> Iterator[T]:
    """`load` of the items in order, some of them ahead in threads of their own."""
    with ThreadPoolExecutor(AHEAD) as threads:
        waiting: list[Future[T]] = []
        try:
            for i in range(len(items)):
                while len(waiting) < AHEAD and i + len(waiting) < len(items):
                    waiting.append(threads.submit(load, items[i + len(waiting)]))
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()
