"""Allocators: the invariants of their papers, and Ada-KV against a loop."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steno.methods.allocate.adakv import AdaKV
from steno.methods.allocate.one_threshold import OneThreshold
from steno.methods.allocate.pyramidkv import PyramidKV
from steno.methods.allocate.uniform import Uniform


def counts(allocator: AdaKV | OneThreshold | Uniform, scores: torch.Tensor, budget: int) -> list[int]:
    return allocator.allocate(scores, budget_tokens=budget, layer_idx=0, num_layers=2).tolist()


def random_scores(hkv: int, num_tokens: int, window: int, seed: int) -> torch.Tensor:
    scores = torch.rand(hkv, num_tokens, generator=torch.Generator().manual_seed(seed))
    scores[:, num_tokens - window :] = torch.inf
    return scores


@given(hkv=st.integers(1, 5), num_tokens=st.integers(4, 30), budget=st.integers(4, 30), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_adakv_alpha_one_is_uniform(hkv: int, num_tokens: int, budget: int, seed: int) -> None:
    scores = random_scores(hkv, num_tokens, 3, seed)
    assert counts(AdaKV(alpha_safeguard=1), scores, budget) == counts(Uniform(), scores, budget)


@given(hkv=st.integers(1, 5), num_tokens=st.integers(4, 30), budget=st.integers(4, 30), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_adakv_alpha_zero_counts_the_best_of_the_layer(hkv: int, num_tokens: int, budget: int, seed: int) -> None:
    scores, budget = random_scores(hkv, num_tokens, 3, seed), min(budget, num_tokens)
    entries = sorted(((s, h) for h, row in enumerate(scores.tolist()) for s in row), reverse=True)
    best = [h for _, h in entries[: hkv * budget]]
    assert counts(AdaKV(alpha_safeguard=0), scores, budget) == [best.count(h) for h in range(hkv)]


@given(alpha=st.floats(0, 1), budget=st.integers(4, 30), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_adakv_floor_holds(alpha: float, budget: int, seed: int) -> None:
    scores = random_scores(3, 30, 3, seed)
    floor = 3 + int(alpha * (budget - 3))
    assert min(counts(AdaKV(alpha_safeguard=alpha), scores, budget)) >= floor - (alpha * (budget - 3) == floor - 3)


def test_adakv_by_hand() -> None:
    one_hot = torch.zeros(2, 10)
    one_hot[0, 4], one_hot[1] = 1.0, 0.1
    assert counts(AdaKV(alpha_safeguard=0.5), one_hot, 4) == [2 + 1, 2 + 3]  # 0.5 * [1, 7] + 2, remainders tie
    same = torch.rand(1, 12).repeat(3, 1)
    assert counts(AdaKV(), same, 5) == [5, 5, 5]
    assert counts(AdaKV(), torch.ones(3, 12), 5) == [5, 5, 5]


def test_adakv_unequal_protection_still_sums_up() -> None:
    scores = torch.tensor([[torch.inf] * 6 + [1, 2, 3, 4], [9.0] * 10])
    assert sum(counts(AdaKV(), scores, 5)) == 10
    assert counts(AdaKV(), scores, 5)[0] >= 6
    assert counts(AdaKV(), torch.full((2, 6), torch.inf), 4) == [4, 4]


def layer_budgets(beta: int, num_tokens: int, window: int, budget: int, num_layers: int) -> list[int]:
    method = PyramidKV(beta=beta)
    return [method.layer_budget(num_tokens, window, budget, i, num_layers) for i in range(num_layers)]


@given(
    beta=st.integers(1, 40), past=st.integers(1, 300), extra=st.integers(0, 2000),
    window=st.integers(0, 64), num_layers=st.integers(2, 32),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_pyramidkv_falls_and_exceeds_within_its_bound(
    beta: int, past: int, extra: int, window: int, num_layers: int
) -> None:
    num_tokens = max(2 * past, past + window) + extra
    budgets = layer_budgets(beta, num_tokens, window, past + window, num_layers)
    assert budgets == sorted(budgets, reverse=True)
    assert window <= budgets[-1]
    assert budgets[0] <= num_tokens
    excess = sum(budgets) - num_layers * (past + window)
    assert 0 <= excess <= num_layers * (num_layers - 2) / 2


def test_pyramidkv_by_hand() -> None:
    assert layer_budgets(1, 1000, 8, 108, 5) == [108] * 5
    assert layer_budgets(20, 1000, 8, 108, 6) == [8 + 195 - 38 * i for i in range(6)]
    assert layer_budgets(20, 200, 8, 108, 3) == [200, 108, 16]  # clamped: the first layer keeps all
    assert layer_budgets(20, 150, 8, 108, 3) == [108] * 3  # short prompts are uniform
    assert layer_budgets(20, 1000, 8, 108, 1) == [108]
    scores = random_scores(2, 50, 4, 0)
    first, last = (PyramidKV().allocate(scores, budget_tokens=14, layer_idx=i, num_layers=2).tolist() for i in (0, 1))
    assert (first, last) == ([24, 24], [4, 4])


@given(heads=st.integers(1, 6), num_tokens=st.integers(4, 30), budget=st.integers(4, 30), seed=st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_one_threshold_keeps_the_best_of_all_heads(heads: int, num_tokens: int, budget: int, seed: int) -> None:
    scores, budget = random_scores(heads, num_tokens, 3, seed), min(budget, num_tokens)
    entries = sorted(((s, h) for h, row in enumerate(scores.tolist()) for s in row), reverse=True)
    best = [h for _, h in entries[: heads * budget]]
    assert counts(OneThreshold(), scores, budget) == [best.count(h) for h in range(heads)]


@given(
    heads=st.integers(1, 6), num_tokens=st.integers(1, 40), budget=st.integers(1, 40), window=st.integers(0, 5),
    unit=st.integers(1, 9), seed=st.integers(0, 50),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_one_threshold_gives_whole_units_and_never_more_than_the_budget(
    heads: int, num_tokens: int, budget: int, window: int, unit: int, seed: int
) -> None:
    scores = random_scores(heads, num_tokens, min(window, num_tokens), seed)
    found = counts(OneThreshold(unit=unit), scores, budget)
    total = min(budget, num_tokens) * heads
    assert sum(found) <= total
    if any(n % unit for n in found):  # whole units cannot hold what is protected
        least = -(-max(1, window) // unit)
        assert least > num_tokens // unit or least * heads > total // unit
        assert sum(found) == total
    else:
        assert sum(found) > total - unit or sum(found) == heads * (num_tokens // unit * unit)


def test_one_threshold_by_hand() -> None:
    scores = torch.tensor([[9.0, 1, 1, 1, 1, 1], [4.0, 4, 4, 4, 0, 0], [torch.inf, 0, 0, 0, 0, 0]])
    assert counts(OneThreshold(), scores, 2) == [1, 4, 1]
    assert counts(OneThreshold(unit=2), scores, 2) == [2, 2, 2]  # means: 5 of the first, 4 of the second, protected
    assert counts(OneThreshold(unit=3), scores, 2) == counts(OneThreshold(), scores, 2)  # not a run of 3 for each
    assert counts(OneThreshold(), torch.tensor([[9.0, 9, 9, 9], [0, 0, 0, 0]]), 2) == [3, 1]  # at least one of each
    assert counts(OneThreshold(unit=7), scores, 2) == counts(OneThreshold(), scores, 2)  # no run of 7 fits
    assert counts(OneThreshold(unit=2), torch.ones(3, 6), 2) == [2, 2, 2]
    assert counts(OneThreshold(), torch.full((2, 6), torch.inf), 4) == [4, 4]
