"""What all layers of one cache share while a prompt is read, and what a prompt must be for a recipe to be followed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steno.cache.access import Shared
from steno.cache.prompt import ReplayObserver
from steno.cache.tokens import NewTokens
from steno.errors import CacheError


@dataclass(kw_only=True)
class Reading:
    """What all layers of one cache share, most of it while the prompt is read. Mutable.

    prompt_tokens: length at which the prompt is complete; None: after the first forward pass. evict: whether the method
    evicts after every chunk of it. replay: set while the
    context is replayed for scoring; such a pass is attended and observed, and leaves nothing in the cache.
    on_layer: called with (layers done, layers in all) after each layer of a pass that reads or replays. shared: what counts
    longer than the reading.
    has_images: whether the prompt may hold image tokens; then image_mask, `[B, T]` bool, says which tokens of it, padding
    included, are some; generate() may repeat its rows.
    is_watched: whether hooks stand that let tokens go round layers; onward: `[n]`, those that later layers compute.
    """

    prompt_tokens: int | None = None
    evict: bool = False
    replay: ReplayObserver | None = None
    on_layer: Callable[[int, int], None] | None = None
    shared: Shared = field(default_factory=Shared)
    has_images: bool = True
    image_mask: Tensor | None = None
    is_watched: bool = False
    onward: Tensor | None = None

    def unwatch(self) -> None:
        """Notes that the hooks are gone."""
        self.is_watched, self.onward = False, None

    def is_complete(self, seen: int) -> bool:
        """Whether a prompt is over of which so many tokens were seen."""
        return self.prompt_tokens is None or seen >= self.prompt_tokens

    def check_goes_on(self, seen: int) -> None:
        """Raises CacheError if a prompt of which so many tokens were seen is over, and waits for its replay."""
        if seen and self.is_complete(seen):
            raise CacheError(
                "this recipe scores tokens by replaying the context, which generate() alone cannot do; "
                "read the context with steno.load(...).read(text, recipe=...)."
            )

    def image_tokens(self, seen: int, num_rows: int, count: int) -> Tensor:
        """Which of the `count` tokens after the first `seen` are image tokens, `[num_rows, count]`.

        Raises CacheError if the cache was told of none, or of another prompt.
        """
        mask = self.image_mask
        if mask is None and not self.has_images:
            return torch.zeros(num_rows, count, dtype=torch.bool)
        if mask is None:
            raise CacheError(
                "this recipe looks at which tokens of the prompt are image tokens, which the attention does not show: pass "
                "KVCache(model.config, recipe, input_ids=inputs['input_ids'])."
            )
        if mask.shape[1] < seen + count or num_rows % len(mask):
            raise CacheError(
                f"the prompt must be the `input_ids` that the cache was given, {list(mask.shape)}; "
                f"it has {num_rows} rows and at least {seen + count} tokens."
            )
        return mask[:, seen : seen + count].repeat_interleave(num_rows // len(mask), dim=0)

    def check_text(self, row_seen: list[int]) -> None:
        """Raises CacheError unless the cache was told the tokens of all rows, that many."""
        text = self.shared.text
        if text is None or [len(row) for row in text.rows] != row_seen:
            raise CacheError(
                "this recipe must know where sentences end, and generate() alone does not tell a cache its tokens: read with "
                "steno.load(...).read(text, recipe=...), or give KVCache `sentence_ends` and call "
                "cache.announce(token_ids) before every forward pass."
            )

    def check_routes(self, new: NewTokens) -> None:
        """Raises CacheError unless tokens can go round layers in a pass."""
        if not self.is_watched:
            raise CacheError(
                "this recipe lets tokens go round layers, which generate() alone cannot do: read the text with "
                "steno.load(...).read(text, recipe=...), or generate within `with cache.watching(model):`."
            )
        if len(new.q) != 1 or new.counts is not None:
            raise CacheError(
                f"tokens can go round layers for one sequence at a time, without padding; the batch has {len(new.q)} rows."
            )

    def note_onward(self, onward: Tensor, seen: int, count: int) -> None:
        """Which tokens, `[n]`, the layers after this one compute, told after a pass of `count` tokens.

        Raises CacheError unless that pass was the whole prompt.
        """
        if not self.is_complete(seen) or seen != count:
            raise CacheError(
                f"tokens are chosen for the later layers once, from the whole prompt; {seen} tokens came in parts: read "
                "it in one pass, without `prefill_chunk_size`."
            )
        self.onward = onward
