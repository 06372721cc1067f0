"""The mergers against their papers: what must be lossless is, and a loop per token says the same."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_layers import make_layer
from torch import Tensor

from steno.kernels.attention import attend_heads
from steno.methods import EMS, MERGERS, Chelsea, Evict, KVMerger, LookM, RazorCompensation
from steno.methods.merge.kvmerger import pivots_of
from steno.methods.merge.nearest import BLOCK, nearest_keys
from steno.types import LayerKV, Merged

OBS = make_layer(1)[1]


def layer(keys: Tensor, values: Tensor | None = None) -> LayerKV:
    values = torch.randn(keys.shape, generator=torch.Generator().manual_seed(9)) if values is None else values
    return LayerKV(keys=keys, values=values, positions=torch.arange(keys.shape[1]))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(scores: Tensor, count: int) -> Tensor:
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter(1, scores.argsort(dim=1, descending=True, stable=True)[:, :count], True)


def answer(kv: LayerKV, kept: Tensor, counts: Tensor | None = None, seed: int = 5) -> Tensor:
    """What three query heads per KV head find in the kept entries."""
    heads = [(kv.keys[h, m].float(), kv.values[h, m].float()) for h, m in enumerate(kept)]
    logs = None if counts is None else [counts[h, m].log() for h, m in enumerate(kept)]
    q = draw(3 * len(kept), 2, kv.head_dim, seed=seed)
    return attend_heads(q, heads, scale=kv.head_dim**-0.5, log_counts=logs)[0]


def loss(kv: LayerKV, merged: Merged) -> float:
    """The largest difference between what is found in the merged entries and in all tokens."""
    found = answer(merged.kv, merged.kept, merged.counts)
    return float((found - answer(kv, torch.ones_like(merged.kept))).abs().max())


def same(a: LayerKV, b: LayerKV, kept: Tensor) -> bool:
    return torch.equal(a.keys[kept], b.keys[kept]) and torch.equal(a.values[kept], b.values[kept])


@pytest.mark.parametrize("cls", MERGERS.values(), ids=lambda cls: cls.id)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 999),
    num_tokens=st.integers(1, 40),
    budgets=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    num_protected=st.integers(0, 6),
    dim=st.sampled_from([3, 64, 80, 128]),
    levels=st.sampled_from([1, 3, 1000]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_budget_of_each_head_is_exact(
    cls: Any,
    seed: int,
    num_tokens: int,
    budgets: list[int],
    num_protected: int,
    dim: int,
    levels: int,
    dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (len(budgets), num_tokens), generator=g).float()
    scores[:, max(0, num_tokens - num_protected) :] = torch.inf
    kv, obs = make_layer(num_tokens, hkv=len(budgets), dim=dim, dtype=dtype, seed=seed)
    kept = torch.cat([best(scores[h : h + 1], min(n, num_tokens)) for h, n in enumerate(budgets)])
    merged = cls().merge(kv, kept, scores, obs)
    assert torch.equal(merged.kept.sum(1), kept.sum(1))
    assert torch.isfinite(merged.kv.keys).all()
    assert torch.isfinite(merged.kv.values).all()
    if cls is not LookM:  # which merges into the window too
        spared = kept & torch.isposinf(scores)
        if cls is RazorCompensation:  # which has nothing else to give where all that is kept is protected
            spared &= (kept & ~torch.isposinf(scores)).any(1, keepdim=True)
        assert (merged.kept | ~spared).all()
        assert same(merged.kv, kv, spared)
    if merged.counts is not None:
        assert (merged.counts[spared] == 1).all()
        assert (merged.counts.frac() == 0).all()


@pytest.mark.parametrize(
    "merger", [KVMerger(), EMS(), Chelsea(), LookM(), *(LookM(strategy=s) for s in ("averaged", "weighted"))]
)
def test_heads_are_merged_by_themselves(merger: Any) -> None:
    kv, scores = layer(draw(3, 30, 8)), draw(3, 30, seed=1)
    kept = torch.stack([best(scores[h : h + 1], n)[0] for h, n in enumerate((7, 12, 30))])
    together = merger.merge(kv, kept, scores, OBS)
    for h in range(3):
        alone = layer(kv.keys[h : h + 1], kv.values[h : h + 1])
        one = merger.merge(alone, kept[h : h + 1], scores[h : h + 1], OBS)
        assert torch.equal(one.kept[0], together.kept[h])
        assert torch.allclose(one.kv.keys[0], together.kv.keys[h], atol=1e-6)
        assert torch.allclose(one.kv.values[0], together.kv.values[h], atol=1e-6)


def test_nearest_keys_in_blocks() -> None:
    keys, others = draw(2 * BLOCK + 3, 5), draw(7, 5, seed=1)
    cosine, index = nearest_keys(keys, others)
    expected = torch.cosine_similarity(keys[:, None], others[None], dim=-1)
    assert torch.allclose(cosine, expected.amax(1), atol=1e-6)
    assert torch.allclose(expected.gather(1, index[:, None])[:, 0], cosine, atol=1e-6)
    assert nearest_keys(torch.eye(3)[1:2], torch.eye(3)[[0, 1, 1]])[1].item() == 1  # the first of equals


# RazorAttention's compensation token


def test_a_compensation_token_of_equal_tokens_loses_nothing() -> None:
    kv, scores = layer(draw(2, 50, 64)), torch.arange(50.0).repeat(2, 1)
    kept = best(scores, 9)
    kv.keys[:, :42], kv.values[:, :42] = kv.keys[:, :1].clone(), kv.values[:, :1].clone()
    merged = RazorCompensation().merge(kv, kept, scores, OBS)
    assert merged.counts is not None
    assert merged.counts[:, 41].tolist() == [42, 42]
    assert (merged.counts[:, 42:] == 1).all()
    assert loss(kv, merged) < 1e-5
    assert loss(kv, Merged(kv=merged.kv, kept=kept)) > 0.01  # without the count the token is nearly invisible


def test_a_compensation_token_at_equal_logits_gives_the_mean() -> None:
    kv = layer(torch.ones(1, 30, 8))
    merged = RazorCompensation().merge(kv, best(draw(1, 30), 4), draw(1, 30), OBS)
    assert torch.allclose(answer(merged.kv, merged.kept, merged.counts)[0, 0], kv.values[0].mean(0), atol=1e-6)


def test_the_compensation_token_takes_the_slot_of_the_lowest() -> None:
    scores = torch.tensor([[torch.inf, 1, 2, 5, 7, 9], [torch.inf] * 6])
    kept = torch.tensor([[1, 0, 0, 0, 1, 1], [1, 0, 0, 0, 1, 1]], dtype=torch.bool)
    kv = layer(draw(2, 6, 4))
    merged = RazorCompensation().merge(kv, kept, scores, OBS)
    assert merged.counts is not None
    assert merged.counts.tolist() == [[1, 1, 1, 1, 4, 1]] * 2  # among equals the one beside the dropped
    assert torch.allclose(merged.kv.keys[0, 4], kv.keys[0, 1:5].mean(0), atol=1e-6)


# KVMerger


def duplicates(seed: int = 0) -> tuple[LayerKV, int]:
    """Runs of equal neighbours in two heads, and how many runs each has."""
    lengths = torch.tensor([1, 4, 2, 1, 3, 5, 1, 2, 2, 1])
    keys, values = draw(2, 10, 16, seed=seed), draw(2, 10, 16, seed=seed + 1)
    return layer(keys.repeat_interleave(lengths, 1), values.repeat_interleave(lengths, 1)), len(lengths)


def test_runs_of_equal_tokens_merge_without_loss_if_they_count() -> None:
    kv, runs = duplicates()
    scores = draw(2, kv.num_tokens, seed=3)
    kept = best(scores, runs)
    merged = KVMerger(recent_share=0, important_share=0).merge(kv, kept, scores, OBS)
    assert merged.counts is not None
    assert merged.counts[merged.kept].sum() == 2 * kv.num_tokens
    assert loss(kv, merged) < 1e-5
    as_published = KVMerger(recent_share=0, important_share=0, size_on="value").merge(kv, kept, scores, OBS)
    assert as_published.counts is None
    assert loss(kv, as_published) > 0.1


def test_kvmerger_without_similar_neighbours_evicts() -> None:
    keys = torch.eye(20)[None].repeat(2, 1, 1)
    scores = draw(2, 20, seed=1)
    kept = best(scores, 8)
    merged = KVMerger(recent_share=0).merge(layer(keys), kept, scores, OBS)
    assert torch.equal(merged.kept, kept)
    assert same(merged.kv, layer(keys), kept)


@given(seed=st.integers(0, 99), num_tokens=st.integers(2, 40), budget=st.integers(1, 39))
@settings(deadline=None)
def test_kvmerger_by_hand(seed: int, num_tokens: int, budget: int) -> None:
    """One entry at a time: the most similar neighbours that are left, then the means around the best of each run."""
    merger = KVMerger(threshold=0.2, sigma=2.0)
    budget = min(budget, num_tokens)
    kv = layer(draw(1, num_tokens, 6, seed=seed).cumsum(1) + 1)
    scores = draw(1, num_tokens, seed=seed + 1)
    kept = best(scores, budget)
    merged = merger.merge(kv, kept, scores, OBS)
    top = scores[0].argsort(descending=True).tolist()[: int(0.24 * budget)]
    fixed = {*top, *range(num_tokens - int(0.34 * budget), num_tokens)}
    cosine = torch.cosine_similarity(kv.keys[0, 1:], kv.keys[0, :-1], dim=-1)
    runs = [[i] for i in range(num_tokens)]
    for i in cosine.argsort(descending=True, stable=True).tolist():
        if len(runs) > budget and cosine[i] > 0.2 and not {i, i + 1} & fixed:
            left, right = (next(run for run in runs if j in run) for j in (i, i + 1))
            runs.remove(right)
            left.extend(right)
    pivots = [max(run, key=lambda i: float(scores[0, i])) for run in runs]
    order = sorted(range(len(runs)), key=lambda r: (pivots[r] not in fixed, -float(scores[0, pivots[r]])))[:budget]
    assert merged.kept[0].nonzero()[:, 0].tolist() == sorted(pivots[r] for r in order)
    for r in order:
        run, pivot = runs[r], pivots[r]
        w = [math.exp(-float((kv.keys[0, i] - kv.keys[0, pivot]).square().sum()) / 8) for i in run]
        for new, old in ((merged.kv.keys, kv.keys), (merged.kv.values, kv.values)):
            mean = sum(wi * old[0, i] for wi, i in zip(w, run, strict=True)) / sum(w)
            assert torch.allclose(new[0, pivot], mean, atol=1e-4)
        assert merged.counts is not None
        assert merged.counts[0, pivot] == len(run)
        assert pivot not in fixed or torch.equal(merged.kv.keys[0, pivot], kv.keys[0, pivot])


def test_the_width_of_kvmerger() -> None:
    kv = layer(1 + 0.1 * draw(1, 8, 4))
    scores = torch.tensor([[0.0, 0, 9, 0, 0, 0, 0, 0]])
    kept = best(scores, 1)
    narrow, wide = (
        KVMerger(recent_share=0, important_share=0, sigma=s).merge(kv, kept, scores, OBS).kv for s in (1e-3, 1e3)
    )
    assert torch.equal(narrow.keys[0, 2], kv.keys[0, 2])
    assert torch.allclose(wide.keys[0, 2], kv.keys[0].mean(0), atol=1e-5)
    assert torch.allclose(wide.values[0, 2], kv.values[0].mean(0), atol=1e-5)


def test_pivots_are_the_first_of_the_best() -> None:
    pivots, worth = pivots_of(torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([3.0, 3, 1, 4, 4, -1]))
    assert pivots.tolist() == [0, 3, 5]
    assert worth.tolist() == [3, 4, -1]


# EMS


@pytest.mark.parametrize("merger", [EMS(gamma=0), EMS(tau=1.0)])
def test_ems_that_may_not_merge_evicts(merger: EMS) -> None:
    kv, scores = layer(draw(2, 30, 8)), draw(2, 30, seed=1)
    kept = best(scores, 10)
    assert same(merger.merge(kv, kept, scores, OBS).kv, Evict().merge(kv, kept, scores, OBS).kv, kept)


@given(seed=st.integers(0, 99), gamma=st.sampled_from([0.3, 1.0, 2.5]), budget=st.integers(1, 24))
@settings(deadline=None)
def test_ems_by_hand(seed: int, gamma: float, budget: int) -> None:
    kv, scores = layer(draw(1, 24, 5, seed=seed)), draw(1, 24, seed=seed + 1).abs()
    scores[:, -3:] = torch.inf
    kept = best(scores, budget)
    merged = EMS(gamma=gamma, tau=0.3).merge(kv, kept, scores, OBS)
    assert torch.equal(merged.kept, kept)
    centres = [i for i in range(21) if kept[0, i]]
    dropped = sorted((i for i in range(24) if not kept[0, i]), key=lambda i: -float(scores[0, i]))
    classes: dict[int, list[int]] = {c: [c] for c in centres}
    for i in dropped[: int(gamma * len(centres))]:
        cosines = {c: float(torch.cosine_similarity(kv.keys[0, i], kv.keys[0, c], dim=0)) for c in centres}
        nearest = max(cosines, key=lambda c: cosines[c])
        if cosines[nearest] > 0.3:  # else the zero class takes it
            classes[nearest].append(i)
    weight = scores[0].clamp(max=scores[0, :21].max())  # what is protected but dropped counts as the best
    for c, members in classes.items():
        k = sum(weight[i] * kv.keys[0, i] for i in members)
        v = sum(weight[i] * kv.values[0, i] for i in members) / sum(weight[i] for i in members)
        assert torch.allclose(merged.kv.keys[0, c], k / k.norm() * kv.keys[0, c].norm(), atol=1e-4)
        assert torch.allclose(merged.kv.values[0, c], v, atol=1e-4)
        assert torch.allclose(merged.kv.keys[0, c].norm(), kv.keys[0, c].norm(), atol=1e-4)


@pytest.mark.parametrize("merger", [EMS(), LookM(), LookM(strategy="averaged"), LookM(strategy="weighted")])
def test_tokens_that_equal_their_target_change_nothing(merger: Any) -> None:
    half, values = draw(2, 12, 16), draw(2, 12, 16, seed=1)
    kv = layer(torch.cat([half, half], 1), torch.cat([values, values], 1))
    scores = torch.cat([draw(2, 12, seed=2).abs(), draw(2, 12, seed=3).abs() + 9], 1)
    kept = best(scores, 12)
    merged = merger.merge(kv, kept, scores, OBS)
    assert torch.allclose(merged.kv.keys[kept], kv.keys[kept], atol=1e-5)
    assert torch.allclose(merged.kv.values[kept], kv.values[kept], atol=1e-5)


# Chelsea


@pytest.mark.parametrize("budget", [1, 3, 16, 63, 64, 90])
def test_equal_tokens_cluster_without_loss(budget: int) -> None:
    kv = layer(draw(2, 1, 16).repeat(1, 100, 1), draw(2, 1, 16, seed=1).repeat(1, 100, 1))
    kv.keys[:, -6:], kv.values[:, -6:] = draw(2, 6, 16, seed=2), draw(2, 6, 16, seed=3)
    scores = draw(2, 100, seed=4)
    scores[:, -6:] = torch.inf
    merged = Chelsea(chunk=16).merge(kv, best(scores, budget + 6), scores, OBS)
    assert merged.counts is not None
    assert merged.counts[merged.kept].sum() == 200
    assert loss(kv, merged) < 1e-5
    assert Chelsea(chunk=16, size_bias=False).merge(kv, best(scores, budget + 6), scores, OBS).counts is None


def test_one_pass_of_chelsea_by_hand() -> None:
    kv, scores = layer(draw(1, 24, 4)), draw(1, 24, seed=1)
    merged = Chelsea(chunk=8).merge(kv, best(scores, 15), scores, OBS)  # three merges of each chunk of eight
    stars: dict[int, list[int]] = {i: [i] for i in range(24)}
    for start in (0, 8, 16):
        odd = range(start + 1, start + 8, 2)
        edges = []
        for a in range(start, start + 8, 2):
            cosines = [float(torch.cosine_similarity(kv.keys[0, a], kv.keys[0, b], dim=0)) for b in odd]
            edges.append((max(cosines), a, odd[cosines.index(max(cosines))]))
        for _, a, b in sorted(edges, reverse=True)[:3]:
            stars[b].extend(stars.pop(a))
    assert merged.kept[0].nonzero()[:, 0].tolist() == sorted(stars)
    for b, members in stars.items():
        assert torch.allclose(merged.kv.keys[0, b], kv.keys[0, members].mean(0), atol=1e-5)
        assert torch.allclose(merged.kv.values[0, b], kv.values[0, members].mean(0), atol=1e-5)
        assert merged.counts is not None
        assert merged.counts[0, b] == len(members)


def test_clusters_of_many_passes_are_means_of_tokens() -> None:
    kv, scores = layer(draw(1, 128, 128), torch.eye(128)[None]), draw(1, 128, seed=1)
    merged = Chelsea(chunk=32).merge(kv, best(scores, 13), scores, OBS)
    shares = merged.kv.values[0, merged.kept[0]]  # [13, 128]: how much of each token is in an entry
    assert torch.allclose(shares.sum(1), torch.ones(13), atol=1e-5)
    assert ((shares > 0).sum(0) == 1).all()  # every token is in exactly one
    assert merged.counts is not None
    sizes = merged.counts[0, merged.kept[0]]
    assert torch.equal((shares > 0).sum(1).float(), sizes)
    assert torch.allclose(shares.amax(1), 1 / sizes, atol=1e-5)  # and counts once, whichever pass merged it
    assert torch.allclose(merged.kv.keys[0, merged.kept[0]], shares @ kv.keys[0], atol=1e-4)
    blocks = (shares > 0).reshape(13, 4, 32).any(2).sum(1)
    assert (blocks == 1).all()  # no cluster leaves its chunk


def test_chunks_are_independent() -> None:
    kv, scores = layer(draw(1, 96, 4)), torch.zeros(1, 96)
    kept = best(scores, 24)
    order = torch.arange(96).reshape(3, 32)[[2, 0, 1]].flatten()
    there = replace(kv, keys=kv.keys[:, order], values=kv.values[:, order])
    one, other = (Chelsea(chunk=32).merge(x, kept, scores, OBS) for x in (kv, there))
    assert torch.equal(one.kept[:, order], other.kept)
    assert torch.allclose(one.kv.keys[:, order][other.kept], other.kv.keys[other.kept], atol=1e-6)


def test_an_orthogonal_key_is_merged_last() -> None:
    keys = torch.zeros(1, 32, 4)
    keys[..., :2] = 1 + 0.1 * draw(1, 32, 2)
    keys[0, 10] = torch.tensor([0.0, 0, 0, 3])
    scores = torch.zeros(1, 32)
    merged = Chelsea(chunk=32).merge(layer(keys), best(scores, 17), scores, OBS)
    assert torch.equal(merged.kv.keys[0, 10], keys[0, 10])
    assert merged.kept[0, 10]


# LOOK-M


def test_pivotal_merging_by_hand() -> None:
    x, a, b, other = torch.tensor([1.0, 0]), torch.tensor([2.0, 0.2]), torch.tensor([3.0, -0.4]), torch.tensor([0.0, 1])
    kv = layer(torch.stack([x, a, other, b])[None], torch.stack([x, a, other, b])[None] * 10)
    kept = torch.tensor([[True, False, True, False]])
    pivotal, averaged, weighted = (
        LookM(strategy=s).merge(kv, kept, torch.zeros(1, 4), OBS).kv for s in ("pivotal", "averaged", "weighted")
    )
    assert torch.allclose(pivotal.keys[0, 0], (x + (x + a) / 2 + (x + b) / 2) / 3)
    assert torch.allclose(pivotal.values[0, 0], 10 * (x + (x + a) / 2 + (x + b) / 2) / 3)
    assert torch.equal(pivotal.keys[0, 2], other)
    # of the two dropped ones, a is more similar than the mean of both
    assert torch.allclose(averaged.keys[0, 0], (x + a) / 2)
    assert torch.allclose(weighted.keys[0, 0], (x + torch.cosine_similarity(x, a, dim=0) * a) / 2)
