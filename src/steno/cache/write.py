"""How tokens of one layer become segments: dense, in pages, or by a method's own encoder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.cache.policy import LayerPolicy, Selection
from steno.cache.row import Row, pack_kept
from steno.cache.segment import DenseSegment, HeadKV, PagedSegment, Segment
from steno.cache.transformed import Basis
from steno.cache.unequal import UnequalPagedSegment
from steno.errors import IntegrityError
from steno.types import PAGE_TOKENS, KeptTokens, Observation, Rope


@final
@dataclass(frozen=True, kw_only=True)
class SegmentWriter:
    """Writes the segments of one layer as its policy asks. rope: of the layer, for encoders that need it."""

    policy: LayerPolicy
    layer_idx: int
    num_layers: int
    rope: Rope | None = None

    @property
    def needs_positions(self) -> bool:
        """Whether `write_tail` must be told the true positions."""
        return self.policy.encoder is not None or bool(self.policy.transforms)

    @property
    def recent_tokens(self) -> int:
        """So many newest tokens at least stay plain."""
        return max((transform.recent_tokens for transform in self.policy.transforms), default=0)

    # the prompt

    def write_prompt(
        self, selection: Selection, observation: Observation | None, prompt_tokens: int
    ) -> tuple[Row, HeadKV]:
        """What is kept of a prompt, and the keys and values `[Hkv, n, D]` of its end that begin the tail.

        prompt_tokens: of the whole prompt, more than the selection is made from where some went round the layer.
        observation: None of an empty prompt, which fits no basis.
        """
        kv = selection.kv
        if observation is None:
            return _row_of(selection, prompt_tokens), (kv.keys, kv.values)
        if selection.log_counts is not None or len({len(index) for index in selection.kept or []}) > 1:
            # a tail has one length for all heads, and no counts
            row = _row_of(selection, prompt_tokens)
            row.bases, segments = self._ragged_segments(self._gathered(selection, observation))
            row.segments.extend(segments)
            return row, (kv.keys[:, :0], kv.values[:, :0])
        row, full, tail = self.split_prompt(selection, observation, prompt_tokens)
        if full is not None and self._is_plain(row.bases):
            row.segments.extend(self._plain_segments(full.stacked_keys[None], full.stacked_values[None]))
        elif full is not None:
            row.segments.append(self._write(full.tokens, row.bases))
        return row, tail

    def split_prompt(
        self, selection: Selection, observation: Observation, prompt_tokens: int
    ) -> tuple[Row, Full | None, HeadKV]:
        """A row with the first tokens alone, the tokens that are to be its next segment, and those that begin the tail.

        Every head keeps the same number of tokens.
        """
        row, kv = _row_of(selection, prompt_tokens), selection.kv
        keys, values = kv.keys, kv.values
        positions = [kv.positions] * kv.num_kv_heads
        if selection.kept is not None:
            index = torch.stack(selection.kept)  # [Hkv, n]
            positions = list(kv.positions[index])
            index = index[:, :, None].expand(-1, -1, kv.head_dim)
            keys, values = keys.gather(1, index), values.gather(1, index)
        tokens = self._tokens(keys, values, positions, observation)
        row.bases = self._fit(tokens)
        first = min(self._num_first(tokens))
        full = self._full(keys.shape[1] - first)
        if not full:
            return row, None, (keys, values)
        if first:
            heads = [(k[:first], v[:first]) for k, v in zip(keys, values, strict=True)]
            row.segments.append(DenseSegment.of(heads))
        end = first + full
        part = _part(tokens, [slice(first, end)] * kv.num_kv_heads)
        stacked = Full(tokens=part, stacked_keys=keys[:, first:end], stacked_values=values[:, first:end])
        return row, stacked, (keys[:, end:], values[:, end:])

    def _num_first(self, tokens: KeptTokens) -> list[int]:
        """How many tokens of each head stay plain because they are the first of the prompt."""
        bound = max((transform.first_tokens for transform in self.policy.transforms), default=0)
        return [int((p < bound).sum()) if bound else 0 for p in tokens.positions]

    def store(self, tokens: KeptTokens) -> Segment:
        """A segment of tensors in the form of tokens: transformed and quantized as the policy asks."""
        return self._write(tokens, self._fit(tokens))

    def _full(self, num_tokens: int) -> int:
        """How many tokens of a prompt become segments; the others wait in the tail."""
        changes = self.policy.transforms or self.policy.sharer is not None
        if self.policy.page_format is not None or (self.policy.encoder is None and changes):
            unit = self.policy.residual_tokens
        else:
            unit = self.chunk_tokens
        return max(0, num_tokens - self.recent_tokens) // unit * unit

    @property
    def chunk_tokens(self) -> int:
        """Whole numbers of so many tokens can be stored."""
        if self.policy.page_format is not None:
            return PAGE_TOKENS
        return self.policy.encoder.chunk_tokens if self.policy.encoder is not None else 1

    def _is_plain(self, bases: Sequence[Basis]) -> bool:
        return self.policy.encoder is None and not bases

    def _gathered(self, selection: Selection, observation: Observation) -> KeptTokens:
        kv, kept = selection.kv, selection.kept
        assert kept is not None, "only what was chosen can differ by head or have counts"
        keys = [kv.keys[h, i] for h, i in enumerate(kept)]
        values = [kv.values[h, i] for h, i in enumerate(kept)]
        tokens = self._tokens(keys, values, [kv.positions[i] for i in kept], observation)
        return replace(tokens, log_counts=selection.log_counts)

    def _tokens(
        self,
        keys: Iterable[Tensor],
        values: Iterable[Tensor],
        positions: list[Tensor],
        observation: Observation | None,
    ) -> KeptTokens:
        return KeptTokens(
            keys=list(keys),
            values=list(values),
            positions=positions,
            layer_idx=self.layer_idx,
            num_layers=self.num_layers,
            rope=self.rope,
            observation=observation,
        )

    def _fit(self, tokens: KeptTokens) -> tuple[Basis, ...]:
        """A basis of each transform, fit to the tokens in those before it."""
        bases: list[Basis] = []
        for transform in self.policy.transforms:
            tokens = bases[-1].change(tokens) if bases else tokens
            bases.append(transform.fit(tokens))
        return tuple(bases)

    def _ragged_segments(self, tokens: KeptTokens) -> tuple[tuple[Basis, ...], list[Segment]]:
        bases, unit, first = self._fit(tokens), self.chunk_tokens, self._num_first(tokens)
        pairs = list(zip(tokens.lengths, first, strict=True))
        ends = [n + max(0, length - n - self.recent_tokens) // unit * unit for length, n in pairs]
        plain = [_part(tokens, [slice(0, n) for n in first]), _part(tokens, [slice(n, None) for n in ends])]
        whole = _part(tokens, [slice(a, b) for a, b in zip(first, ends, strict=True)])
        segments = [self._write(whole, bases)] if any(whole.lengths) else []
        for part, at in zip(plain, (0, len(segments) + 1), strict=True):
            if any(part.lengths):
                heads = list(zip(part.keys, part.values, strict=True))
                segments.insert(at, DenseSegment.of(heads, log_counts=part.log_counts))
        return bases, segments

    def _write(self, tokens: KeptTokens, bases: Sequence[Basis]) -> Segment:
        """A segment of whole pages or chunks of any heads, in these bases."""
        outer: list[tuple[Basis, KeptTokens]] = []
        for basis in bases:
            outer.append((basis, tokens))
            tokens = basis.change(tokens)
        segment = self._stored(tokens)
        for basis, before in reversed(outer):
            segment = basis.wrap(segment, before)
        return segment

    def _stored(self, tokens: KeptTokens) -> Segment:
        fmt, encoder = self.policy.page_format, self.policy.encoder
        widths = tokens.keys[0].shape[1], tokens.values[0].shape[1]
        if encoder is not None:
            segment = encoder.encode(tokens)
            if tuple(segment.lengths) != tokens.lengths:
                held = tuple(segment.lengths)
                raise IntegrityError(f"an encoder must hold {tokens.lengths} tokens per head; it holds {held}.")
            return segment
        heads = list(zip(tokens.keys, tokens.values, strict=True))
        if fmt is None:
            return DenseSegment.of(heads, log_counts=tokens.log_counts)
        if widths[0] != widths[1]:
            return UnequalPagedSegment.encode(heads, fmt, log_counts=tokens.log_counts)
        return PagedSegment.encode(heads, fmt, log_counts=tokens.log_counts)

    # tokens side by side

    def write_tail(
        self, keys: Tensor, values: Tensor, positions: Sequence[list[Tensor]], bases: Sequence[tuple[Basis, ...]]
    ) -> Sequence[Segment]:
        """A segment for each row of keys and values `[R, Hkv, n, D]` from the tail, n a multiple of the residual.

        positions: `[n]` per row and head, empty unless `needs_positions`; bases: of each row. The tail may go on with its
        buffer.
        """
        if all(self._is_plain(row) for row in bases):
            # clones, as the tail goes on with its buffer
            copied = (keys, values) if self.policy.page_format is not None else (keys.clone(), values.clone())
            return self._plain_segments(*copied)
        rows = zip(keys, values, positions, bases, strict=True)
        return [self._write(self._tokens(k, v, where, None), row) for k, v, where, row in rows]

    def _plain_segments(self, keys: Tensor, values: Tensor) -> Sequence[Segment]:
        if self.policy.page_format is not None:
            return PagedSegment.encode_rows(keys, values, self.policy.page_format)
        return [DenseSegment.uniform(k, v) for k, v in zip(keys, values, strict=True)]


@final
@dataclass(frozen=True, kw_only=True)
class Full:
    """Tokens of a prompt that become a segment, by head and in one piece `[Hkv, n, D]`."""

    tokens: KeptTokens
    stacked_keys: Tensor
    stacked_values: Tensor


def _row_of(selection: Selection, prompt_tokens: int) -> Row:
    kv = selection.kv
    if selection.holds_all(prompt_tokens):
        return Row()
    kept = selection.kept or [torch.arange(kv.num_tokens, device=kv.keys.device)] * kv.num_kv_heads
    return Row(kept=pack_kept([kv.positions[index] for index in kept], prompt_tokens), prompt_tokens=prompt_tokens)


def _part(tokens: KeptTokens, slices: list[slice]) -> KeptTokens:
    """Some tokens of each head."""

    def cut(per_head: list[Tensor]) -> list[Tensor]:
        return [x[part] for x, part in zip(per_head, slices, strict=True)]

    return replace(
        tokens,
        keys=cut(tokens.keys),
        values=cut(tokens.values),
        positions=cut(tokens.positions),
        log_counts=None if tokens.log_counts is None else cut(tokens.log_counts),
    )
