"""How tokens of one layer become segments: dense, in pages, or by a method's own encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from steno.cache.policy import LayerPolicy, Selection
from steno.cache.row import Row, pack_kept
from steno.cache.segment import DenseSegment, HeadKV, PagedSegment, Segment
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
    def summarize(self) -> bool:
        """Whether segments carry the key bounds that page selection reads."""
        return self.policy.selector is not None

    @property
    def needs_positions(self) -> bool:
        """Whether `write_tail` must be told the true positions."""
        return self.policy.encoder is not None

    # the prompt

    def write_prompt(self, selection: Selection, observation: Observation | None) -> tuple[Row, HeadKV]:
        """What is kept of a prompt, and the keys and values `[Hkv, n, D]` of its end that begin the tail."""
        row, kv = Row(), selection.kv
        if selection.kept is not None:
            row.kept = pack_kept(selection.kept, kv.num_tokens)
            row.prompt_tokens = kv.num_tokens
        if observation is None:
            return row, (kv.keys, kv.values)
        if selection.log_counts is not None or len({len(index) for index in selection.kept or []}) > 1:
            # a tail has one length for all heads, and no counts
            tokens = self._gathered(selection, observation)
            row.segments.extend(self._ragged_segments(tokens))
            return row, (kv.keys[:, :0], kv.values[:, :0])
        keys, values = kv.keys, kv.values
        positions = [kv.positions] * kv.num_kv_heads
        if selection.kept is not None:
            index = torch.stack(selection.kept)  # [Hkv, n]
            positions = list(kv.positions[index])
            index = index[:, :, None].expand(-1, -1, kv.head_dim)
            keys, values = keys.gather(1, index), values.gather(1, index)
        full = self._full(keys.shape[1])
        if full:
            cut = [p[:full] for p in positions]
            row.segments.extend(self._segments(keys[None, :, :full], values[None, :, :full], [cut], observation))
        return row, (keys[:, full:], values[:, full:])

    def _full(self, num_tokens: int) -> int:
        """How many tokens of a prompt become segments; the others wait in the tail."""
        if self.policy.page_format is not None:
            return num_tokens // self.policy.residual_tokens * self.policy.residual_tokens
        return num_tokens // self._chunk_tokens * self._chunk_tokens

    @property
    def _chunk_tokens(self) -> int:
        if self.policy.page_format is not None:
            return PAGE_TOKENS
        return self.policy.encoder.chunk_tokens if self.policy.encoder is not None else 1

    def _gathered(self, selection: Selection, observation: Observation) -> KeptTokens:
        kv, kept = selection.kv, selection.kept
        assert kept is not None, "only what was chosen can differ by head or have counts"
        return KeptTokens(
            keys=[kv.keys[h, i] for h, i in enumerate(kept)],
            values=[kv.values[h, i] for h, i in enumerate(kept)],
            positions=[kv.positions[i] for i in kept],
            log_counts=selection.log_counts,
            layer_idx=self.layer_idx,
            num_layers=self.num_layers,
            rope=self.rope,
            observation=observation,
        )

    def _ragged_segments(self, tokens: KeptTokens) -> list[Segment]:
        full = [n // self._chunk_tokens * self._chunk_tokens for n in tokens.lengths]
        parts = [
            (_part(tokens, [slice(0, n) for n in full]), False),
            (_part(tokens, [slice(n, None) for n in full]), True),
        ]
        return [self._segment(part, is_rest) for part, is_rest in parts if any(part.lengths)]

    def _segment(self, tokens: KeptTokens, is_rest: bool) -> Segment:
        """A segment of heads of any lengths; is_rest: too few for a page or a chunk."""
        fmt, encoder = self.policy.page_format, self.policy.encoder
        if encoder is not None and not is_rest:
            return _checked(encoder.encode(tokens), tokens)
        heads = list(zip(tokens.keys, tokens.values, strict=True))
        if fmt is None or is_rest:
            return DenseSegment.of(heads, log_counts=tokens.log_counts, summarize=self.summarize)
        return PagedSegment.encode(heads, fmt, log_counts=tokens.log_counts, summarize=self.summarize)

    # tokens side by side

    def write_tail(self, keys: Tensor, values: Tensor, positions: Sequence[list[Tensor]] | None) -> Sequence[Segment]:
        """A segment for each row of keys and values `[R, Hkv, n, D]` from the tail, n a multiple of the residual.

        positions: `[n]` per row and head; None unless `needs_positions`. The tail may go on with its buffer.
        """
        return self._segments(keys, values, positions, None)

    def _segments(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Sequence[list[Tensor]] | None,
        observation: Observation | None,
    ) -> Sequence[Segment]:
        fmt, encoder = self.policy.page_format, self.policy.encoder
        if encoder is not None:
            assert positions is not None, "an encoder is told the positions"
            rows = zip(keys, values, positions, strict=True)
            return [self._encoded(k, v, where, observation) for k, v, where in rows]
        if fmt is not None:
            return PagedSegment.encode_rows(keys, values, fmt, summarize=self.summarize)
        if observation is None:
            keys, values = keys.clone(), values.clone()
        return [DenseSegment.uniform(k, v, summarize=self.summarize) for k, v in zip(keys, values, strict=True)]

    def _encoded(
        self, keys: Tensor, values: Tensor, positions: list[Tensor], observation: Observation | None
    ) -> Segment:
        tokens = KeptTokens(
            keys=list(keys),
            values=list(values),
            positions=positions,
            layer_idx=self.layer_idx,
            num_layers=self.num_layers,
            rope=self.rope,
            observation=observation,
        )
        return self._segment(tokens, False)


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


def _checked(segment: Segment, tokens: KeptTokens) -> Segment:
    if tuple(segment.lengths) != tokens.lengths:
        raise IntegrityError(
            f"an encoder must hold {tokens.lengths} tokens per head; it holds {tuple(segment.lengths)}."
        )
    return segment
