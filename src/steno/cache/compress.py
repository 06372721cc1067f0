"""From the dense prompt of one layer to what its recipe keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from steno.cache.observe import PromptObserver
from steno.cache.paged import PagedRows
from steno.cache.policy import LayerPolicy, Selection
from steno.cache.row import Row, pack_kept
from steno.cache.segment import DenseSegment, HeadKV, PagedSegment
from steno.cache.slots import SlotBlock, SlotRow, SlotRows
from steno.cache.tail import Tail
from steno.types import PAGE_TOKENS, LayerKV


def compress_rows(
    prompts: list[HeadKV],
    observers: list[PromptObserver],
    policy: LayerPolicy,
    *,
    layer_idx: int,
    num_layers: int,
    replay_mass: Tensor | None,
) -> PagedRows | SlotRows:
    """prompts: keys and values `[Hkv, S_b, D]` per row, observers: what was seen of them."""
    rows: list[Row] = []
    tails: list[tuple[Tensor, Tensor]] = []
    slots: list[SlotRow] = []
    for (keys, values), observer in zip(prompts, observers, strict=True):
        kv = LayerKV(keys=keys, values=values, positions=torch.arange(keys.shape[1], device=keys.device))
        budget = policy.budget_tokens(kv, num_layers)
        selection = Selection(kv=kv)
        if kv.num_tokens:
            observation = observer.observation(
                layer_idx=layer_idx, num_layers=num_layers, budget_tokens=budget, replay_mass=replay_mass
            )
            selection = policy.select(kv, observation)
        if policy.evictor is not None:
            slots.append(_slot_row(selection, budget))
        else:
            row, tail = _paged_row(selection, policy)
            rows.append(row)
            tails.append(tail)
    if policy.evictor is not None:
        seen = [k.shape[1] for k, _ in prompts]
        return SlotRows(slots, seen, policy.evictor, prompts[0][0].shape[2])
    return PagedRows(
        rows,
        Tail.of(tails, policy.residual_tokens),
        fmt=policy.page_format,
        residual=policy.residual_tokens,
        summarize=policy.selector is not None,
    )


def _paged_row(selection: Selection, policy: LayerPolicy) -> tuple[Row, tuple[Tensor, Tensor]]:
    kv = selection.kv
    fmt, summarize = policy.page_format, policy.selector is not None
    row = Row()
    empty = kv.keys[:, :0], kv.values[:, :0]
    if selection.kept is None:
        keys, values = kv.keys, kv.values
    else:
        row.kept = pack_kept(selection.kept, kv.num_tokens)
        row.prompt_tokens = kv.num_tokens
        lengths = {len(index) for index in selection.kept}
        if len(lengths) > 1:
            heads = [(kv.keys[h, i], kv.values[h, i]) for h, i in enumerate(selection.kept)]
            row.segments.extend(_ragged_segments(heads, policy))
            return row, empty
        index = torch.stack(selection.kept)[:, :, None].expand(-1, -1, kv.head_dim)  # [Hkv, n, D]
        keys, values = kv.keys.gather(1, index), kv.values.gather(1, index)
    if fmt is None:
        if keys.shape[1]:
            row.segments.append(DenseSegment.uniform(keys, values, summarize=summarize))
        return row, empty
    full = keys.shape[1] // policy.residual_tokens * policy.residual_tokens
    if full:
        row.segments.append(
            *PagedSegment.encode_rows(keys[None, :, :full], values[None, :, :full], fmt, summarize=summarize)
        )
    return row, (keys[:, full:], values[:, full:])


def _ragged_segments(heads: list[HeadKV], policy: LayerPolicy) -> list[DenseSegment | PagedSegment]:
    fmt, summarize = policy.page_format, policy.selector is not None
    if fmt is None:
        return [DenseSegment.of(heads, summarize=summarize)]
    full = [k.shape[0] // PAGE_TOKENS * PAGE_TOKENS for k, _ in heads]
    segments: list[DenseSegment | PagedSegment] = []
    if any(full):
        pages = [(k[:n], v[:n]) for (k, v), n in zip(heads, full, strict=True)]
        segments.append(PagedSegment.encode(pages, fmt, summarize=summarize))
    rest = [(k[n:], v[n:]) for (k, v), n in zip(heads, full, strict=True)]
    if any(len(k) for k, _ in rest):
        segments.append(DenseSegment.of(rest, summarize=summarize))
    return segments


def _slot_row(selection: Selection, budget: int) -> SlotRow:
    kv = selection.kv
    everything = torch.arange(kv.num_tokens, device=kv.keys.device)
    kept = selection.kept or [everything] * kv.num_kv_heads
    state = selection.state or [torch.zeros(kv.num_tokens, device=kv.keys.device)] * kv.num_kv_heads
    lengths = [len(index) for index in kept]
    # heads that keep everything so far may still grow to the budget; the others stay at what they were given
    budgets = [budget if n == kv.num_tokens and selection.kept is None else n for n in lengths]
    heads = range(kv.num_kv_heads)
    groups = [list(heads)] if len(set(budgets)) == 1 and len(set(lengths)) == 1 else [[h] for h in heads]
    blocks = [
        SlotBlock.of(
            torch.stack([kv.keys[h, kept[h]] for h in group]),
            torch.stack([kv.values[h, kept[h]] for h in group]),
            torch.stack([kept[h] for h in group]),
            torch.stack([state[h] for h in group]).float(),
            budgets[group[0]],
        )
        for group in groups
    ]
    return SlotRow(blocks=blocks, evicted_at=0 if selection.kept is None else kv.num_tokens)
