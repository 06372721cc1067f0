"""A span table on its device, cut into equal pieces of work for a kernel that runs many programs at once."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from enum import IntEnum, auto

import torch
from torch import Tensor

from steno.errors import BadArgument
from steno.types import PAGE_TOKENS

from .spans import DenseSpan, Span
from .table import Column, SpanTable

ALIGNMENT_BYTES = 16
"""The widest load of a GPU."""


class Item(IntEnum):
    """Columns of the items: a run of pages of one entry, for one program."""

    HEAD = 0
    ENTRY = auto()
    FIRST_PAGE = auto()
    KIND = auto()
    LAST_SPAN = auto()
    """1: the span ends with the new tokens, if attention is causal."""


@dataclass(frozen=True)
class Kind:
    """What a kernel must know about a span when it is compiled.

    dense_format: as in `Column.FORMAT`, or -1; bits: of packed codes, or 0. Groups are cut to what there is of them.
    is_aligned: every row of a dense span, or every page of codes, begins at a multiple of 16 bytes.
    """

    dense_format: int
    bits: int
    key_group: int
    value_group: int
    is_aligned: bool


@dataclass
class Plan:
    """Belongs to one table; only `entries` ever changes.

    entries: `[n, len(Column)]` int64, the table's own on the device. items: `[m, len(Item)]` int32, heads in order;
    item_offsets: `[B * Hkv + 1]` int32 into them.
    """

    entries: Tensor
    items: Tensor
    item_offsets: Tensor
    kinds: tuple[Kind, ...]
    pages_per_item: int
    num_programs: int
    version: int


def plan_of(table: SpanTable, device: torch.device, num_programs: int) -> Plan:
    """The plan of `table` with about `num_programs` items, kept by the table; new tail lengths only copy its entries.

    Raises
    ------
    BadArgument: a tensor of the table lies on another device, or packed codes are not aligned.
    """
    plan = table.plan
    if plan is None or (plan.entries.device, plan.num_programs) != (device, num_programs):
        table.plan = plan = _build(table, device, num_programs)
    elif plan.version != table.version:
        # CUDA has taken the bytes when this returns: the entries are not in pinned memory
        plan.entries.copy_(table.entries, non_blocking=True)
        plan.version = table.version
    return plan


def _build(table: SpanTable, device: torch.device, num_programs: int) -> Plan:
    spans = [span for row in table.rows for head in row for span in head]
    for x in (*(x for span in spans for x in span.tensors), *table.page_ids.values()):
        if x.device != device:
            raise BadArgument(f"the spans and page ids of the table must lie on {device}, as q does; got {x.device}.")
    kinds = [_kind(span, entry) for span, entry in zip(spans, table.entries.tolist(), strict=True)]
    distinct = sorted(set(kinds), key=astuple)
    # what a span can hold, not what counts of it now: the items outlive a change of the tail lengths
    capacity = torch.tensor([-(-span.num_tokens // PAGE_TOKENS) for span in spans], dtype=torch.int64)
    num_page_ids = table.entries[:, Column.NUM_PAGE_IDS]
    num_pages = torch.where((num_page_ids >= 0) & (capacity > 0), num_page_ids, capacity)
    pages_per_item = _power_of_two(int(num_pages.sum()) // num_programs)
    num_items = -(-num_pages // pages_per_item)  # of each entry
    ends = torch.cat([num_items.new_zeros(1), num_items.cumsum(0)])
    entry = torch.repeat_interleave(num_items)
    head = torch.repeat_interleave(table.offsets.diff())[entry]
    items = torch.empty(len(entry), len(Item), dtype=torch.int32)
    items[:, Item.HEAD] = head
    items[:, Item.ENTRY] = entry
    items[:, Item.FIRST_PAGE] = (torch.arange(len(entry)) - ends[entry]) * pages_per_item
    items[:, Item.KIND] = torch.tensor([distinct.index(kind) for kind in kinds], dtype=torch.int64)[entry]
    items[:, Item.LAST_SPAN] = entry == table.offsets[1:][head] - 1
    return Plan(
        entries=table.entries.to(device, copy=True),
        items=items.to(device),
        item_offsets=ends[table.offsets.long()].to(device, torch.int32),
        kinds=tuple(distinct),
        pages_per_item=pages_per_item,
        num_programs=num_programs,
        version=table.version,
    )


def _kind(span: Span, entry: list[int]) -> Kind:
    addresses = entry[Column.KEYS] | entry[Column.VALUES]
    if isinstance(span, DenseSpan):
        row_bytes = span.head_dim * span.keys.element_size()
        return Kind(entry[Column.FORMAT], 0, 0, 0, (addresses | row_bytes) % ALIGNMENT_BYTES == 0)
    if addresses % ALIGNMENT_BYTES:
        raise BadArgument(f"packed codes must begin at a multiple of {ALIGNMENT_BYTES} bytes; these do not.")
    fmt = span.pages.fmt
    if fmt.codebook is not None:
        raise BadArgument(f"Triton kernels do not read pages of {fmt.codebook}; use impl='auto' or 'naive'.")
    return Kind(-1, fmt.bits, fmt.key_group, min(fmt.value_group, span.head_dim), True)


def _power_of_two(size: int) -> int:
    """The largest one that is at most `size`, or 1: few sizes, as a kernel is compiled for each."""
    return 1 << max(size, 1).bit_length() - 1
