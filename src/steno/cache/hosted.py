"""What transformers asks of a layer of a cache, attention apart: its length, its rows, what it takes and what it refuses."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from steno.errors import BadArgument, CacheError, UnsupportedAttention


class HostedLayer(CacheLayerMixin):
    """A layer as its host sees it. What it holds is for the layer alone, which `update` hands to the attention function.

    seen: tokens seen, padding included; row_seen: those of each row, without. token_bytes: of one token, dense, in the
    model's dtype.
    """

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def _clear(self) -> None:
        self.seen = 0
        self.row_seen: list[int] = []
        self.token_bytes = 0
        self._pending: tuple[Tensor, Tensor] | None = None  # keys and values that wait for their queries
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Takes the new keys and values `[B, Hkv, T, D]`; they enter the cache when attention comes with its queries."""
        if self.row_seen and key_states.shape[0] != len(self.row_seen):
            raise BadArgument(
                f"the batch must have as many rows as the cache, {len(self.row_seen)}; got {key_states.shape[0]}."
            )
        if key_states.shape != value_states.shape:
            raise UnsupportedAttention(
                f"keys and values must have one shape; got {list(key_states.shape)} and {list(value_states.shape)}: "
                "attention with different key and value dimensions (MLA) is not supported."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.token_bytes = 2 * key_states.shape[1] * key_states.shape[3] * key_states.element_size()
        self._pending = (key_states, value_states)
        return self, self

    def get_seq_length(self) -> int:
        """The logical length: tokens seen, padding included. What is held may be less."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        raise CacheError("steno's cache has no offloading to another device; use a recipe with a smaller budget.")

    def prefetch(self) -> None:
        raise CacheError("steno's cache has no offloading to another device; use a recipe with a smaller budget.")

    @torch.inference_mode(False)
    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest tokens; as in transformers, the count is negative."""
        if tokens_to_remove > 0:
            raise BadArgument(f"`tokens_to_remove` must be <= 0; got tokens_to_remove={tokens_to_remove}.")
        count = -tokens_to_remove
        if count == 0 or not self.row_seen:
            return
        self.check_crop(count)
        self._drop(count)
        self.seen -= count
        self.row_seen = [n - count for n in self.row_seen]

    def check_crop(self, count: int) -> None:
        """Raises if the newest `count` tokens cannot be removed; changes nothing."""
        if count > min(self.row_seen, default=0):
            raise BadArgument(
                f"crop must remove at most {min(self.row_seen, default=0)} tokens, the shortest row; got {count}."
            )
        self._check_drop(count)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([b for b in range(len(self.row_seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

    @abstractmethod
    def _check_drop(self, count: int) -> None:
        """Raises if what is held cannot lose the newest tokens, which every row has; changes nothing."""

    @abstractmethod
    def _drop(self, count: int) -> None:
        """Removes the newest tokens of what is held, before they leave `row_seen`."""

    @abstractmethod
    def _select(self, rows: list[int]) -> None:
        """Takes the given rows, in that order, in the place of those that are there."""
