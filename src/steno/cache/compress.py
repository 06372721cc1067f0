"""From the dense prompt of one layer to what its recipe keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from steno.cache.access import Shared
from steno.cache.observe import PromptObserver
from steno.cache.paged import PagedRows
from steno.cache.policy import Allocation, LayerPolicy, Selection
from steno.cache.row import Row
from steno.cache.segment import HeadKV
from steno.cache.slots import SlotBlock, SlotRow, SlotRows
from steno.cache.tail import Tail
from steno.cache.write import Full, SegmentWriter
from steno.types import LayerKV, Observation, Rope


@final
@dataclass(frozen=True, kw_only=True)
class LayerPrompt:
    """What was read of one layer, row by row, and what was seen of it. rope: of the layer, for policies that need it."""

    rows: list[LayerKV]
    observers: list[PromptObserver]
    layer_idx: int
    replay_mass: Tensor | None
    rope: Rope | None


def compress_rows(
    layer: LayerPrompt,
    prompt_tokens: list[int],
    policy: LayerPolicy,
    num_layers: int,
    shared: Shared,
    allocations: Sequence[Allocation | None] | None = None,
) -> PagedRows | SlotRows:
    """prompt_tokens: of each row, more than were read of it where some went round the layer. shared: of all layers of the
    cache. allocations: what was found for each row by `allocate_across`, if layers were asked together.
    """
    writer = SegmentWriter(policy=policy, layer_idx=layer.layer_idx, num_layers=num_layers, rope=layer.rope)
    rows: list[Row] = []
    tails: list[tuple[Tensor, Tensor]] = []
    slots: list[SlotRow] = []
    found = allocations or [None] * len(layer.rows)
    for kv, num_tokens, observer, allocation in zip(layer.rows, prompt_tokens, layer.observers, found, strict=True):
        budget = policy.budget_tokens(kv, num_layers, num_tokens)
        selection, observation = Selection(kv=kv), None
        if kv.num_tokens:
            observation = observer.observation(
                kv,
                layer_idx=layer.layer_idx,
                num_layers=num_layers,
                budget_tokens=budget,
                replay_mass=layer.replay_mass,
                prompt_tokens=num_tokens,
            )
            selection = policy.select(kv, observation, allocation)
        if policy.evictor is not None:
            slots.append(slot_row(selection, budget, num_tokens))
        else:
            row, tail = writer.write_prompt(selection, observation, num_tokens)
            rows.append(row)
            tails.append(tail)
    if policy.evictor is not None:
        return SlotRows(slots, list(prompt_tokens), policy.evictor, layer.rows[0].head_dim)
    return PagedRows(rows, Tail.of(tails, policy.residual_tokens), writer, shared)


def allocate_across(
    layers: Sequence[LayerPrompt], policy: LayerPolicy, num_layers: int
) -> list[list[Allocation | None]]:
    """What each row of each layer may keep, `[L][B]`, found row by row from the scores of all layers."""
    rows: list[Sequence[Allocation | None]] = []
    for b in range(len(layers[0].rows)):
        kvs, observations = zip(*(_observed(layer, b, policy, num_layers) for layer in layers), strict=True)
        is_empty = not kvs[0].num_tokens
        rows.append([None] * len(layers) if is_empty else policy.allocate_across(kvs, observations))
    return [list(layer) for layer in zip(*rows, strict=True)]


def share_rows(layers: Sequence[LayerPrompt], policy: LayerPolicy, num_layers: int, shared: Shared) -> list[PagedRows]:
    """The rows of each layer of a group, out of common tensors; a row with an empty prompt shares nothing.

    shared: of all layers of the cache.
    """
    assert policy.sharer is not None
    writers = [
        SegmentWriter(policy=policy, layer_idx=layer.layer_idx, num_layers=num_layers, rope=layer.rope)
        for layer in layers
    ]
    rows: list[list[Row]] = [[] for _ in layers]
    tails: list[list[HeadKV]] = [[] for _ in layers]
    for b in range(len(layers[0].rows)):
        kvs, observations = zip(*(_observed(layer, b, policy, num_layers) for layer in layers), strict=True)
        split: list[tuple[Row, Full | None, HeadKV]]
        if not kvs[0].num_tokens:
            split = [(Row(), None, (kv.keys, kv.values)) for kv in kvs]
        else:
            selections = policy.select_together(kvs, observations)
            pairs = zip(writers, selections, observations, strict=True)
            split = [writer.split_prompt(selection, seen, kvs[0].num_tokens) for writer, selection, seen in pairs]
        tokens = [full.tokens for _, full, _ in split if full is not None]
        if tokens:
            segments = policy.sharer.share(tokens, writers[0])
            for (row, _, _), segment in zip(split, segments, strict=True):
                row.segments.append(segment)
        for i, (row, _, tail) in enumerate(split):
            row.kept = split[0][0].kept  # one bitmap for all
            rows[i].append(row)
            tails[i].append(tail)
    parts = zip(rows, tails, writers, strict=True)
    return [PagedRows(row, Tail.of(tail, policy.residual_tokens), writer, shared) for row, tail, writer in parts]


def _observed(layer: LayerPrompt, b: int, policy: LayerPolicy, num_layers: int) -> tuple[LayerKV, Observation]:
    """One row of a layer in the form that methods get."""
    kv = layer.rows[b]
    observation = layer.observers[b].observation(
        kv,
        layer_idx=layer.layer_idx,
        num_layers=num_layers,
        budget_tokens=policy.budget_tokens(kv, num_layers),
        replay_mass=layer.replay_mass,
    )
    return kv, observation


def slot_row(selection: Selection, budget: int, prompt_tokens: int) -> SlotRow:
    """A row of slots, for a method that goes on evicting, of a prompt of so many tokens."""
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
            torch.stack([kv.positions[kept[h]] for h in group]),
            torch.stack([state[h] for h in group]).float(),
            budgets[group[0]],
        )
        for group in groups
    ]
    evicted_at = 0 if selection.holds_all(prompt_tokens) else prompt_tokens
    return SlotRow(blocks=blocks, prompt_tokens=prompt_tokens, evicted_at=evicted_at)
