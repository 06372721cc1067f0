"""One layer's cache: what transformers updates, and what answers attention. The owner of all rows of the layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from steno.cache.access import Shared
from steno.cache.accounting import Meter, held_bytes
from steno.cache.compress import LayerPrompt, allocate_across, compress_rows, share_rows
from steno.cache.evicting import EvictingPrompt
from steno.cache.hosted import HostedLayer
from steno.cache.paged import PagedRows
from steno.cache.policy import Allocation, LayerPolicy
from steno.cache.prompt import Prompt, ReplayObserver
from steno.cache.reading import Reading
from steno.cache.segment import HeadKV
from steno.cache.slots import SlotRows
from steno.cache.tokens import NewTokens
from steno.errors import CacheError
from steno.types import LayerKV, Need, Observation, Rope, Route

FEW_TOKENS = 64
"""Up to so many new tokens attend straight over the pages; more are worth decoding the row once."""


class LayerCache(HostedLayer):
    """The memory of one full-attention layer for B sequences; the attention function gets it from `update`."""

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
        self.group = [self]  # the layers that are compressed together, in order
        self._clear()

    def _clear(self) -> None:
        super()._clear()
        self.content: PagedRows | SlotRows | None = None  # once the prompt is compressed
        self._prompt: Prompt | EvictingPrompt | None = None  # until then
        self._given: HeadKV | None = None  # its beginning, from an earlier read, before the first pass
        self._replay_mass: Tensor | None = None  # while the prompt waits for the last layer of the group
        self._hidden: Tensor | None = None
        self._routed: tuple[Tensor, int] | None = None

    @property
    def is_croppable(self) -> bool:
        return self.policy.evictor is None

    def reset(self) -> None:
        self._clear()
        self.measure()

    def _check_drop(self, count: int) -> None:
        if self.content is not None:
            self.content.check_crop(count, self.row_seen)
        elif self._prompt is not None:
            self._prompt.check_crop()

    def _drop(self, count: int) -> None:
        if self.content is not None:
            self.content.crop(count, self.row_seen)
        elif self._prompt is not None:
            self._prompt.crop(count)

    @torch.inference_mode(False)
    def _select(self, rows: list[int]) -> None:
        if not self.row_seen or rows == list(range(len(self.row_seen))):
            return
        self.row_seen = [self.row_seen[r] for r in rows]
        if self._prompt is not None:
            self._prompt.select(rows)
        if self.content is not None:
            self.content = _select_rows(self.content, rows, self.reading.shared)

    @torch.inference_mode(False)
    def fork(self, reading: Reading, meter: Meter) -> LayerCache:
        """A layer that shares the segments of this one and can go its own way."""
        if self.content is None and self.row_seen:
            raise CacheError("cannot fork a cache while its prompt is still being read.")
        place = {"layer_idx": self.layer_idx, "num_layers": self.num_layers}
        layer = LayerCache(self.policy, **place, reading=reading, meter=meter, rope_of=self.rope_of)
        layer.seen, layer.row_seen = self.seen, list(self.row_seen)
        layer.token_bytes, layer.is_initialized = self.token_bytes, self.is_initialized
        if self.content is not None:
            layer.content = _select_rows(self.content, list(range(len(self.row_seen))), reading.shared)
        layer.measure()
        return layer

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.policy.check_widths(key_states.shape[1], key_states.shape[3], len(self.group))
        super().lazy_initialization(key_states, value_states)

    # attention

    def show_hidden(self, hidden: Tensor) -> None:
        """What goes into the attention module in this pass, `[B, T, hidden]`; comes before `attend`."""
        self._hidden = hidden if Need.HIDDEN_STATES in self.policy.needs and self.content is None else None

    def route(self, hidden: Tensor) -> Route | None:
        """Which tokens of a pass this layer computes, None for all; hidden: `[B, T, hidden]`, what comes to the layer.

        Comes before `attend`, which then gets those tokens alone.
        """
        router, count = self.policy.router, hidden.shape[1]
        if router is None or self.content is not None or self.reading.replay is not None or len(hidden) != 1:
            return None
        if self.layer_idx == 0:
            self.reading.onward = None
        if self.reading.onward is not None:
            route = Route(index=self.reading.onward) if len(self.reading.onward) < count else None
        else:
            is_image = self._image_tokens(hidden, count)
            images = None if is_image is None else is_image[0]
            with torch.no_grad():
                route = router.before(hidden[0], images, layer_idx=self.layer_idx, num_layers=self.num_layers)
        if route is not None:
            self._routed = route.index, count
        return route

    def _image_tokens(self, rows: Tensor, count: int) -> Tensor | None:
        """Which of `count` new tokens of each row are image tokens, `[B, count]`, where the rows are."""
        if Need.IMAGE_MASK not in self.policy.needs or self.content is not None or self.reading.replay is not None:
            return None
        return self.reading.image_tokens(self.seen, len(rows), count).to(rows.device)

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
        hidden, self._hidden = self._hidden, None
        routed, self._routed = self._routed, None
        index, count = routed or (None, q.shape[2])
        is_image, positions = self._image_tokens(q, count), None
        if self.content is None and self.policy.router is not None:
            positions = self.seen + (torch.arange(count, device=q.device) if index is None else index)
        if index is not None and is_image is not None:
            is_image = is_image[:, index]
        new = NewTokens(
            q=q, k=k, v=v, counts=counts, scale=scale, softcap=softcap, sinks=sinks, hidden=hidden, is_image=is_image,
            positions=positions,
        )  # fmt: skip
        if Need.TOKEN_TEXT in self.policy.needs and self.reading.replay is None:
            self.reading.check_text(self._seen_after(new, count))
        if self.reading.replay is not None:
            out = self._replay(self.reading.replay, new)
        elif self.content is None:
            out = self._read(new, count)
        else:
            out = self._decode(self.content, new)
            self._advance(new, count)
        if self.reading.on_layer is not None:
            self.reading.on_layer(self.layer_idx + 1, self.num_layers)
        return out

    def _seen_after(self, new: NewTokens, count: int) -> list[int]:
        """Real tokens of each row after a pass of `count` tokens, those that went round the layer included."""
        beside = count - new.num_new
        return [a + b + beside for a, b in zip(self.row_seen or [0] * len(new.q), new.row_counts, strict=True)]

    def _advance(self, new: NewTokens, count: int) -> None:
        self.seen += count
        self.row_seen = self._seen_after(new, count)

    @torch.inference_mode(False)
    @torch.no_grad()
    def take_read(self, keys: Tensor, values: Tensor) -> None:
        """Takes the next tokens of one prompt, `[Hkv, n, D]`, from an earlier read of the same; passes over the rest follow.

        Only for recipes that look at no more of them. Raises `CacheError` if the prompt is over.
        """
        if self.content is not None or len(self.row_seen) > 1 or isinstance(self._prompt, EvictingPrompt):
            raise CacheError("what was read before can only go on one prompt that is still dense.")
        before = self.dense_prompt()
        if before is not None:
            keys, values = torch.cat([before[0], keys], dim=1), torch.cat([before[1], values], dim=1)
        if self._prompt is None:
            self._given = keys, values
        else:
            self._prompt.rows = [(keys, values)]
        self.seen, self.row_seen, self.is_initialized = keys.shape[1], [keys.shape[1]], True
        self.token_bytes = 2 * keys.shape[0] * keys.shape[2] * keys.element_size()
        self.measure()

    def dense_prompt(self) -> HeadKV | None:
        """Keys and values `[Hkv, S, D]` of the one prompt that is being read, as long as they are dense."""
        if self._prompt is None:
            return self._given
        return self._prompt.rows[0] if isinstance(self._prompt, Prompt) and len(self._prompt.rows) == 1 else None

    def _read(self, new: NewTokens, count: int) -> Tensor:
        if self.policy.router is not None:
            self.reading.check_routes(new)
        self.reading.check_goes_on(self.seen)
        if self._prompt is None:
            self._prompt = self._begin(new)
        prompt = self._prompt
        if isinstance(prompt, EvictingPrompt):
            out = prompt.read(new)
        else:
            out = prompt.read(new, None if self.policy.attender is None else partial(self._attending, prompt))
        self._advance(new, count)
        if isinstance(prompt, Prompt):
            self._go_on(prompt, count)
        self.meter.touch(prompt.dense_bytes)
        if self.reading.is_complete(self.seen) and Need.REPLAY not in self.policy.needs:
            self.compress(None)
        else:
            self._prompt.keep()
            self.measure()
        return out

    def _begin(self, new: NewTokens) -> Prompt | EvictingPrompt:
        reader = self.policy.reader if self.reading.evict else None
        if reader is None or self.reading.prompt_tokens is None:
            prompt = Prompt(self.policy, self.rope_of, new)
            if self._given is not None:
                prompt.rows, self._given = [self._given], None
            return prompt
        return EvictingPrompt(
            self.policy,
            reader,
            self.rope_of,
            new,
            layer_idx=self.layer_idx,
            num_layers=self.num_layers,
            prompt_tokens=self.reading.prompt_tokens,
        )

    def _attending(self, prompt: Prompt, b: int, queries: Tensor) -> Tensor | None:
        """Which tokens of a row take part in the attention; queries: `[H, T, D]`, of the pass."""
        assert self.policy.attender is not None
        kv, observation = self._observed(prompt, b)
        if not self.reading.is_complete(self.seen + queries.shape[1]) or queries.shape[1] != kv.num_tokens:
            raise CacheError(
                "tokens that take part in attention are chosen once, from the whole prompt: read it in one pass, without "
                "`prefill_chunk_size`."
            )
        return self.policy.attender.within(kv, queries, observation)

    def _go_on(self, prompt: Prompt, count: int) -> None:
        """Notes which tokens the layers after this one compute."""
        router = self.policy.router
        if router is None or self.reading.onward is not None:
            return
        onward = router.after(*self._observed(prompt))
        if onward is not None:
            self.reading.note_onward(onward, self.seen, count)

    def _replay(self, observer: ReplayObserver, new: NewTokens) -> Tensor:
        if not isinstance(self._prompt, Prompt):
            raise CacheError("a replay needs a prompt that is still dense; this one is compressed or not read.")
        self.meter.touch(2 * new.k.numel() * new.k.element_size())
        return self._prompt.replay(observer, self.layer_idx, new)

    def _decode(self, content: PagedRows | SlotRows, new: NewTokens) -> Tensor:
        if isinstance(content, SlotRows):
            # a long turn goes in small steps, so that eviction keeps pace and scores stay small; counted from the end,
            # where the rows of a padded batch are aligned
            outs = []
            for a in range(-(-new.num_new % FEW_TOKENS), new.num_new, FEW_TOKENS):
                part = new.part(max(0, a), a + FEW_TOKENS)
                outs.append(part.with_sinks(*content.step(part)))
            return torch.cat(outs, dim=2)
        if new.num_new > FEW_TOKENS:
            return content.extend(new)
        out = new.with_sinks(*content.step(new))
        if self.layer_idx + 1 == self.num_layers:
            self.reading.shared.end_step()
        return out

    # the end of the prompt

    @torch.inference_mode(False)
    @torch.no_grad()
    def compress(self, replay_mass: Tensor | None) -> None:
        """Turns the prompt, dense until now, into what the recipe keeps. replay_mass: `[Hkv, S]` for methods that need it."""
        if self._prompt is None:
            raise CacheError("there is no prompt to compress: it was compressed already, or nothing was read.")
        self._replay_mass = replay_mass
        if self is not self.group[-1]:  # dense until the last layer of the group has read its prompt
            self._prompt.keep()
            self.measure()
        elif self.policy.sharer is not None and len(self.group) > 1:
            self._share()
        elif len(self.group) > 1:
            found = allocate_across(self._read_group(), self.policy, self.num_layers)
            for layer, allocations in zip(self.group, found, strict=True):
                layer._compress(allocations)
        else:
            self._compress(None)

    def _compress(self, allocations: list[Allocation | None] | None) -> None:
        """Compresses the prompt of this layer by itself. allocations: of each row, if they were found from all layers."""
        prompt, self._prompt = self._prompt, None
        replay_mass, self._replay_mass = self._replay_mass, None
        assert prompt is not None, "a layer is compressed once"
        if isinstance(prompt, EvictingPrompt):
            self.content = prompt.compress(self.reading.shared)
        else:
            read = self._read_prompt(prompt, replay_mass)
            self.content = compress_rows(
                read, self.row_seen, self.policy, self.num_layers, self.reading.shared, allocations
            )
        if self.layer_idx == self.num_layers - 1:  # the prompt is over; what was told of it is held no longer
            self.reading.image_mask = self.reading.onward = None
        self.meter.set_layer(self.layer_idx, held_bytes(self.content))
        self.meter.touch(prompt.dense_bytes)

    def _read_prompt(self, prompt: Prompt | EvictingPrompt | None, replay_mass: Tensor | None) -> LayerPrompt:
        assert isinstance(prompt, Prompt), "the layers of a group are read together, and whole"
        return LayerPrompt(
            rows=[prompt.layer_kv(b) for b in range(len(prompt.rows))],
            observers=prompt.observers,
            layer_idx=self.layer_idx,
            replay_mass=replay_mass,
            rope=prompt.rope,
        )

    def _read_group(self) -> list[LayerPrompt]:
        return [layer._read_prompt(layer._prompt, layer._replay_mass) for layer in self.group]

    def _share(self) -> None:
        """Compresses the prompts of all layers of the group into segments with tensors in common."""
        dense_bytes = sum(layer._prompt.dense_bytes for layer in self.group if layer._prompt is not None)
        contents = share_rows(self._read_group(), self.policy, self.num_layers, self.reading.shared)
        for layer, content in zip(self.group, contents, strict=True):
            layer.content, layer._prompt, layer._replay_mass = content, None, None
        self.measure()
        self.meter.touch(dense_bytes)

    def observation(self) -> tuple[LayerKV, Observation]:
        """What was read and observed so far of the one row that is being read; for calibration and training."""
        if not isinstance(self._prompt, Prompt) or len(self._prompt.observers) != 1:
            raise CacheError(
                "calibration reads one row whose prompt is not complete yet; this layer has another state."
            )
        return self._observed(self._prompt)

    def _observed(self, prompt: Prompt, b: int = 0) -> tuple[LayerKV, Observation]:
        kv = prompt.layer_kv(b)
        return kv, prompt.observers[b].observation(
            kv, layer_idx=self.layer_idx, num_layers=self.num_layers, budget_tokens=kv.num_tokens, replay_mass=None
        )

    # accounting

    def measure(self) -> int:
        """Bytes held by this layer now, or by all that share with it, what they share once; brings the meter up to date."""
        together = self.group if self.policy.sharer is not None else [self]
        num_bytes = held_bytes([(layer.content, layer._prompt, layer._given) for layer in together])
        for layer in together:
            self.meter.set_layer(layer.layer_idx, num_bytes if layer is together[0] else 0)
        return num_bytes

    def held_tokens(self) -> list[list[int]]:
        """Held tokens `[B][Hkv]`."""
        if self.content is not None:
            return self.content.held_tokens()
        return self._prompt.held_tokens() if self._prompt is not None else []

    def check_integrity(self) -> None:
        """Raises IntegrityError if an invariant does not hold. For tests, and for production when in doubt."""
        if self.content is not None:
            self.content.check_integrity(self.row_seen)


def _select_rows(content: PagedRows | SlotRows, rows: list[int], shared: Shared) -> PagedRows | SlotRows:
    """The given rows in that order, for a cache whose layers share `shared`."""
    return content.select(rows, shared) if isinstance(content, PagedRows) else content.select(rows)
