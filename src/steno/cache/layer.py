"""One layer's cache: what transformers updates, and what answers attention. The owner of all rows of the layer."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from steno.cache.accounting import Meter, held_bytes
from steno.cache.compress import compress_rows
from steno.cache.observe import PromptObserver
from steno.cache.paged import PagedRows
from steno.cache.policy import LayerPolicy
from steno.cache.segment import HeadKV, owned
from steno.cache.slots import SlotRows
from steno.errors import BadArgument, CacheError, UnsupportedAttention
from steno.kernels.attention import merge_attention
from steno.kernels.attention.prefill import attention_and_lse, causal_attention
from steno.types import LayerKV, Need, Observation, Rope

FEW_TOKENS = 64
"""Up to so many new tokens attend straight over the pages; more are worth decoding the row once."""


@final
@dataclass(frozen=True, kw_only=True)
class ReplayedLayer:
    """One layer of a pass that replays the context.

    queries `[H, T, D]` and own_keys `[Hkv, T, D]` of the pass; kv: the prompt. past_lse, own_lse `[H, T]` fp32: log-sum-exp
    of the attention to the prompt and of the causal attention to the pass itself; None under a soft cap or sinks.
    """

    layer_idx: int
    queries: Tensor
    own_keys: Tensor
    kv: LayerKV
    scale: float
    softcap: float | None
    past_lse: Tensor | None = None
    own_lse: Tensor | None = None


ReplayObserver = Callable[[ReplayedLayer], None]


@dataclass(kw_only=True)
class Reading:
    """What all layers of one cache share while the prompt is read. Mutable.

    prompt_tokens: length at which the prompt is complete; None: after the first forward pass. replay: set while the
    context is replayed for scoring; such a pass is attended and observed, and leaves nothing in the cache.
    on_layer: called with (layers done, layers in all) after each layer of a pass that reads or replays.
    """

    prompt_tokens: int | None = None
    replay: ReplayObserver | None = None
    on_layer: Callable[[int, int], None] | None = None


class LayerCache(CacheLayerMixin):
    """The memory of one full-attention layer for B sequences; `update` hands itself to the attention function."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(
        self,
        policy: LayerPolicy,
        *,
        layer_idx: int,
        num_layers: int,
        reading: Reading,
        meter: Meter,
        rope_of: Callable[[torch.device], Rope | None],
    ) -> None:
        super().__init__()
        self.policy, self.layer_idx, self.num_layers = policy, layer_idx, num_layers
        self.reading, self.meter, self.rope_of = reading, meter, rope_of
        self._clear()

    def _clear(self) -> None:
        self.seen = 0
        self.row_seen: list[int] = []
        self.content: PagedRows | SlotRows | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._prompt: list[HeadKV] = []  # [Hkv, S, D] per row, while the prompt is read
        self._observers: list[PromptObserver] = []
        self.token_bytes = 0  # of one token, dense, in the model's dtype
        self.is_initialized = False

    # what transformers asks

    @property
    def is_croppable(self) -> bool:
        return self.policy.evictor is None

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
        self.is_initialized = True
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

    def reset(self) -> None:
        self._clear()
        self.meter.set_layer(self.layer_idx, 0)

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
        if self.content is None:
            self._prompt = [(k[:, :-count], v[:, :-count]) for k, v in self._prompt]
        else:
            self.content.crop(count, self.row_seen)
        self.seen -= count
        self.row_seen = [n - count for n in self.row_seen]

    def check_crop(self, count: int) -> None:
        """Raises if the newest `count` tokens cannot be removed; changes nothing."""
        if count > min(self.row_seen, default=0):
            raise BadArgument(
                f"crop must remove at most {min(self.row_seen, default=0)} tokens, the shortest row; got {count}."
            )
        if self.content is not None:
            self.content.check_crop(count, self.row_seen)
        elif any(o.num_seen for o in self._observers) and self.policy.needs:
            raise CacheError("cannot crop while the prompt is read: what was observed of it cannot be taken back.")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([b for b in range(len(self.row_seen)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        rows = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices
        self._select(rows.tolist())

    @torch.inference_mode(False)
    def _select(self, rows: list[int]) -> None:
        if not self.row_seen or rows == list(range(len(self.row_seen))):
            return
        self.row_seen = [self.row_seen[r] for r in rows]
        self._prompt = [self._prompt[r] for r in rows] if self._prompt else []
        self._observers = [copy(self._observers[r]) for r in rows] if self._observers else []
        if self.content is not None:
            self.content = self.content.select(rows)

    @torch.inference_mode(False)
    def fork(self, reading: Reading, meter: Meter) -> LayerCache:
        """A layer that shares the segments of this one and can go its own way."""
        if self.content is None and self.row_seen:
            raise CacheError("cannot fork a cache while its prompt is still being read.")
        layer = LayerCache(
            self.policy,
            layer_idx=self.layer_idx,
            num_layers=self.num_layers,
            reading=reading,
            meter=meter,
            rope_of=self.rope_of,
        )
        layer.seen, layer.row_seen, layer.is_initialized = self.seen, list(self.row_seen), self.is_initialized
        layer.token_bytes = self.token_bytes
        if self.content is not None:
            layer.content = self.content.select(list(range(len(self.row_seen))))
        layer.measure()
        return layer

    # attention

    @torch.inference_mode(False)  # buffers of inference mode could not be written outside of it
    @torch.no_grad()
    def attend(
        self,
        q: Tensor,
        counts: list[int] | None,
        *,
        scale: float,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Takes the pending keys and values in and attends causally: q `[B, H, T, D]` to `[B, H, T, D]`.

        counts: real tokens per row when the batch is padded on the left, otherwise None. Output of padding means nothing.
        """
        if self._pending is None:
            raise CacheError("attend must follow update; this layer got no new keys and values.")
        (k, v), self._pending = self._pending, None
        if self.reading.replay is not None:
            out = self._replay(self.reading.replay, q, k, v, scale, softcap, sinks)
            self._report_progress()
            return out
        if not self.row_seen:
            self.row_seen = [0] * q.shape[0]
        num_new = q.shape[2]
        new = [num_new] * q.shape[0] if counts is None else counts
        if self.content is None:
            self._refuse_unreplayed()
            out = self._read(q, k, v, counts, scale, softcap, sinks)
        else:
            out = self._decode(self.content, q, k, v, counts, scale, softcap, sinks)
        self.seen += num_new
        self.row_seen = [a + b for a, b in zip(self.row_seen, new, strict=True)]
        if self.content is None and self._prompt_is_complete() and Need.REPLAY not in self.policy.needs:
            self.compress(None)
        elif self.content is None:
            self._prompt = [(owned(pk), owned(pv)) for pk, pv in self._prompt]
            self.measure()
        self._report_progress()
        return out

    def _report_progress(self) -> None:
        if self.reading.on_layer is not None:
            self.reading.on_layer(self.layer_idx + 1, self.num_layers)

    def _prompt_is_complete(self) -> bool:
        return self.reading.prompt_tokens is None or self.seen >= self.reading.prompt_tokens

    def _refuse_unreplayed(self) -> None:
        if self.seen and self._prompt_is_complete():
            raise CacheError(
                "this recipe scores tokens by replaying the context, which generate() alone cannot do; "
                "read the context with steno.load(...).read(text, recipe=...)."
            )

    def _decode(
        self,
        content: PagedRows | SlotRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: list[int] | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if isinstance(content, SlotRows):
            return self._decode_slots(content, q, k, v, counts, scale, softcap, sinks)
        if q.shape[2] > FEW_TOKENS:
            return content.extend(q, k, v, counts, scale=scale, softcap=softcap, sinks=sinks)
        selector = self.policy.selector
        if selector is not None and self.layer_idx < selector.dense_layers:
            selector = None
        out, lse = content.step(q, k, v, counts, scale=scale, softcap=softcap, selector=selector)
        return out if sinks is None else with_sinks(out, lse, sinks)

    def _decode_slots(
        self,
        content: SlotRows,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: list[int] | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        # a long turn goes in small steps, so that eviction keeps pace and scores stay small; counted from the end, where
        # the rows of a padded batch are aligned
        outs, num_new = [], q.shape[2]
        for a in range(-(-num_new % FEW_TOKENS), num_new, FEW_TOKENS):
            part = slice(max(0, a), a + FEW_TOKENS)
            width = part.stop - part.start
            some = None if counts is None else [max(0, min(width, part.stop - (num_new - n))) for n in counts]
            out, lse = content.step(q[:, :, part], k[:, :, part], v[:, :, part], some, scale=scale, softcap=softcap)
            outs.append(out if sinks is None else with_sinks(out, lse, sinks))
        return torch.cat(outs, dim=2)

    def _read(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: list[int] | None,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        num_new = q.shape[2]
        if not self._observers:
            rope = self.rope_of(q.device) if Need.QUERY_STATISTICS in self.policy.needs else None
            self._observers = [PromptObserver(self.policy, rope, scale=scale, softcap=softcap) for _ in q]
        past = self._prompt
        new = [num_new] * q.shape[0] if counts is None else counts
        self._prompt = []
        for b, n in enumerate(new):
            row_k, row_v = k[b, :, num_new - n :], v[b, :, num_new - n :]
            if past and past[b][0].shape[1]:
                row_k, row_v = torch.cat([past[b][0], row_k], dim=1), torch.cat([past[b][1], row_v], dim=1)
            self._prompt.append((row_k, row_v))
            if n:
                self._observers[b].see(q[b, :, num_new - n :], row_k)
        self.meter.touch(2 * sum(pk.numel() * pk.element_size() for pk, _ in self._prompt))
        if counts is None and not self.seen:
            return causal_attention(q, k, v, scale=scale, softcap=softcap, sinks=sinks)
        out = torch.zeros_like(q)
        for b, n in enumerate(new):
            if n:
                row_k, row_v = self._prompt[b]
                row_q = q[b : b + 1, :, num_new - n :]
                out[b : b + 1, :, num_new - n :] = causal_attention(
                    row_q, row_k[None], row_v[None], scale=scale, softcap=softcap, sinks=sinks
                )
        return out

    def _replay(
        self,
        observer: ReplayObserver,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        if len(self._prompt) != 1:
            raise CacheError(f"a replay needs one row whose prompt is still dense; the cache has {len(self._prompt)}.")
        keys, values = self._prompt[0]
        self.meter.touch(2 * k.numel() * k.element_size())
        view = ReplayedLayer(
            layer_idx=self.layer_idx,
            queries=q[0],
            own_keys=k[0],
            kv=LayerKV(keys=keys, values=values, positions=torch.arange(keys.shape[1], device=keys.device)),
            scale=scale,
            softcap=softcap,
        )
        if softcap is not None or sinks is not None:
            observer(view)
            all_keys, all_values = torch.cat([keys, k[0]], dim=1), torch.cat([values, v[0]], dim=1)
            return causal_attention(q, all_keys[None], all_values[None], scale=scale, softcap=softcap, sinks=sinks)
        past, past_lse = attention_and_lse(q, keys[None], values[None], scale=scale, causal=False)
        own, own_lse = attention_and_lse(q, k, v, scale=scale, causal=True)
        observer(replace(view, past_lse=past_lse[0], own_lse=own_lse[0]))
        return merge_attention([past, own], [past_lse, own_lse])[0]

    # the end of the prompt

    @torch.inference_mode(False)
    @torch.no_grad()
    def compress(self, replay_mass: Tensor | None) -> None:
        """Turns the prompt, dense until now, into what the recipe keeps. replay_mass: `[Hkv, S]` for methods that need it."""
        prompts, observers = self._prompt, self._observers
        dense_bytes = 2 * sum(k.numel() * k.element_size() for k, _ in prompts)
        self.content = compress_rows(
            prompts,
            observers,
            self.policy,
            layer_idx=self.layer_idx,
            num_layers=self.num_layers,
            replay_mass=replay_mass,
        )
        self.meter.set_layer(self.layer_idx, held_bytes(self.content))
        self.meter.touch(dense_bytes)
        self._prompt, self._observers = [], []

    def observation(self) -> Observation:
        """What was observed so far of the one row that is being read; for calibration."""
        if len(self._observers) != 1:
            raise CacheError(
                f"calibration reads one row that is not complete yet; the layer has {len(self._observers)}."
            )
        return self._observers[0].observation(
            layer_idx=self.layer_idx, num_layers=self.num_layers, budget_tokens=self.row_seen[0], replay_mass=None
        )

    # accounting

    def measure(self) -> int:
        """Bytes held by this layer now; also brings the meter up to date."""
        num_bytes = held_bytes([self.content, self._prompt, self._observers])
        self.meter.set_layer(self.layer_idx, num_bytes)
        return num_bytes

    def held_tokens(self) -> list[list[int]]:
        """Held tokens `[B][Hkv]`."""
        if self.content is not None:
            return self.content.held_tokens()
        return [[k.shape[1]] * k.shape[0] for k, _ in self._prompt]

    def check_integrity(self) -> None:
        """Raises IntegrityError if an invariant does not hold. For tests, and for production when in doubt."""
        if self.content is not None:
            self.content.check_integrity(self.row_seen)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Adds a learned sink to a finished attention: out `[B, H, T, D]`, lse `[B, H, T]`, sinks `[H]`."""
    share = torch.sigmoid(lse - sinks.float().view(1, -1, 1))  # what the sink leaves to the tokens
    return out * share[..., None].to(out.dtype)
