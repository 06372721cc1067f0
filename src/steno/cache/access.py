"""What a decode step reads of the segments: an index over them, and the view from which an access method chooses.

R = B * Hkv: the KV heads of all rows, those of a row side by side. The tail is always read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from steno.cache.groups import SpanGroup
from steno.cache.policy import Selector
from steno.cache.ragged import beyond, padded
from steno.cache.segment import TILE_TOKENS, Segment
from steno.cache.text import TokenText
from steno.kernels.attention import SpanTable, gather_tokens
from steno.types import PAGE_TOKENS, IndexItems


@final
@dataclass(kw_only=True)
class Shared:
    """What the layers of one cache tell each other within a step, and what they are told of the text. Mutable.

    salience: by the layer that found it, how much each position `[R, seen]` matters in this step; page_sums: the same
    summed over pages, where layers lie alike. text: None if no method needs it.
    """

    salience: dict[int, Tensor] = field(default_factory=dict)
    page_sums: dict[int, tuple[Layout, Tensor]] = field(default_factory=dict)
    text: TokenText | None = None

    def end_step(self) -> None:
        """Lets go of what counted for one step."""
        self.salience.clear()
        self.page_sums.clear()

    def fork(self) -> Shared:
        """For a cache that goes its own way; a step that is under way is not its own."""
        return Shared(text=None if self.text is None else self.text.fork())


@final
@dataclass(frozen=True, kw_only=True)
class Choice:
    """What a step reads of the segments: either pages `[R, P]` or tokens `[R, n]`, bool, both padded with False.

    pages: of 64 tokens of a head of one segment, the last of them maybe partial; tokens: those of all segments in order.
    """

    pages: Tensor | None = None
    tokens: Tensor | None = None


@final
@dataclass(frozen=True)
class SegmentIndex:
    """What an access method knows of the tokens in segments: for every KV head some vectors, flat. Immutable.

    vectors: `[N, W]`, those of head r behind those of head r - 1; counts: `[R]` how many each has. lengths: `[N]` int32, the
    tokens behind each vector, where they differ. fixed: `[R, F]`, what the method fixed when the prompt was complete.
    """

    vectors: Tensor
    counts: Tensor
    lengths: Tensor | None
    fixed: Tensor | None

    @classmethod
    def of(cls, heads: Sequence[Sequence[IndexItems]], fixed: Tensor | None) -> SegmentIndex:
        """From the items of each of R heads, in pieces, oldest first; every head has at least one piece, maybe empty."""
        pieces = [piece for head in heads for piece in head]
        lengths = [piece.lengths for piece in pieces if piece.lengths is not None]
        return cls(
            torch.cat([piece.vectors for piece in pieces]),
            torch.tensor([sum(len(piece.vectors) for piece in head) for head in heads]),
            torch.cat(lengths) if lengths else None,
            fixed,
        )

    def heads(self) -> list[IndexItems]:
        """The items of each head, as views."""
        counts = self.counts.tolist()
        lengths: Iterable[Tensor | None] = [None] * len(counts) if self.lengths is None else self.lengths.split(counts)
        pairs = zip(self.vectors.split(counts), lengths, strict=True)
        return [IndexItems(vectors=vectors, lengths=tokens) for vectors, tokens in pairs]

    def with_items(self, new: Mapping[int, Sequence[IndexItems]]) -> SegmentIndex:
        """With more items behind those of some heads."""
        return SegmentIndex.of([[old, *new.get(r, ())] for r, old in enumerate(self.heads())], self.fixed)

    def select(self, rows: Sequence[int], num_kv_heads: int) -> SegmentIndex:
        """The heads of the given rows, in that order."""
        heads = [b * num_kv_heads + h for b in rows for h in range(num_kv_heads)]
        if heads == list(range(len(self.counts))):
            return self
        old = self.heads()
        return SegmentIndex.of([[old[r]] for r in heads], None if self.fixed is None else self.fixed[heads])


def index_items(
    selector: Selector,
    segments: Sequence[Segment],
    fixed: Tensor | None,
    sentences: Sequence[Tensor] | None,
    dtype: torch.dtype,
    num_kv_heads: int,
) -> list[list[IndexItems]]:
    """Items of each KV head over some segments of a row, those of one segment in one piece.

    fixed: `[Hkv, F]` of the row; sentences: per head the sentence of each token in these segments.
    """
    heads: list[list[IndexItems]] = [[] for _ in range(num_kv_heads)]
    first = [0] * num_kv_heads
    for segment in segments:
        for h, (keys, _) in enumerate(segment.decode(dtype)):
            last = first[h] + len(keys)
            where = None if sentences is None else sentences[h][first[h] : last]
            heads[h].append(selector.summarize(keys, None if fixed is None else fixed[h], where))
            first[h] = last
    return heads


@final
@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the tokens of segments lie: E spans, head by head, those of a head oldest first. All int64.

    group, entry: `[E]`, the group of spans and the entry in its table; tokens, pages: `[E]`; token_ends, page_ends: `[E]` their
    running totals; head_tokens, head_pages: `[R]`; page_token_ends: `[P]`, how many tokens there are up to the end of a page.
    """

    group: Tensor
    entry: Tensor
    tokens: Tensor
    pages: Tensor
    token_ends: Tensor
    page_ends: Tensor
    head_tokens: Tensor
    head_pages: Tensor
    page_token_ends: Tensor

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, int, int]], num_heads: int) -> Layout:
        """From (head, group, entry, tokens) of each span."""
        head, group, entry, tokens = torch.tensor(spans, dtype=torch.int64).reshape(-1, 4).T.contiguous()
        pages = (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS
        token_ends, page_ends = tokens.cumsum(0), pages.cumsum(0)
        span = torch.repeat_interleave(pages)  # [P]
        page = torch.arange(len(span)) - (page_ends - pages)[span]
        ends = (token_ends - tokens)[span] + (page + 1) * PAGE_TOKENS
        zeros = torch.zeros(num_heads, dtype=torch.int64)
        return cls(
            group=group.clone(),
            entry=entry.clone(),
            tokens=tokens.clone(),
            pages=pages,
            token_ends=token_ends,
            page_ends=page_ends,
            head_tokens=zeros.index_add(0, head, tokens),
            head_pages=zeros.index_add(0, head, pages),
            page_token_ends=torch.minimum(ends, token_ends[span]),
        )


@final
@dataclass(frozen=True, kw_only=True)
class Attention:
    """Softmax weights fp32 of each query head, `[R, G, n]` to tokens in segments, `[R, G, t]` to the tail; 0 beyond them."""

    segments: Tensor
    tail: Tensor


@final
@dataclass(frozen=True, kw_only=True)
class AccessStep:
    """One token per row in one layer, as an access method sees it.

    queries: `[R, G, D]` fp32, post-RoPE. seen, tail_tokens: `[R]`, tokens seen by the row, the new one included, and of these
    in the tail. index: None if the method keeps none. groups: the spans. state: what the method keeps of each row from step
    to step, tensors with B lines; it may be changed. token_positions: `[N]`, the true positions of the tokens in segments,
    head by head; None if every token is held.
    """

    layer_idx: int
    num_layers: int
    num_rows: int
    queries: Tensor
    scale: float
    softcap: float | None
    seen: Tensor
    tail_tokens: Tensor
    groups: Sequence[SpanGroup]
    layout: Layout
    index: SegmentIndex | None
    state: dict[str, Tensor]
    shared: Shared
    token_positions: Callable[[], Tensor | None]

    @property
    def num_kv_heads(self) -> int:
        return len(self.queries) // self.num_rows

    @property
    def head_tokens(self) -> Tensor:
        """Tokens of each head in segments, `[R]`."""
        return self.layout.head_tokens

    @property
    def head_pages(self) -> Tensor:
        """Pages of each head in segments, `[R]`."""
        return self.layout.head_pages

    @property
    def fixed(self) -> Tensor:
        """What the method fixed for each head when its prompt was complete, `[R, F]`."""
        assert self.index is not None, "a method that fixes something summarizes"
        assert self.index.fixed is not None, "the method fixes something"
        return self.index.fixed

    def rank(self, vectors: Tensor) -> Tensor:
        """Products `[R, Q, items]` fp32 of vectors `[R, Q, W]` and those of the index; -inf where a head has no more items."""
        assert self.index is not None, "a method that ranks summarizes"
        items, counts = self.index.vectors.float(), self.index.counts
        widest = int(counts.max())
        if widest == 0:  # all is in the tail
            return vectors.new_zeros(*vectors.shape[:2], 0)
        if bool((counts == widest).all()):
            return vectors @ items.view(len(counts), widest, items.shape[-1]).mT
        owner = torch.repeat_interleave(counts).to(items.device)
        flat = torch.bmm(vectors[owner], items[:, :, None])[:, :, 0]  # [N, Q]
        return padded(flat, counts, -torch.inf).mT

    def item_lengths(self) -> Tensor:
        """Tokens behind each item of the index, `[R, items]` int64, 0 where a head has no more."""
        assert self.index is not None, "only an index has items"
        assert self.index.lengths is not None, "the method's items have lengths"
        return padded(self.index.lengths.long(), self.index.counts, 0)

    def weights(self) -> Attention:
        """Softmax attention of every query to all tokens held.

        Reads every key of the layer; of those in segments it opens `TILE_TOKENS` of a head at a time.
        """
        counts, tail = self.head_tokens, self.groups[0].table.tail
        assert tail is not None, "the plain group has the tail"
        logits = padded(self._segment_logits(), counts, 0).mT  # [R, G, n]
        newest = self._logits(tail[0].flatten(0, 1)[:, : int(self.tail_tokens.max())], self.queries)
        parts = [
            x.masked_fill(beyond(n, x.shape[2], x.device)[:, None], -torch.inf)
            for x, n in ((logits, counts), (newest, self.tail_tokens))
        ]
        both = torch.cat(parts, dim=2).softmax(dim=2)
        return Attention(segments=both[:, :, : logits.shape[2]], tail=both[:, :, logits.shape[2] :])

    def _segment_logits(self) -> Tensor:
        """Of all tokens in segments, head by head: `[N, G]`."""
        layout, batch = self.layout, self.queries.unflatten(0, (self.num_rows, -1)).flatten(1, 2)[:, :, None]
        span = torch.repeat_interleave(layout.tokens)  # [N]
        place = torch.arange(len(span)) - (layout.token_ends - layout.tokens)[span]
        out = self.queries.new_zeros(len(span), self.queries.shape[1])
        for g, group in enumerate(self.groups):
            where = (layout.group[span] == g).nonzero()[:, 0]
            counts = _of_group(self.head_tokens, layout, g, group, self.num_kv_heads).tolist()
            queries = group.turned(batch).unflatten(1, (self.num_kv_heads, -1)).flatten(0, 1)[:, :, 0]  # [heads, G, Dk]
            for query, mine in zip(queries, where.split(counts), strict=True):
                for tile in mine.split(TILE_TOKENS):
                    got = gather_tokens(
                        group.table, layout.entry[span[tile]], place[tile], device=query.device, values=False
                    )
                    logits = self._logits(got.keys, query).mT  # [m, G]
                    out[tile.to(out.device)] = logits if got.log_counts is None else logits + got.log_counts[:, None]
        return out

    def _logits(self, keys: Tensor, queries: Tensor) -> Tensor:
        logits = queries @ keys.float().mT * self.scale  # [R, G, n]
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    # what one layer finds for others

    def share(self, segments: Tensor, tail: Tensor, *, between_heads: bool) -> None:
        """Tells later layers of this step how much each token matters: weights `[R, n]` and `[R, t]`, laid out as Attention.

        between_heads: the largest of a row's heads counts for all of them.
        """
        device = segments.device
        owner = torch.arange(len(segments), device=device)[:, None]
        seen, counts = self.seen.to(device), self.tail_tokens.to(device)
        salience = segments.new_zeros(len(segments), int(self.seen.max()))
        positions = self.token_positions()
        if positions is None:
            salience[:, : segments.shape[1]] = segments
        else:
            valid = ~beyond(self.head_tokens, segments.shape[1], device)
            salience[owner.expand_as(segments)[valid], positions] = segments[valid]
        where = (seen - counts)[:, None] + torch.arange(tail.shape[1], device=device)  # [R, t]
        valid = ~beyond(self.tail_tokens, tail.shape[1], device)
        salience[owner.expand_as(tail)[valid], where[valid]] = tail[valid]
        if between_heads:
            rows = salience.unflatten(0, (self.num_rows, -1))  # [B, Hkv, seen]
            salience = rows.amax(1, keepdim=True).expand_as(rows).flatten(0, 1)
        self.shared.salience[self.layer_idx] = salience
        self.shared.page_sums.pop(self.layer_idx, None)

    def page_sums(self, source: int) -> Tensor:
        """What layer `source` shared in this step, summed over each page: `[R, P]` fp32, -inf where a head has no more.

        Tokens are told by their true positions, as layers may hold different ones.
        """
        positions, layout = self.token_positions(), self.layout
        known = self.shared.page_sums.get(source)
        if positions is None and known is not None and torch.equal(known[0].tokens, layout.tokens):
            return known[1]
        salience = self.shared.salience[source]
        if positions is None:
            widest = int(self.head_tokens.max())
            flat = salience[:, :widest][~beyond(self.head_tokens, widest, salience.device)]
        else:
            owner = torch.repeat_interleave(self.head_tokens).to(salience.device)
            flat = salience[owner, positions]
        totals = torch.nn.functional.pad(flat.double().cumsum(0), (1, 0))[layout.page_token_ends.to(flat.device)]
        sums = padded(totals.diff(prepend=totals.new_zeros(1)).float(), self.head_pages, -torch.inf)
        if positions is None:
            self.shared.page_sums[source] = (layout, sums)
        return sums


def read_choice(groups: Sequence[SpanGroup], layout: Layout, choice: Choice, device: torch.device) -> list[SpanTable]:
    """The tables of all groups that read only what was chosen, and the tails."""
    if choice.tokens is not None:
        head, span, place = _spans_of(choice.tokens, layout.head_tokens, layout.token_ends, layout.tokens)
        return [_read_tokens(g, group, layout, head, span, place, device) for g, group in enumerate(groups)]
    assert choice.pages is not None, "a choice is of pages or of tokens"
    _, span, place = _spans_of(choice.pages, layout.head_pages, layout.page_ends, layout.pages)
    tables = []
    for g, group in enumerate(groups):
        mine = layout.group[span] == g
        counts = torch.bincount(layout.entry[span[mine]], minlength=len(group.table.entries))
        if group.table.tail is not None:
            counts[group.table.tail_entries] = -1
        tables.append(group.table.with_page_list(place[mine].to(device, torch.int32), counts))
    return tables


def _read_tokens(
    g: int, group: SpanGroup, layout: Layout, head: Tensor, span: Tensor, place: Tensor, device: torch.device
) -> SpanTable:
    """The table of a group with only those of the tokens at `place` of `span` that lie in it; head: `[m]`."""
    mine = layout.group[span] == g
    got = gather_tokens(group.table, layout.entry[span[mine]], place[mine], device=device)
    assert got.values is not None, "values were asked for"
    chosen = torch.bincount(head[mine], minlength=len(layout.head_tokens))
    counts = chosen.unflatten(0, (-1, group.table.num_kv_heads))[group.rows].flatten()
    return group.table.with_tokens(got.keys, got.values, got.log_counts, counts)


def _of_group(head_tokens: Tensor, layout: Layout, g: int, group: SpanGroup, num_kv_heads: int) -> Tensor:
    """How many tokens each head of a group's rows has in it."""
    head = torch.searchsorted(head_tokens.cumsum(0), layout.token_ends - layout.tokens, right=True)
    mine = (layout.group == g) & (layout.tokens > 0)
    counts = torch.zeros_like(head_tokens).index_add(0, head[mine], layout.tokens[mine])
    return counts.unflatten(0, (-1, num_kv_heads))[group.rows].flatten()


def _spans_of(chosen: Tensor, counts: Tensor, ends: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Head, span and place in it of each chosen one, all `[m]` in order. ends, sizes: `[E]`; counts: `[R]`."""
    chosen = chosen.cpu()
    places = torch.arange(int(counts.sum()))
    index = places[
        chosen.flatten() if chosen.numel() == len(places) else chosen[~beyond(counts, chosen.shape[1], counts.device)]
    ]
    span = torch.searchsorted(ends, index, right=True)
    return torch.searchsorted(counts.cumsum(0), index, right=True), span, index - (ends - sizes)[span]
